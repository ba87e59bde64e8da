"""Define the class `Algorithm`, which describes an algorithm to the trainer, to comparisons and to reports."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vineppo.config.schema import Config, CriticConfig
from vineppo.config.settings import Settings, is_section
from vineppo.model.codec import Codec
from vineppo.types import CreditFn, Problem, Rollout, RolloutGroup, Sampler, Task

_RECIPE_KEYS = ("description", "overrides", "offline")
"""Keys of a recipe that are not settings. An algorithm must not have one of these names."""
PredictValues = Callable[[Sequence[Rollout]], list[list[float]]]
"""Function (rollouts) -> one list per rollout with an entry for each of its T response tokens, shape (T,). An entry is
the value network's prediction of the value of the state before the token, in reward units."""
SampleFn = Callable[[Sequence[Problem], int], list[RolloutGroup]]
"""Function (problems, number of the iteration) -> one group per problem, each with `group_size` graded rollouts."""


@dataclass(frozen=True)
class CreditParts:
    """The objects and settings of a run that an algorithm may use to compute credit. The model is not one of them."""

    sampler: Sampler
    """Samples completions from the current policy."""
    task: Task
    """Grades responses."""
    codec: Codec
    """Converts token ids to text and back."""
    predict_values: PredictValues
    """Function that returns the predictions of the value network. It raises UserError if the algorithm has no value
    network."""
    run_seed: int
    """Seed of the run, from which all other seeds are derived."""
    group_size: int
    """G, the number of rollouts per problem."""
    max_new_tokens: int
    """Maximum number of tokens of a response."""
    temperature: float
    """Sampling temperature of the rollouts."""
    stop: tuple[str, ...]
    """Strings that end a response as soon as the response contains one of them."""
    save_continuations: int = 0
    """Number of rollouts of an iteration whose continuations are returned in `TrainingSample.mc_rollouts`: the first
    ones that have any. For all others the continuations are not kept in memory."""


@dataclass(frozen=True)
class PlanHints:
    """Functions with which `vineppo plan` estimates the cost of an algorithm that samples MC rollouts.

    MC rollouts are continuations that are sampled from states to estimate the values of the states.
    """

    mc_tokens: Callable[[Any, int, int, float], float]
    """Function (settings of the algorithm, number of rollouts, steps per response, tokens per response) -> expected
    number of tokens in the MC rollouts of one iteration."""
    variants: Callable[[Any, Codec, Sequence[Rollout]], list[tuple[str, float]]]
    """Function (settings of the algorithm, codec, rollouts) -> list of (changed setting, relative cost). The changed
    setting is a text such as `vineppo.num_mc_rollouts 3`. The relative cost is the number of tokens in MC rollouts with
    this change, divided by the number without it."""


def _no_check(settings: Any, config: Config) -> None:
    """Accept all settings. This is the default of `Algorithm.check`."""


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: how it computes credit, its settings, its requirements, and its name in reports.

    Raises:
        ValueError: if the name cannot be the name of a section of the configuration, the label is not one line of text
            or begins with an underscore, the colour is not of the form `#RRGGBB`, a field that must be a function is
            not one, or `settings` has the wrong base class.
    """

    name: str
    """Identifier of the algorithm in run directories and tables. The section of the configuration with the algorithm's
    settings has the same name."""
    label: str
    """Name shown in reports, tables and plots."""
    build: Callable[[Any, CreditParts], CreditFn]
    """Function (settings of the algorithm, `CreditParts` of the run) -> credit function."""
    settings: type[Settings] = Settings
    """Class of the algorithm's settings. It must extend `CriticConfig` if `needs_critic` is true. The default class has
    no fields; the configuration then has no section for the algorithm."""
    needs_critic: bool = False
    """Whether a value network is trained in addition to the policy."""
    min_group_size: int = 1
    """Minimum number of rollouts per problem."""
    min_rollouts: int = 1
    """Minimum number of rollouts per iteration."""
    check: Callable[[Any, Config], None] = _no_check
    """Function (settings of the algorithm, whole configuration) -> None. It raises UserError if the settings cannot be
    combined with the configuration."""
    sample: Callable[[Any, CreditParts], SampleFn] | None = None
    """Function (settings of the algorithm, `CreditParts` of the run) -> function that samples the rollouts of an
    iteration, for example as a tree. If it is None, the trainer samples G independent rollouts per problem."""
    plan: PlanHints | None = None
    """Functions that estimate costs for `vineppo plan`; None if the algorithm samples no MC rollouts."""
    colour: str = ""
    """Colour of the algorithm's curves in plots, such as `#D55E00`. If it is empty, the plots use the next unused
    colour of their palette."""

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
    """Return whether a section of the configuration may have this name.

    The name must be an identifier without a leading underscore. It must not be an attribute of `Config` or a key of
    recipes.
    """
    if not isinstance(name, str):
        return False
    reserved = hasattr(Config, name) or name in Config.model_fields or name in _RECIPE_KEYS
    return name.isidentifier() and not name.startswith("_") and not reserved
