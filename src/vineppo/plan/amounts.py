"""What one iteration of a run does, and the plan of a whole run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.training.parts import total_updates, updates_per_iteration

_REUSE_SHARE = 0.3
"""Of the tokens of K fresh continuations that `vineppo.reuse` needs, as measured on the embedded task."""


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
    """Without a calibration: responses of a third of the budget, unless told otherwise, in steps of 30 tokens."""
    own = config.rollouts
    length = response_tokens or max(1, own.max_new_tokens // 3)
    rollouts = own.num_problems * own.group_size
    steps = min(max(1, length // 30), config.vineppo.max_states or length)
    mc_tokens = 0.0
    if config.algorithm == "vineppo":
        # K continuations of S states, half a response long each; with reuse those of a state serve the next ones too.
        share = _REUSE_SHARE if config.vineppo.reuse else 1.0
        mc_tokens = rollouts * config.vineppo.num_mc_rollouts * steps * length / 2 * share
    return Amounts(rollouts, rollouts * length, 120.0, mc_tokens, steps, updates_per_iteration(config))


def iterations(config: Config, amounts: Amounts, seconds: Mapping[str, float]) -> int:
    """Until the first limit."""
    limits = [config.run.iterations, -(-total_updates(config) // amounts.updates)]
    if config.run.max_tokens:
        limits.append(math.ceil(config.run.max_tokens / (amounts.rollout_tokens + amounts.mc_tokens)))
    if config.run.max_seconds:
        limits.append(math.ceil(config.run.max_seconds / sum(seconds.values())))
    return min(limits)
