"""PPO: credit from a value network by generalised advantage estimation (arXiv 1707.06347, 1506.02438)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vineppo.credit.advantages import gae
from vineppo.credit.sample import training_sample
from vineppo.types import CreditFn, Metrics, Rollout, RolloutGroup, TrainingSample

PredictValues = Callable[[Sequence[Rollout]], list[list[float]]]
"""The critic's value before each response token: one list of shape (T,) per rollout (Learner.predict_values)."""


def gae_credit(predict_values: PredictValues, *, gamma: float, gae_lambda: float) -> CreditFn:
    """Bind PPO's credit function: the critic's value before each token, GAE, and the returns it learns from."""

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
    """1 - Var(target - prediction) / Var(target); 1 is perfect, 0 no better than a constant, nan without variance."""
    target = torch.tensor(targets, dtype=torch.float64)
    error = target - torch.tensor(predictions, dtype=torch.float64)
    variance = target.var(unbiased=False)
    return float("nan") if variance == 0 else float(1 - error.var(unbiased=False) / variance)
