"""Estimate the values of states for VinePPO by sampling continuations.

`MonteCarlo` samples new continuations of every state. `ReusingMonteCarlo` lets a continuation count for several states.
"""

from vineppo.values.monte_carlo import Key, MonteCarlo, Node, NodeEstimator, State, Value, ValueCost, ValueEstimator
from vineppo.values.reuse import ReusingMonteCarlo, reusing_or_fresh

__all__ = [
    "Key",
    "MonteCarlo",
    "Node",
    "NodeEstimator",
    "ReusingMonteCarlo",
    "State",
    "Value",
    "ValueCost",
    "ValueEstimator",
    "reusing_or_fresh",
]
