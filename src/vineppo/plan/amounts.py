"""What one iteration of a run does, and the plan of a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.training.configure import own_settings
from vineppo.training.parts import total_updates, updates_per_iteration


@dataclass(frozen=True)
class Amounts:
    """What one iteration does."""

    rollouts: int
    rollout_tokens: float
    prompt_tokens: float
    """Of one prompt."""
    mc_tokens: float
    steps_per_response: float
    updates: int

    @property
    def sequence_tokens(self) -> float:
        """Mean length of a prompt with its response."""
        return self.prompt_tokens + self.rollout_tokens / self.rollouts


@dataclass(frozen=True)
class Plan:
    """What a run will take."""

    source: str
    """How the figures were found."""
    amounts: Amounts
    seconds: Mapping[str, float]
    """Of one iteration, by phase: sample, credit, update."""
    iterations: int
    memory: Mapping[str, float]
    """Bytes by kind, and `peak`."""
    available: float
    """Bytes; 0 where unknown."""
    variants: Sequence[tuple[str, float, float]]
    """(what else one could do, tokens of continuations, seconds) of one iteration."""

    @property
    def seconds_per_iteration(self) -> float:
        """All phases."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "seconds_per_iteration": self.seconds_per_iteration}


def guessed_amounts(config: Config, response_tokens: int | None) -> Amounts:
    """Amounts without a calibration: responses of a third of the budget unless given, steps of 30 tokens."""
    own = config.rollouts
    length = response_tokens or max(1, own.max_new_tokens // 3)
    rollouts = own.num_problems * own.group_size
    steps = max(1, length // 30)
    algorithm = find_algorithm(config.algorithm)
    mc_tokens = 0.0
    if algorithm.plan:
        mc_tokens = algorithm.plan.mc_tokens(own_settings(config, algorithm), rollouts, steps, length)
    return Amounts(rollouts, rollouts * length, 120.0, mc_tokens, steps, updates_per_iteration(config))


def iterations(config: Config, amounts: Amounts, seconds: Mapping[str, float]) -> int:
    """Until the first limit."""
    limits = [config.run.iterations, -(-total_updates(config) // amounts.updates)]
    if config.run.max_tokens:
        limits.append(math.ceil(config.run.max_tokens / (amounts.rollout_tokens + amounts.mc_tokens)))
    if config.run.max_seconds:
        limits.append(math.ceil(config.run.max_seconds / sum(seconds.values())))
    return min(limits)
