"""States to Monte-Carlo values: with K fresh continuations of each, or with continuations that serve several states."""

from vineppo.values.monte_carlo import MonteCarlo, Node, NodeEstimator, State, Value, ValueCost, ValueEstimator
from vineppo.values.reuse import ReusingMonteCarlo

__all__ = ["MonteCarlo", "Node", "NodeEstimator", "ReusingMonteCarlo", "State", "Value", "ValueCost", "ValueEstimator"]
