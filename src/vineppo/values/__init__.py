"""Estimators of Monte-Carlo values of states. Each state gets new continuations, or states share continuations."""

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
