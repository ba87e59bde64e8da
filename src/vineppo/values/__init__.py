"""Monte-Carlo values of states, from new continuations of every state or from continuations shared between states."""

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
