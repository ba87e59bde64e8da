"""Define and check the settings of a comparison: recipe, arms, seeds, budget and others."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vineppo.config.settings import require
from vineppo.credit import BASELINES, BUILT_IN, COMPARED, find_algorithm
from vineppo.credit.algorithm import Algorithm
from vineppo.types import UserError

_BUDGET_KEYS = {"updates": "run.max_updates", "tokens": "run.max_tokens", "seconds": "run.max_seconds"}
"""Kind of budget -> the setting that limits a run in this way."""

_ENDLESS_ITERATIONS = "1000000"
"""Value of `run.iterations` for all runs. It is so large that the budget always ends a run first."""

_DEFAULTS = {"eval.greedy": "true"}
"""Settings of all runs of a comparison, unless the user sets them."""

_LONGEST_NAME = 100
"""Largest number of characters in the name of an arm."""

_MOST_SEEDS = 1000
"""Largest number of seeds of a comparison."""


class Budget(NamedTuple):
    """A limit that ends each run of a comparison, such as 96 updates."""

    kind: str
    """`updates` (optimizer updates), `tokens` (tokens generated for training, including MC rollouts) or `seconds`
    (seconds of training, without evaluation)."""
    amount: float
    """The limit: a whole number of updates or tokens, or a number of seconds."""

    def __str__(self) -> str:
        """Return the budget as it is written on the command line, for example `updates=96`."""
        return f"{self.kind}={self.amount:.15g}"


def parse_budget(text: str) -> Budget:
    """Parse a budget that is written as `updates=N`, `tokens=N` or `seconds=N`.

    Raises:
        UserError: if the text has another form, the amount is not above 0, or updates or tokens are not whole numbers.
    """
    kind, _, amount_text = text.partition("=")
    advice = "write --budget updates=N, tokens=N or seconds=N"
    if kind not in _BUDGET_KEYS:
        raise UserError(f"budget is {text!r}; {advice}")
    try:
        amount = float(amount_text)
    except ValueError:
        raise UserError(f"budget is {text!r}, but {amount_text!r} is not a number; {advice}") from None
    return _checked_budget(Budget(kind, amount))


def _checked_budget(budget: Budget) -> Budget:
    """Check a budget, and return it with the amount as a float.

    Raises:
        UserError: if the kind is unknown, the amount is not above 0, or updates or tokens are not whole numbers.
    """
    kind, amount = budget
    if kind not in _BUDGET_KEYS:
        raise UserError(f"budget kind is {kind!r}; allowed: {', '.join(_BUDGET_KEYS)}")
    if not (math.isfinite(amount) and amount > 0):
        raise UserError(f"budget is {kind}={amount:g}; it must be a finite number above 0")
    if kind != "seconds" and amount != int(amount):
        raise UserError(f"budget is {kind}={amount:g}; the number of {kind} must be a whole number")
    return Budget(kind, float(amount))


def settings_of_budget(budget: Budget) -> dict[str, str]:
    """Return the settings (dotted key -> text) that make the budget the only limit of a run."""
    limits = {key: f"{budget.amount:.15g}" if kind == budget.kind else "0" for kind, key in _BUDGET_KEYS.items()}
    return {"run.iterations": _ENDLESS_ITERATIONS, **limits}


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds for a number of seeds (`5` is 0 to 4), or for a list of seeds and ranges (`3,7,9`, `100-104`).

    Raises:
        UserError: if the text has another form, a seed occurs twice, or there are no seeds or more than 1000.
    """
    advice = "it must be a number of seeds such as 5, a list such as 3,7,9, or a range such as 100-104"
    parts = [re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise UserError(f"--seeds is {text!r}; {advice}")
    if len(parts) == 1 and parts[0] and parts[0][2] is None:
        spans = [range(int(parts[0][1]))]
        require(bool(spans[0]), "seeds is 0; it must be at least 1")
    else:
        spans = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part]
    require(all(spans), f"--seeds is {text!r}, where a range ends before it begins; {advice}")
    count = sum(map(len, spans))
    require(count <= _MOST_SEEDS, f"--seeds is {text!r}, which are {count} seeds; at most {_MOST_SEEDS} are allowed")
    seeds = tuple(seed for span in spans for seed in span)
    require(len(set(seeds)) == len(seeds), f"--seeds is {text!r}, where a seed occurs twice; list each seed once")
    return seeds


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: an algorithm with settings. All arms use the recipe of the comparison."""

    name: str
    """Name in tables and run directories, such as `grpo320`. No two arms of a comparison have the same name."""
    algorithm: str
    """Value of the setting `algorithm`: the name of a built-in algorithm, or `module:object`."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Settings of this arm: dotted key -> text. They win over those that all arms share."""
    cells: int | None = None
    """Number of combinations of settings among which the settings of this arm were chosen, or None if unknown."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=+-]*", self.name) is not None and len(self.name) <= _LONGEST_NAME,
            f"the name of an arm is {self.name!r}; it must begin with a letter or digit and contain at most "
            f"{_LONGEST_NAME} letters, digits, and the characters . _ = + -, because it names directories",
        )
        require(
            self.cells is None or self.cells >= 1, f"cells of arm {self.name} is {self.cells}; it must be at least 1"
        )

    @functools.cached_property
    def method(self) -> Algorithm:
        """The algorithm as an object.

        Raises:
            UserError: if there is no such algorithm.
        """
        return find_algorithm(self.algorithm)

    @property
    def label(self) -> str:
        """Name in plots and sentences: that of the algorithm, with the name of the arm if it is another one."""
        own = self.method.name
        if self.name == own:
            return self.method.label
        # The name of an arm of a sweep begins with the name of its algorithm, which need not be repeated.
        return f"{self.method.label} ({self.name.removeprefix(f'{own}-')})"

    @property
    def colour(self) -> str:
        """Colour of the algorithm, or empty. The plots give later arms of the same algorithm other colours."""
        return self.method.colour


def arms_of(algorithms: Iterable[str]) -> tuple[Arm, ...]:
    """Return one arm per algorithm, without settings of its own, with the name of the algorithm.

    Args:
        algorithms: values of the setting `algorithm`.
    Raises:
        UserError: if there is no such algorithm.
    """
    return tuple(Arm(find_algorithm(spec).name, spec) for spec in algorithms)


def check_keys(shared: Mapping[str, str], arms: Sequence[Arm], reserved: Collection[str], command: str) -> None:
    """Check the names of settings before any value is read.

    Args:
        shared: settings of all arms.
        reserved: settings that the command chooses for every run.
        command: `compare` or `tune`, for the messages.
    Raises:
        UserError: for a setting that the command chooses, or a shared one of a built-in algorithm without an arm.
    """
    for key in (*shared, *(key for arm in arms for key in arm.overrides)):
        require(
            key not in reserved,
            f"{key} is set by `vineppo {command}`; use --algorithms, --seeds, --budget or --out instead",
        )
    algorithms = {arm.method.name for arm in arms}
    for key in shared:
        section = key.split(".")[0]
        require(
            section in algorithms or section not in BUILT_IN,
            f"{key} is a setting of {section}, which is not {command}d; remove it, or add {section} to --algorithms",
        )


def shared_settings(shared: Mapping[str, str], arm: Arm, arms: Sequence[Arm]) -> dict[str, str]:
    """Return the settings of all arms that apply to one of them: without the sections of the others' algorithms."""
    others = {other.method.name for other in arms} - {arm.method.name}
    return {key: value for key, value in shared.items() if key.split(".")[0] not in others}


@dataclass(frozen=True)
class CompareSpec:
    """The settings of a comparison."""

    recipe: str
    """Name of the recipe that all runs use, or path of its YAML file."""
    arms: tuple[Arm, ...] = ()
    """The compared arms, in the order of the tables. The first arm is compared with the second one and with the best of
    all others. The second arm is the reference: the tables show when each arm reaches the best accuracy of the
    reference. Empty: one arm for each algorithm of `COMPARED`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs of every arm."""
    budget: Budget = Budget("updates", 96)  # noqa: RUF009 (a named tuple is immutable)
    """Limit of each run."""
    out: str = ""
    """Directory for runs, logs, tables and plots. If it contains a comparison, that comparison is continued."""
    jobs: int = 1
    """Number of runs that train at the same time. Above 1, the runs share the processor, so their measured seconds are
    less reliable."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Settings that all arms share: dotted key -> text. A setting in the section of an algorithm, such as
    `vineppo.splitter`, applies only to the arms of this algorithm."""
    baselines: tuple[str, ...] = ()
    """Names of the arms that are baselines. Empty: all arms whose algorithm is one of `BASELINES`."""

    def __post_init__(self) -> None:
        require(bool(self.recipe), "recipe is empty; give the name of a recipe or a YAML file")
        require(bool(self.out), "out is empty; give the directory of the comparison with --out DIR")
        if not self.arms:
            object.__setattr__(self, "arms", arms_of(COMPARED))
        names = [arm.name.casefold() for arm in self.arms]  # some file systems ignore the case of letters
        duplicates = sorted({arm.name for arm in self.arms if names.count(arm.name.casefold()) > 1})
        require(
            not duplicates,
            f"the comparison contains {', '.join(duplicates)} more than once; list each algorithm once, and give every "
            "arm a name of its own",
        )
        require(bool(self.seeds), "seeds is empty; give at least one seed")
        require(self.jobs >= 1, f"jobs is {self.jobs}; it must be at least 1")
        _checked_budget(self.budget)
        unknown = [name for name in self.baselines if name not in {arm.name for arm in self.arms}]
        require(
            not unknown,
            f"baselines has {', '.join(unknown)}, which is not compared; arms: {', '.join(a.name for a in self.arms)}",
        )
        repeated = sorted({name for name in self.baselines if self.baselines.count(name) > 1})
        require(not repeated, f"baselines has {', '.join(repeated)} more than once; name each baseline once")
        check_keys(self.overrides, self.arms, self.reserved, "compare")

    @property
    def reserved(self) -> tuple[str, ...]:
        """Settings that the comparison chooses for every run."""
        return ("algorithm", "run.dir", "run.seed", *settings_of_budget(self.budget))

    @property
    def baseline_names(self) -> tuple[str, ...]:
        """Names of the arms that are baselines: `baselines`, or those whose algorithm is one of `BASELINES`."""
        return self.baselines or tuple(arm.name for arm in self.arms if arm.method.name in BASELINES)

    def settings_of(self, arm: Arm) -> dict[str, str]:
        """Return the settings of the runs of an arm, without those of the budget: dotted key -> text.

        From lowest to highest priority: greedy evaluation, the shared settings (without the sections of other
        algorithms), the arm's own settings.
        """
        return {**_DEFAULTS, **shared_settings(self.overrides, arm, self.arms), **arm.overrides}

    def identity(self) -> dict[str, Any]:
        """Return the settings that must stay the same when a comparison is continued, as a dictionary for JSON.

        Seeds, jobs and baselines are not included, because they may change. The settings of an arm must stay the same,
        but arms may be added or left out.
        """
        return identity_of(self.recipe, self.overrides, self.arms) | {"budget": str(self.budget)}


def identity_of(recipe: str, overrides: Mapping[str, str], arms: Sequence[Arm]) -> dict[str, Any]:
    """Return the recipe, the shared settings and the arms of a comparison or tuning, as a dictionary for JSON."""
    return {
        "recipe": recipe,
        "recipe_sha256": _recipe_digest(recipe),
        "overrides": _options(overrides),
        "arms": {arm.name: [f"--algorithm={arm.algorithm}", *_options(arm.overrides)] for arm in arms},
    }


def _options(overrides: Mapping[str, str]) -> list[str]:
    """Return settings as options of a command line."""
    return [f"--{key}={value}" for key, value in overrides.items()]


def _recipe_digest(recipe: str) -> str | None:
    """Return the SHA-256 hash of a recipe file as hexadecimal digits, or None if there is no such file.

    The hash is recorded in order to detect later changes of the recipe.

    Args:
        recipe: name of a recipe of the package, or path of a YAML file.
    """
    packaged = Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml"
    for path in (packaged, Path(recipe)):
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def check_same(recorded: dict[str, Any] | None, identity: dict[str, Any], out: Path, what: str) -> dict[str, Any]:
    """Check that the comparison or tuning in a directory has the same settings as the one to run.

    Args:
        recorded: its settings as they were written to the directory, or None if there are none.
        identity: those of the one to run, from `identity_of`.
        out: the directory, which the error message names.
        what: `comparison` or `tuning`, for the error message.
    Returns:
        The new record: `identity`, with the recorded arms that it leaves out.
    Raises:
        UserError: if a setting differs. The message names the first setting that differs.
    """
    known = (recorded or {}).get("arms") or {}
    pairs = {key: ((recorded or {}).get(key), identity[key]) for key in identity if key != "arms"}
    pairs = pairs if recorded is not None else {}
    # The order of an arm's settings has no meaning.
    arms = identity["arms"].items()
    pairs |= {f"arm {name}": (sorted(known[name]), sorted(new)) for name, new in arms if name in known}
    for key, (old, new) in pairs.items():
        if old == new:
            continue
        difference = f"{key} {_format_value(old)}, not {_format_value(new)}"
        if key == "recipe_sha256":
            difference = f"another version of recipe {identity['recipe']}"
        raise UserError(
            f"--out {out} contains a {what} with {difference}; choose another --out, or restore that setting"
        )
    return {**identity, "arms": {**known, **identity["arms"]}}


def _format_value(value: Any) -> str:
    """Format a setting for an error message. A list becomes its items separated by spaces."""
    return (" ".join(map(str, value)) or "(none)") if isinstance(value, list) else str(value)
