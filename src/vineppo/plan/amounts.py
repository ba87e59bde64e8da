"""The amounts of one iteration (rollouts, tokens, updates) and the plan of a run."""

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
    """Amounts of one iteration."""

    rollouts: int
    rollout_tokens: float
    prompt_tokens: float
    """Mean length of a prompt."""
    mc_tokens: float
    steps_per_response: float
    updates: int

    @property
    def sequence_tokens(self) -> float:
        """Mean length of a prompt and its response."""
        return self.prompt_tokens + self.rollout_tokens / self.rollouts


@dataclass(frozen=True)
class Plan:
    """The predicted amounts, seconds and memory of a run."""

    source: str
    """How the figures were obtained."""
    amounts: Amounts
    seconds: Mapping[str, float]
    """Seconds of one iteration by phase: sample, credit, update."""
    iterations: int
    memory: Mapping[str, float]
    """Bytes by kind, and `peak`."""
    available: float
    """Available memory in bytes; 0 if unknown."""
    variants: Sequence[tuple[str, float, float]]
    """(another setting, its MC tokens, its seconds) of one iteration."""

    @property
    def seconds_per_iteration(self) -> float:
        """Seconds of one iteration over all phases."""
        return sum(self.seconds.values())

    def as_dict(self) -> dict[str, Any]:
        """The plan as a dictionary for JSON."""
        return {**asdict(self), "seconds_per_iteration": self.seconds_per_iteration}


def guessed_amounts(config: Config, response_tokens: int | None) -> Amounts:
    """Estimate amounts without a calibration.

    Prompts have 120 tokens, steps 30 tokens, and responses `response_tokens`, or a third of the token budget if it is
    None.
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
    """Number of iterations until the run reaches its first limit."""
    limits = [config.run.iterations, -(-total_updates(config) // amounts.updates)]
    if config.run.max_tokens:
        limits.append(math.ceil(config.run.max_tokens / (amounts.rollout_tokens + amounts.mc_tokens)))
    if config.run.max_seconds:
        limits.append(math.ceil(config.run.max_seconds / sum(seconds.values())))
    return min(limits)
