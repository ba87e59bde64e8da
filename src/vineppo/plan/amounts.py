"""The amounts of one iteration (rollouts, tokens, updates), the plan of a run, and rough estimates of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.training.configure import algorithm_settings
from vineppo.training.parts import total_updates, updates_per_iteration


@dataclass(frozen=True)
class Amounts:
    """Numbers of rollouts, tokens and updates in one iteration."""

    rollouts: int
    rollout_tokens: float
    """Number of tokens in the responses of all rollouts."""
    prompt_tokens: float
    """Mean number of tokens in a prompt."""
    mc_tokens: float
    """Number of tokens in all MC rollouts, which are the continuations that the algorithm samples for its values."""
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
    """Predicted amounts and seconds of one iteration, and predicted iterations and memory of the run."""

    source: str
    """Text that says how the plan was computed: by a calibration or from a data sheet."""
    amounts: Amounts
    seconds: Mapping[str, float]
    """Phase (`sample`, `credit` or `update`) -> seconds of one iteration."""
    iterations: int
    """Number of iterations of the run."""
    memory: Mapping[str, float]
    """Kind of memory -> bytes; the key `peak` has the peak of the whole run."""
    available: float
    """Available memory in bytes; 0 if unknown."""
    variants: Sequence[tuple[str, float, float]]
    """List of (changed setting, MC tokens, seconds): the cost of one iteration if one setting is changed."""

    @property
    def seconds_per_iteration(self) -> float:
        """Seconds of one iteration, summed over all phases."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary that can be written as JSON."""
        return {**asdict(self), "seconds_per_iteration": self.seconds_per_iteration}


def guessed_amounts(config: Config, response_tokens: int | None) -> Amounts:
    """Estimate amounts without a calibration.

    The estimate assumes prompts of 120 tokens, steps of 30 tokens, and responses of `response_tokens` tokens. If
    `response_tokens` is None, responses have a third of `rollouts.max_new_tokens` tokens.
    """
    settings = config.rollouts
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

    The limits are iterations, updates, tokens and seconds. Tokens and seconds are predicted by `amounts` and `seconds`.
    """
    limits = [config.run.iterations, -(-total_updates(config) // amounts.updates)]
    if config.run.max_tokens:
        limits.append(math.ceil(config.run.max_tokens / (amounts.rollout_tokens + amounts.mc_tokens)))
    if config.run.max_seconds:
        limits.append(math.ceil(config.run.max_seconds / sum(seconds.values())))
    return min(limits)
