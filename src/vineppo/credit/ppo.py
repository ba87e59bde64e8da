"""PPO: advantages are computed from the predictions of a value network by generalised advantage estimation (GAE).

Sources: arXiv 1707.06347 (PPO), arXiv 1506.02438 (GAE). Settings that are off by default: another lambda for the value
network's targets and a lambda that depends on the length (VAPO, arXiv 2504.05118), lambda only at the ends of segments
(SAE, arXiv 2601.07320), and a baseline without the value network while it is worse than a constant (EVPO, arXiv
2604.19485).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from vineppo.config.schema import Config, CriticConfig
from vineppo.config.settings import require
from vineppo.credit.advantages import gae, leave_one_out_advantages
from vineppo.credit.algorithm import Algorithm, CreditParts, PredictValues
from vineppo.credit.sample import one_per_rollout, reward_of, training_sample, with_reward
from vineppo.steps import Splitter, build_splitter
from vineppo.types import CreditFn, Metrics, Rollout, RolloutGroup, TrainingSample

LambdasOf = Callable[[Rollout], Sequence[float]]
"""Function (rollout) -> the lambda of GAE for each of its T response tokens, shape (T,)."""


class PPOSettings(CriticConfig):
    """PPO: advantages are computed from the predictions of a value network by generalised advantage estimation."""

    gae_lambda: float = Field(1.0, ge=0, le=1)
    """Lambda of generalised advantage estimation. With 1, as in the VinePPO paper, the advantage of a token is the
    discounted reward of the response minus the predicted value."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount factor per token; 1 means no discount."""
    value_lambda: float | None = Field(None, ge=0, le=1)
    """Lambda of the targets of the value network. None means the lambda of the advantages. With 1 a target is the
    discounted reward, whatever `gae_lambda` is (VAPO, arXiv 2504.05118)."""
    length_alpha: float = Field(0.0, ge=0)
    """If above 0, lambda of the advantages of a response of T tokens is 1 - 1 / (length_alpha * T), at least 0, instead
    of `gae_lambda` (VAPO, which uses 0.05)."""
    boundaries: str = ""
    """Name of a splitter such as `cutpoints:1:0.2` or `newline` (see `vineppo.splitter`). Lambda then applies only at
    the ends of its steps, and is 1 at all other tokens, so that only the values of the states between steps are used
    (SAE, arXiv 2601.07320). Empty: lambda applies at every token."""
    switch_baseline: bool = False
    """While the value network is worse than a constant, use the mean reward of the other rollouts of the iteration as
    the baseline (EVPO, arXiv 2604.19485). It is worse if the explained variance of the *other* rollouts is at most 0,
    so the choice does not depend on the rollout itself. The value network is trained nevertheless."""

    def check(self) -> None:
        """Raise UserError if the settings exclude each other, or the splitter is unknown."""
        if self.boundaries:
            build_splitter(self.boundaries)
        require(
            self.gamma == 1 or not self.switch_baseline,
            f"ppo.gamma is {self.gamma:g} and ppo.switch_baseline is true, but the mean of other rewards is not "
            "discounted; set ppo.gamma to 1 or ppo.switch_baseline to false",
        )


@dataclass(frozen=True)
class Estimation:
    """How advantages and targets are computed from predicted values."""

    gamma: float
    """Discount factor per token."""
    lambdas_of: LambdasOf
    """Returns the lambda of the advantages of each token."""
    value_lambda: float | None = None
    """Lambda of the targets of the value network; None: that of the advantages."""
    switch_baseline: bool = False
    """Whether to use the mean of other rewards while the predictions are worse than a constant."""


def gae_credit(predict_values: PredictValues, *, gamma: float, gae_lambda: float) -> CreditFn:
    """Build the credit function of PPO with the same lambda for all tokens and for the targets.

    Args:
        predict_values: returns the predictions of the value network for given rollouts.
        gamma: discount factor per token.
        gae_lambda: lambda of GAE.
    """
    return critic_credit(predict_values, Estimation(gamma, lambda rollout: [gae_lambda] * len(rollout.response_ids)))


def critic_credit(predict_values: PredictValues, estimation: Estimation) -> CreditFn:
    """Build the credit function of PPO, which computes advantages and the targets of the value network by GAE.

    The credit function also returns metrics of the predictions: their mean, the share of the variance of the rewards
    that they explain, and, with `switch_baseline`, the share of rollouts whose baseline is the value network.

    A rollout without a reward has advantages of 0 and no targets, and it is left out of the metrics.
    """

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        rollouts = [rollout for _, rollout in with_reward(groups)]
        values = predict_values(rollouts) if rollouts else []
        if not rollouts:
            return one_per_rollout(groups, ()), {}
        rewards = [reward_of(rollout) for rollout in rollouts]
        constants = _other_means(values, rewards) if estimation.switch_baseline else [None] * len(rollouts)
        samples = []
        for rollout, values_T, constant in zip(rollouts, values, constants, strict=True):
            advantages_T, returns_T = _estimate(estimation, rollout, values_T)
            if constant is not None:
                advantages_T = [constant] * len(values_T)
            samples.append(training_sample(rollout, advantages_T, returns_T=returns_T, values_T=values_T))
        targets = [reward for reward, row in zip(rewards, values, strict=True) for _ in row]
        metrics = {
            "value/explained_variance": explained_variance([v for row in values for v in row], targets),
            "value/mean": sum(map(sum, values)) / max(1, sum(map(len, values))),
        }
        if estimation.switch_baseline:
            metrics["value/baseline_share"] = constants.count(None) / len(constants)
        return one_per_rollout(groups, samples), metrics

    return credit


def _estimate(estimation: Estimation, rollout: Rollout, values_T: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return (advantages, targets of the value network) of a rollout, both in reward units, shape (T,)."""
    reward, gamma = reward_of(rollout), estimation.gamma
    advantages_T, returns_T = gae(values_T, reward, gamma, estimation.lambdas_of(rollout))
    if estimation.value_lambda is not None:
        _, returns_T = gae(values_T, reward, gamma, estimation.value_lambda)
    return advantages_T, returns_T


def _other_means(values: Sequence[Sequence[float]], rewards: Sequence[float]) -> list[float | None]:
    """Return the advantage of each rollout over the mean of the other rewards, or None to use the value network.

    Args:
        values: predicted values of each rollout, one row of T numbers per rollout.
        rewards: reward of each rollout.
    """
    if len(rewards) < 2:
        return [None] * len(rewards)
    constants = leave_one_out_advantages(rewards)
    explained = explained_by_others(values, rewards)
    return [None if share > 0 else constant for share, constant in zip(explained, constants, strict=True)]


def explained_by_others(values: Sequence[Sequence[float]], rewards: Sequence[float]) -> list[float]:
    """Return for each rollout the explained variance over the tokens of all other rollouts (`explained_variance`).

    The number is nan if the other rewards are all equal, or differ only by a rounding error.

    Args:
        values: predicted values of each rollout, one row of T numbers per rollout.
        rewards: reward of each rollout.
    """
    # For each rollout: number of tokens, and sums of target, squared target, error and squared error over its tokens.
    rows = []
    for row, reward in zip(values, rewards, strict=True):
        errors = [reward - value for value in row]
        rows.append((len(row), len(row) * reward, len(row) * reward**2, sum(errors), sum(e * e for e in errors)))
    totals = [math.fsum(column) for column in zip(*rows, strict=True)]
    explained = []
    for i, own in enumerate(rows):
        n, target, target2, error, error2 = (total - part for total, part in zip(totals, own, strict=True))
        others = [reward for j, reward in enumerate(rewards) if j != i]
        variance = target2 / n - (target / n) ** 2 if n else 0.0
        # Weighted rewards may differ by a rounding error only. The difference of the two terms is then noise, or 0.
        if len(set(others)) < 2 or variance <= 1e-12 * max(reward**2 for reward in others):
            explained.append(math.nan)
            continue
        explained.append(1 - (error2 / n - (error / n) ** 2) / variance)
    return explained


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


def lambdas_of(settings: PPOSettings, token_texts: Callable[[Sequence[int]], list[str]]) -> LambdasOf:
    """Return the function that gives the lambda of each token of a response.

    Args:
        token_texts: maps token ids to the text of each token, for the splitter.
    """
    splitter: Splitter | None = build_splitter(settings.boundaries) if settings.boundaries else None

    def lambdas(rollout: Rollout) -> list[float]:
        T = len(rollout.response_ids)
        chosen = settings.gae_lambda
        if settings.length_alpha:
            chosen = max(0.0, 1 - 1 / (settings.length_alpha * T))
        if splitter is None:
            return [chosen] * T
        ends = set(splitter(token_texts(rollout.response_ids), rollout.sampler_logprobs))
        return [chosen if t + 1 in ends else 1.0 for t in range(T)]

    return lambdas


def _check(settings: PPOSettings, config: Config) -> None:
    """Raise UserError if the settings do not fit the configuration (`Algorithm.check`)."""
    count = config.rollouts.num_problems * config.rollouts.group_size
    require(
        count >= 2 or not settings.switch_baseline,
        "ppo.switch_baseline is true, but an iteration has only one rollout; raise rollouts.num_problems",
    )


def _build(settings: PPOSettings, parts: CreditParts) -> CreditFn:
    """Build the credit function of PPO for a run (`Algorithm.build`)."""
    lambdas = lambdas_of(settings, parts.codec.token_texts)
    estimation = Estimation(settings.gamma, lambdas, settings.value_lambda, settings.switch_baseline)
    return critic_credit(parts.predict_values, estimation)


PPO = Algorithm(
    name="ppo", label="PPO", build=_build, settings=PPOSettings, needs_critic=True, check=_check, colour="#0072B2"
)
