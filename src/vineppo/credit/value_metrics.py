"""Compute the metrics of VinePPO: the cost of estimating values, and the share of steps whose advantage is 0."""

from __future__ import annotations

from collections.abc import Sequence

from vineppo.types import Metrics, TrainingSample
from vineppo.values import ValueCost


def value_metrics(samples: Sequence[TrainingSample], cost: ValueCost) -> Metrics:
    """Return a dictionary of metrics of one iteration. docs/metrics.md describes each metric.

    Args:
        samples: the training samples of the iteration, one for each rollout that has a reward.
        cost: cost of estimating the values of the states of these rollouts.
    """
    advantages = [a for sample in samples if sample.credit for a in sample.credit.step_advantages]
    return {
        "tokens/mc": float(cost.tokens),
        "credit/mc_rollouts": float(cost.mc_rollouts),
        "credit/states": float(cost.states),
        "credit/distinct_states": float(cost.distinct_states),
        "credit/steps_per_response": cost.states / max(1, len(samples)),
        "credit/zero_step_share": sum(a == 0 for a in advantages) / max(1, len(advantages)),
    }
