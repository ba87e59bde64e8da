"""What an algorithm is: everything that the trainer, comparisons, plans and reports ask of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vineppo.config.schema import Config, CriticConfig
from vineppo.config.settings import Settings
from vineppo.model.codec import Codec
from vineppo.types import CreditFn, Problem, Rollout, RolloutGroup, Sampler, Task

PredictValues = Callable[[Sequence[Rollout]], list[list[float]]]
"""The value network's prediction before each response token: one list of shape (T,) per rollout."""
SampleFn = Callable[[Sequence[Problem], int], list[RolloutGroup]]
"""(problems, iteration) -> one group of graded rollouts per problem, each with `group_size` rollouts."""


@dataclass(frozen=True)
class CreditParts:
    """What an algorithm may use to compute credit. Never the model."""

    sampler: Sampler
    """Samples completions from the current policy."""
    task: Task
    """Grades responses."""
    codec: Codec
    """Converts token ids to text and back."""
    predict_values: PredictValues
    """Raises where the algorithm has no value network."""
    run_seed: int
    group_size: int
    """G: rollouts per problem."""
    max_new_tokens: int
    """Response budget in tokens."""
    temperature: float
    """Sampling temperature of the rollouts."""
    stop: tuple[str, ...]
    """Strings that end a response."""


@dataclass(frozen=True)
class PlanHints:
    """What `vineppo plan` asks an algorithm that samples MC rollouts."""

    mc_tokens: Callable[[Any, int, int, float], float]
    """(settings, rollouts, steps per response, tokens per response) -> expected MC tokens of an iteration."""
    variants: Callable[[Any, Codec, Sequence[Rollout]], list[tuple[str, float]]]
    """(settings, codec, rollouts) -> (other settings, their MC tokens relative to these settings)."""


def _no_check(settings: Any, config: Config) -> None:
    """No combination of settings is refused."""


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: how it computes credit, and what it needs for that.

    Raises:
        ValueError: for a name that cannot be a section of the configuration, or a critic without its settings.
    """

    name: str
    """Name of the section with its settings, in run directories and in tables; an identifier."""
    label: str
    """Name for people: in reports, tables and plots."""
    build: Callable[[Any, CreditParts], CreditFn]
    """(settings, parts) -> the credit function."""
    settings: type[Settings] = Settings
    """Its own settings; without fields there is no section. With a critic they extend `CriticConfig`."""
    needs_critic: bool = False
    """Whether a value network is trained beside the policy."""
    min_group_size: int = 1
    """Smallest number of rollouts per problem."""
    min_rollouts: int = 1
    """Smallest number of rollouts per iteration."""
    check: Callable[[Any, Config], None] = _no_check
    """(its settings, all settings): raises UserError for combinations that cannot work."""
    sample: Callable[[Any, CreditParts], SampleFn] | None = None
    """(settings, parts) -> its own way to sample rollouts, such as a tree; None: G independent ones per problem."""
    plan: PlanHints | None = None
    """None: it samples no MC rollouts."""
    colour: str = ""
    """Colour of its curves, such as `#D55E00`; empty: the next unused one of the palette."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in Config.model_fields:
            taken = ", ".join(Config.model_fields)
            raise ValueError(f"algorithm name {self.name!r}: it must be an identifier other than {taken}")
        if self.needs_critic and not issubclass(self.settings, CriticConfig):
            raise ValueError(f"algorithm {self.name} needs a critic, so its settings must extend CriticConfig")
