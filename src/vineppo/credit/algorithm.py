"""The class `Algorithm`, which holds what the trainer, comparisons and reports need from an algorithm."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vineppo.config.schema import Config, CriticConfig
from vineppo.config.settings import Settings, is_section
from vineppo.model.codec import Codec
from vineppo.types import CreditFn, Problem, Rollout, RolloutGroup, Sampler, Task

_RECIPE_KEYS = ("description", "overrides")
PredictValues = Callable[[Sequence[Rollout]], list[list[float]]]
"""(rollouts) -> one list of shape (T,) per rollout, with the value network's value of the state before each token."""
SampleFn = Callable[[Sequence[Problem], int], list[RolloutGroup]]
"""(problems, iteration) -> one group of `group_size` graded rollouts per problem."""


@dataclass(frozen=True)
class CreditParts:
    """The objects that an algorithm may use to compute credit. The model is not one of them."""

    sampler: Sampler
    """Samples completions from the current policy."""
    task: Task
    """Grades responses."""
    codec: Codec
    """Converts token ids to text and back."""
    predict_values: PredictValues
    """Returns the predictions of the value network. Raises UserError if the algorithm has no value network."""
    run_seed: int
    """Seed of the run, from which all other seeds are derived."""
    group_size: int
    """G, the number of rollouts per problem."""
    max_new_tokens: int
    """Maximum number of tokens of a response."""
    temperature: float
    """Sampling temperature of the rollouts."""
    stop: tuple[str, ...]
    """Strings that end a response."""


@dataclass(frozen=True)
class PlanHints:
    """Functions with which `vineppo plan` estimates the cost of an algorithm that samples MC rollouts."""

    mc_tokens: Callable[[Any, int, int, float], float]
    """(settings, rollouts, steps per response, tokens per response) -> expected number of MC tokens per iteration."""
    variants: Callable[[Any, Codec, Sequence[Rollout]], list[tuple[str, float]]]
    """(settings, codec, rollouts) -> list of (other setting, its number of MC tokens relative to `settings`)."""


def _no_check(settings: Any, config: Config) -> None:
    """Accept all settings."""


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: its credit function, its settings and its requirements.

    Raises:
        ValueError: if the name cannot be a section of the configuration, the label is empty, the colour is not of the
            form `#RRGGBB`, `build` cannot be called, or `settings` has the wrong base class.
    """

    name: str
    """Identifier. It is the name of the algorithm's section in the configuration, and is used in run directories and
    tables."""
    label: str
    """Name shown in reports, tables and plots."""
    build: Callable[[Any, CreditParts], CreditFn]
    """(settings, parts) -> the credit function."""
    settings: type[Settings] = Settings
    """Class of the algorithm's settings. It must extend `CriticConfig` if `needs_critic` is true. The default class has
    no fields, and the configuration then has no section for the algorithm."""
    needs_critic: bool = False
    """Whether a value network is trained in addition to the policy."""
    min_group_size: int = 1
    """Minimum number of rollouts per problem."""
    min_rollouts: int = 1
    """Minimum number of rollouts per iteration."""
    check: Callable[[Any, Config], None] = _no_check
    """(settings of the algorithm, whole configuration) -> None. Raises UserError if they cannot be combined."""
    sample: Callable[[Any, CreditParts], SampleFn] | None = None
    """(settings, parts) -> function that samples the rollouts of an iteration, for example as a tree. None means that G
    independent rollouts are sampled per problem."""
    plan: PlanHints | None = None
    """Functions that estimate costs for `vineppo plan`; None if the algorithm samples no MC rollouts."""
    colour: str = ""
    """Colour of the algorithm's curves, such as `#D55E00`. If empty, the next unused colour of the palette is used."""

    def __post_init__(self) -> None:
        if not _can_be_a_section(self.name):
            reserved = ", ".join([*Config.model_fields, *_RECIPE_KEYS])
            raise ValueError(
                f"algorithm name {self.name!r}: it must be an identifier without a leading underscore that is not "
                f"reserved ({reserved}, and the attributes of Config)"
            )
        if not isinstance(self.label, str) or not self.label.strip() or "\n" in self.label or self.label[0] == "_":
            raise ValueError(
                f"algorithm {self.name}: label is {self.label!r}; it must be a text of one line that is not empty and "
                "does not start with an underscore"
            )
        if not isinstance(self.colour, str) or not re.fullmatch(r"(#[0-9a-fA-F]{6})?", self.colour):
            raise ValueError(
                f"algorithm {self.name}: colour is {self.colour!r}; it must be of the form #RRGGBB, or empty"
            )
        for name in ("build", "check", "sample"):
            function = getattr(self, name)
            if not callable(function) and not (name == "sample" and function is None):
                raise ValueError(f"algorithm {self.name}: {name} is {function!r}; it must be a function")
        base = CriticConfig if self.needs_critic else Settings
        if not is_section(self.settings) or not issubclass(self.settings, base):
            why = " because needs_critic is true" if self.needs_critic else ""
            raise ValueError(f"algorithm {self.name}: settings must be a subclass of {base.__name__}{why}")


def _can_be_a_section(name: object) -> bool:
    if not isinstance(name, str):
        return False
    reserved = hasattr(Config, name) or name in Config.model_fields or name in _RECIPE_KEYS
    return name.isidentifier() and not name.startswith("_") and not reserved
