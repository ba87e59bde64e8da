"""Measure the mean reward, pass@k and greedy accuracy on held-out problems, with confidence intervals.

Responses without a reward, to which no reward function applies, are left out of all results and counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.config.schema import EvalSpec
from vineppo.model.codec import Codec
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler
from vineppo.seeds import derive_seed
from vineppo.statistics import Interval, bootstrap_mean, pass_at_k
from vineppo.tasks import build_task
from vineppo.training.overlong import fit_prompts
from vineppo.training.rollouts import generated_tokens, problem_range, sample_groups
from vineppo.types import Problem, Sampler, Task


@dataclass(frozen=True)
class Measurement:
    """Rewards of `num_samples` responses to each of P problems, number of sampled tokens, and truncated share."""

    rewards: tuple[tuple[float | None, ...], ...]
    """Reward of each response, shape (P, num_samples). It is None if no reward function applies to the response."""
    tokens: int
    """Number of sampled response tokens."""
    truncated_share: float
    """Share of the responses that were cut off by the length limit."""

    @property
    def graded(self) -> bool:
        """Whether any reward is partial, that is, neither 0 nor 1."""
        return any(reward not in (0, 1) for row in self._known for reward in row)

    @property
    def not_applicable_share(self) -> float:
        """Share of the responses that have no reward."""
        return 1 - sum(map(len, self._known)) / sum(map(len, self.rewards))

    @property
    def _known(self) -> list[list[float]]:
        """The rewards of each problem that are not None."""
        return [[reward for reward in row if reward is not None] for row in self.rewards]

    def mean_reward(self, seed: int) -> Interval:
        """Return the mean reward over all responses, with a bootstrap confidence interval over problems.

        If all rewards are 0 or 1, the mean reward equals pass@1. Responses without a reward are left out, and so are
        problems without any response that has a reward. If no problem is left, the numbers are NaN.

        Args:
            seed: seed of the bootstrap.
        """
        return _mean_over_problems([sum(row) / len(row) for row in self._known if row], seed)

    def pass_at_k(self, k: int, seed: int) -> Interval:
        """Return pass@k, the probability that at least one of k responses to a problem is right (reward at least 1).

        The estimate is unbiased. The result is the mean over problems, with a bootstrap confidence interval over
        problems. Responses without a reward are left out, and so are problems with fewer than k responses that have a
        reward. If no problem is left, the numbers are NaN.

        Args:
            k: number of responses, at most `num_samples`.
            seed: seed of the bootstrap.
        """
        # The tolerance absorbs rounding errors of weighted rewards.
        values = [pass_at_k(len(row), sum(r >= 1 - 1e-9 for r in row), k) for row in self._known if len(row) >= k]
        return _mean_over_problems(values, seed)


def _mean_over_problems(values: Sequence[float], seed: int) -> Interval:
    """Return the mean of one number per problem with its interval, or NaN if there are no numbers."""
    return bootstrap_mean(values, seed=seed) if values else Interval(math.nan, math.nan, math.nan)


def measure(
    codec: Codec,
    sampler: Sampler,
    task: Task,
    problems: Sequence[Problem],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    stop: tuple[str, ...] = (),
    address: Sequence[int | str],
) -> Measurement:
    """Sample and grade `num_samples` responses to each problem.

    The other arguments are those of `vineppo.training.rollouts.sample_groups`.
    """
    groups = sample_groups(
        problems,
        codec,
        sampler,
        task,
        group_size=num_samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop=stop,
        address=address,
    )
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return Measurement(
        rewards=tuple(tuple(rollout.reward for rollout in group.rollouts) for group in groups),
        tokens=generated_tokens(groups),
        truncated_share=float(np.mean([rollout.finish_reason == "length" for rollout in rollouts])),
    )


def accuracy_metrics(measurement: Measurement, seed: int) -> dict[str, float | None]:
    """Return the metrics of an evaluation during training: the accuracy (mean reward) with its interval.

    The accuracy is None if no response has a reward. The share of responses without a reward is added if it is above 0.

    Args:
        seed: seed of the bootstrap.
    """
    interval = measurement.mean_reward(seed).as_dict()
    metrics: dict[str, float | None] = {
        "eval/accuracy": interval["mean"],
        "eval/accuracy_low": interval["low"],
        "eval/accuracy_high": interval["high"],
    }
    if measurement.not_applicable_share:
        metrics["eval/not_applicable_share"] = measurement.not_applicable_share
    return metrics


def evaluate_model(spec: EvalSpec) -> dict[str, Any]:
    """Measure the accuracy of a model on the problems of a split, for `vineppo eval`.

    Returns:
        A dictionary. `greedy`, `pass@1` and `pass@k` for the configured k are shares of right responses (reward at
        least 1), each as {mean, low, high} with a confidence interval. `greedy` is measured at temperature 0. If some
        rewards are partial, that is, neither 0 nor 1, `greedy reward` and `mean reward` are added in the same form. The
        other entries are the numbers of problems, samples and sampled tokens, the split, the share of truncated
        responses, the shares of grading errors (`grader/*`) and the duration in seconds.
    Raises:
        UserError: if the model, the task or its graders cannot be used.
    """
    began = time.perf_counter()
    policy = Policy.load(spec.model)
    task = build_task(spec.task, policy.codec.chat_prompt)
    fit_prompts(task, policy.codec, spec.max_new_tokens, spec.task.overlong, {spec.split: spec.num_problems})
    sampler = build_sampler(policy)
    problems = problem_range(task, spec.split, spec.num_problems)

    def measure_at(temperature: float, num_samples: int) -> Measurement:
        return measure(
            policy.codec,
            sampler,
            task,
            problems,
            num_samples=num_samples,
            max_new_tokens=spec.max_new_tokens,
            temperature=temperature,
            stop=spec.stop,
            address=(spec.seed, "eval"),
        )

    sampled, greedy = measure_at(spec.temperature, spec.num_samples), measure_at(0.0, 1)
    seed = derive_seed(spec.seed, "bootstrap")
    rewards = {"greedy reward": greedy, "mean reward": sampled} if sampled.graded or greedy.graded else {}
    return {
        "greedy": greedy.pass_at_k(1, seed).as_dict(),
        **{f"pass@{k}": sampled.pass_at_k(k, seed).as_dict() for k in sorted({1, *(spec.k or (spec.num_samples,))})},
        **{name: measurement.mean_reward(seed).as_dict() for name, measurement in rewards.items()},
        "num_problems": len(problems),
        "num_samples": spec.num_samples,
        "split": spec.split,
        "truncated_share": sampled.truncated_share,
        **task.total.shares(),
        "tokens": sampled.tokens + greedy.tokens,
        "seconds": time.perf_counter() - began,
    }
