"""PPO: advantages are computed from the predictions of a value network by generalised advantage estimation (GAE).

Sources: arXiv 1707.06347 (PPO), arXiv 1506.02438 (GAE).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from vineppo.config.schema import CriticConfig
from vineppo.credit.advantages import gae
from vineppo.credit.algorithm import Algorithm, CreditParts, PredictValues
from vineppo.credit.sample import one_per_rollout, reward_of, training_sample, with_reward
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample


class PPOSettings(CriticConfig):
    """PPO: advantages are computed from the predictions of a value network by generalised advantage estimation."""

    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Lambda of generalised advantage estimation. With 1, as in the VinePPO paper, the advantage of a token is the
    discounted reward of the response minus the predicted value."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount factor per token; 1 means no discount."""


def gae_credit(predict_values: PredictValues, *, gamma: float, gae_lambda: float) -> CreditFn:
    """Build the credit function of PPO, which computes advantages and the targets of the value network by GAE.

    The credit function also returns two metrics of the predictions: their mean, and the share of the variance of the
    rewards that they explain.

    A rollout without a reward has advantages of 0 and no targets, and it is left out of the metrics.

    Args:
        predict_values: returns the predictions of the value network for given rollouts.
        gamma: discount factor per token.
        gae_lambda: lambda of GAE.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = [rollout for _, rollout in with_reward(groups)]
        values = predict_values(rollouts) if rollouts else []
        samples = []
        for rollout, values_T in zip(rollouts, values, strict=True):
            advantages_T, returns_T = gae(values_T, reward_of(rollout), gamma, gae_lambda)
            samples.append(training_sample(rollout, advantages_T, returns_T=returns_T, values_T=values_T))
        if not samples:
            return one_per_rollout(groups, ()), {}
        targets = [reward_of(r) for r, row in zip(rollouts, values, strict=True) for _ in row]
        return one_per_rollout(groups, samples), {
            "value/explained_variance": explained_variance([v for row in values for v in row], targets),
            "value/mean": sum(map(sum, values)) / max(1, sum(map(len, values))),
        }

    return credit


def explained_variance(predictions: Sequence[float], targets: Sequence[float]) -> float:
    """Return the share of the variance of the targets that the predictions explain.

    This is 1 - Var(target - prediction) / Var(target). It is 1 for perfect predictions, 0 for constant predictions, and
    nan if all targets are equal.
    """
    if len(set(targets)) < 2:
        return float("nan")
    # torch is slow to import. It is imported here, because commands that only read the settings do not need it.
    import torch

    target = torch.tensor(targets, dtype=torch.float64)
    error = target - torch.tensor(predictions, dtype=torch.float64)
    return float(1 - error.var(unbiased=False) / target.var(unbiased=False))


def _build(settings: PPOSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function of PPO for a run (`Algorithm.build`)."""
    return gae_credit(parts.predict_values, gamma=settings.gamma, gae_lambda=settings.gae_lambda)


PPO = Algorithm(name="ppo", label="PPO", build=_build, settings=PPOSettings, needs_critic=True, colour="#0072B2")
