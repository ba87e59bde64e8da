"""Define the result of `vineppo plan`, and estimate rollouts, tokens and updates of an iteration from the settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.training.configure import algorithm_settings
from vineppo.training.parts import total_updates, updates_per_iteration
from vineppo.types import UserError


@dataclass(frozen=True)
class Amounts:
    """Numbers of rollouts, tokens and updates in one iteration of training."""

    rollouts: int
    """Number of rollouts: problems times responses per problem."""
    rollout_tokens: float
    """Number of tokens in the responses of all rollouts."""
    prompt_tokens: float
    """Mean number of tokens in a prompt."""
    mc_tokens: float
    """Number of tokens in all MC rollouts, which are continuations that an algorithm samples to estimate values; 0 if
    the algorithm samples none."""
    steps_per_response: float
    """Mean number of reasoning steps in a response."""
    updates: int
    """Number of optimizer updates."""

    @property
    def sequence_tokens(self) -> float:
        """Mean number of tokens in a prompt together with its response."""
        return self.prompt_tokens + self.rollout_tokens / self.rollouts


@dataclass(frozen=True)
class Plan:
    """The prediction for a run: amounts and seconds of one iteration, number of iterations, and memory."""

    source: str
    """Text that says how the plan was computed: by a calibration or from a data sheet."""
    amounts: Amounts
    """Rollouts, tokens and updates of one iteration."""
    seconds: Mapping[str, float]
    """Phase of an iteration (`sample`, `credit` or `update`) -> its seconds."""
    iterations: int
    """Number of iterations of the run."""
    memory: Mapping[str, float]
    """Kind of memory -> bytes. The kinds are the keys of the result of `memory.memory_by_kind`. The key `peak` has the
    peak of the whole run."""
    available: float
    """Memory of the machine or accelerator in bytes; 0 if it is unknown."""
    variants: Sequence[tuple[str, float, float]]
    """List of (changed setting, MC tokens per iteration, seconds per iteration). Each entry predicts the cost of an
    iteration if only this setting is changed. The list is empty if nothing is predicted."""

    @property
    def seconds_per_iteration(self) -> float:
        """Seconds of one iteration, summed over all phases."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary that can be written as JSON."""
        return {**asdict(self), "seconds_per_iteration": self.seconds_per_iteration}


def guessed_amounts(config: Config, response_tokens: int | None) -> Amounts:
    """Estimate the amounts of one iteration from the settings alone, without running the model.

    The estimate assumes prompts of 120 tokens and reasoning steps of 30 tokens.

    Args:
        config: configuration of the run.
        response_tokens: assumed number of tokens in a response. None assumes a third of `rollouts.max_new_tokens`.
    Raises:
        UserError: if no response can be as long as `response_tokens`.
    """
    settings = config.rollouts
    if (response_tokens or 0) > settings.max_new_tokens:
        raise UserError(
            f"--response_tokens is {response_tokens}, but a response has at most {settings.max_new_tokens} tokens "
            "(rollouts.max_new_tokens); give a smaller mean, or raise rollouts.max_new_tokens"
        )
    length = response_tokens or max(1, settings.max_new_tokens // 3)
    rollouts = settings.num_problems * settings.group_size
    steps = max(1, length // 30)
    algorithm = find_algorithm(config.algorithm)
    mc_tokens = 0.0
    if algorithm.plan:
        mc_tokens = algorithm.plan.mc_tokens(algorithm_settings(config, algorithm), rollouts, steps, length)
    return Amounts(rollouts, rollouts * length, 120.0, mc_tokens, steps, updates_per_iteration(config))


def iterations(config: Config, amounts: Amounts, seconds: Mapping[str, float]) -> int:
    """Return the number of iterations after which the run reaches the first of its limits.

    The settings limit the number of iterations, and can also limit updates, tokens and seconds.

    Args:
        config: configuration of the run.
        amounts: predicted amounts of one iteration.
        seconds: phase -> predicted seconds of one iteration.
    """
    # -(-a // b) is a / b, rounded up.
    limits = [config.run.iterations, -(-total_updates(config) // amounts.updates)]
    if config.run.max_tokens:
        limits.append(math.ceil(config.run.max_tokens / (amounts.rollout_tokens + amounts.mc_tokens)))
    if config.run.max_seconds:
        limits.append(math.ceil(config.run.max_seconds / sum(seconds.values())))
    return min(limits)
