"""Define and check the settings of a comparison: recipe, algorithms, seeds, budget and others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vineppo.config.settings import require
from vineppo.credit import BUILT_IN, COMPARED, find_algorithm
from vineppo.credit.algorithm import Algorithm
from vineppo.types import UserError

_BUDGET_KEYS = {"updates": "run.max_updates", "tokens": "run.max_tokens", "seconds": "run.max_seconds"}
"""Kind of budget -> the setting that limits a run in this way."""

_ENDLESS_ITERATIONS = "1000000"
"""Value of `run.iterations` for all runs. It is so large that the budget always ends a run first."""


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


@dataclass(frozen=True)
class CompareSpec:
    """The settings of a comparison."""

    recipe: str
    """Name of the recipe that all runs use, or path of its YAML file."""
    algorithms: tuple[str, ...] = COMPARED
    """The algorithms to compare, as values of the setting `algorithm`, without duplicates, in the order of the tables.
    The first algorithm is compared with the second one and with the best of all others. The second algorithm is the
    reference: the tables show when each algorithm reaches the best accuracy of the reference."""
    seeds: int = 5
    """Number of runs per algorithm. The runs have the seeds 0, 1, ..., seeds - 1."""
    budget: Budget = Budget("updates", 96)  # noqa: RUF009 (a named tuple is immutable)
    """Limit of each run."""
    out: str = ""
    """Directory for runs, logs, tables and plots. If it contains a comparison, that comparison is continued."""
    jobs: int = 1
    """Number of runs that train at the same time. Above 1, the runs share the processor, so their measured seconds are
    less reliable."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Other settings of the runs: dotted key -> text. They apply to all runs, except that a setting in the section of
    an algorithm, such as `vineppo.splitter`, applies only to the runs of this algorithm."""

    def __post_init__(self) -> None:
        require(bool(self.recipe), "recipe is empty; give the name of a recipe or a YAML file")
        require(bool(self.out), "out is empty; give the directory of the comparison with --out DIR")
        require(bool(self.algorithms), f"algorithms is empty; allowed: {', '.join(BUILT_IN)}, or module:object")
        names = [arm.name for arm in self.arms]
        duplicates = sorted({name for name in names if names.count(name) > 1})
        require(not duplicates, f"algorithms contains {', '.join(duplicates)} more than once; list each algorithm once")
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        require(self.jobs >= 1, f"jobs is {self.jobs}; it must be at least 1")
        _checked_budget(self.budget)
        reserved = ("algorithm", "run.dir", "run.seed", *settings_of_budget(self.budget))
        for key in self.overrides:
            require(
                key not in reserved,
                f"{key} is set by `vineppo compare`; use --algorithms, --seeds, --budget or --out instead",
            )
            section = key.split(".")[0]
            require(
                section in names or section not in BUILT_IN,
                f"{key} is a setting of {section}, which is not compared; remove it, or add {section} to --algorithms",
            )

    @property
    def arms(self) -> tuple[Algorithm, ...]:
        """The algorithms to compare, as objects, in the order of `algorithms`."""
        return tuple(find_algorithm(spec) for spec in self.algorithms)

    def overrides_of(self, algorithm: Algorithm) -> dict[str, str]:
        """Return the overrides for the runs of one algorithm, without the sections of the other algorithms."""
        others = {arm.name for arm in self.arms} - {algorithm.name}
        return {key: value for key, value in self.overrides.items() if key.split(".")[0] not in others}

    def identity(self) -> dict[str, Any]:
        """Return the settings that must stay the same when a comparison is continued, as a dictionary for JSON.

        Algorithms, seeds and jobs are not included, because they may change.
        """
        return {
            "recipe": self.recipe,
            "recipe_sha256": _recipe_digest(self.recipe),
            "budget": str(self.budget),
            "overrides": [f"--{key}={value}" for key, value in self.overrides.items()],
        }


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


def check_same_comparison(recorded: dict[str, Any] | None, spec: CompareSpec, out: Path) -> None:
    """Check that the comparison in a directory has the same settings as `spec`.

    Args:
        recorded: content of `compare-spec.json` in the directory, or None if the file is missing.
        spec: settings of the comparison to run.
        out: the directory, which the error message names.
    Raises:
        UserError: if a setting differs. The message names the first setting that differs.
    """
    identity = spec.identity()
    for key in identity if recorded is not None else ():
        old, new = (recorded or {}).get(key), identity[key]
        if old == new:
            continue
        difference = f"{key} {_format_value(old)}, not {_format_value(new)}"
        if key == "recipe_sha256":
            difference = f"another version of recipe {spec.recipe}"
        raise UserError(
            f"--out {out} contains a comparison with {difference}; choose another --out, or restore that setting"
        )


def _format_value(value: Any) -> str:
    """Format a setting for an error message. A list becomes its items separated by spaces."""
    return (" ".join(map(str, value)) or "(none)") if isinstance(value, list) else str(value)
