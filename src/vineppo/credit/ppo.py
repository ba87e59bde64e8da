"""PPO: advantages are computed from a value network by generalised advantage estimation (GAE).

Sources: arXiv 1707.06347 (PPO), arXiv 1506.02438 (GAE).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from vineppo.config.schema import CriticConfig
from vineppo.credit.advantages import gae
from vineppo.credit.algorithm import Algorithm, CreditParts, PredictValues
from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


class PPOSettings(CriticConfig):
    """PPO: advantages are computed from a value network by generalised advantage estimation."""

    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Lambda of GAE. With 1 (the paper's setting) the advantage is the Monte-Carlo return minus the value."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per token."""


def gae_credit(predict_values: PredictValues, *, gamma: float, gae_lambda: float) -> CreditFn:
    """Build the credit function of PPO. It computes advantages by GAE, and returns as targets of the value network."""

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        values = predict_values(rollouts)
        samples = []
        for rollout, values_T in zip(rollouts, values, strict=True):
            advantages_T, returns_T = gae(values_T, rollout.reward, gamma, gae_lambda)
            samples.append(training_sample(rollout, advantages_T, returns_T=returns_T, values_T=values_T))
        targets = [r.reward for r, row in zip(rollouts, values, strict=True) for _ in row]
        return samples, {
            "value/explained_variance": explained_variance([v for row in values for v in row], targets),
            "value/mean": sum(map(sum, values)) / max(1, sum(map(len, values))),
        }

    return credit


def explained_variance(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Return 1 - Var(target - prediction) / Var(target), or nan if all targets are equal.

    The result is 1 for perfect predictions and 0 for constant ones.
    """
    import torch  # slow to import, and not needed for the settings above

    target = torch.tensor(targets, dtype=torch.float64)
    error = target - torch.tensor(predictions, dtype=torch.float64)
    variance = target.var(unbiased=False)
    return float("nan") if variance == 0 else float(1 - error.var(unbiased=False) / variance)


def _build(settings: PPOSettings, parts: CreditParts) -> CreditFn:
    return gae_credit(parts.predict_values, gamma=settings.gamma, gae_lambda=settings.gae_lambda)


PPO = Algorithm(name="ppo", label="PPO", build=_build, settings=PPOSettings, needs_critic=True, colour="#0072B2")
