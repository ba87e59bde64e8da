"""States to Monte-Carlo values: K fresh continuations each, as many as it takes, or ones that serve several."""

from vineppo.values.adaptive import AdaptiveMonteCarlo
from vineppo.values.monte_carlo import Key, MonteCarlo, Node, NodeEstimator, State, Value, ValueCost, ValueEstimator
from vineppo.values.reuse import ReusingMonteCarlo

__all__ = [
    "AdaptiveMonteCarlo",
    "Key",
    "MonteCarlo",
    "Node",
    "NodeEstimator",
    "ReusingMonteCarlo",
    "State",
    "Value",
    "ValueCost",
    "ValueEstimator",
]
