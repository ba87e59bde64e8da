"""Metrics of algorithms that compute advantages from Monte-Carlo values."""

from __future__ import annotations

from collections.abc import Sequence

from vineppo.types import Metrics, TrainingSample
from vineppo.values import ValueCost


def value_metrics(samples: Sequence[TrainingSample], cost: ValueCost) -> Metrics:
    """Return the cost of the values (tokens, continuations, states), and the share of steps with advantage 0."""
    advantages = [a for sample in samples if sample.credit for a in sample.credit.step_advantages]
    return {
        "tokens/mc": float(cost.tokens),
        "credit/mc_rollouts": float(cost.mc_rollouts),
        "credit/states": float(cost.states),
        "credit/distinct_states": float(cost.distinct_states),
        "credit/steps_per_response": cost.states / max(1, len(samples)),
        "credit/zero_step_share": sum(a == 0 for a in advantages) / max(1, len(advantages)),
    }
