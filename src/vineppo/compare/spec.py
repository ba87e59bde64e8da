"""What a comparison runs: recipe, algorithms, seeds, budget."""

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


_ENDLESS_ITERATIONS = "1000000"
"""So that the budget ends a run, never the recipe's number of iterations."""


class Budget(NamedTuple):
    """How much training every run gets."""

    kind: str
    """`updates` (optimizer updates), `tokens` (generated for training, MC rollouts included) or `seconds` (of training,
    evaluation not counted)."""
    amount: float

    def __str__(self) -> str:
        """As on the command line: `updates=96`."""
        return f"{self.kind}={self.amount:.15g}"


def parse_budget(text: str) -> Budget:
    """The budget written as `updates=N`, `tokens=N` or `seconds=N`.

    Raises:
        UserError: if the text has another form, or the amount is not above 0 (and whole, but for seconds).
    """
    kind, _, amount_text = text.partition("=")
    advice = "write --budget updates=N, tokens=N or seconds=N"
    if kind not in _BUDGET_KEYS:
        raise UserError(f"budget is {text!r}; {advice}")
    try:
        amount = float(amount_text)
    except ValueError:
        raise UserError(f"budget {text!r} has {amount_text!r} where a number belongs; {advice}") from None
    return _checked_budget(Budget(kind, amount))


def _checked_budget(budget: Budget) -> Budget:
    kind, amount = budget
    if kind not in _BUDGET_KEYS:
        raise UserError(f"budget kind is {kind!r}; allowed: {', '.join(_BUDGET_KEYS)}")
    if not (math.isfinite(amount) and amount > 0):
        raise UserError(f"budget {kind}={amount:g} is not a finite number above 0; give every run some training")
    if kind != "seconds" and amount != int(amount):
        raise UserError(f"budget {kind}={amount:g} is not a whole number; {kind} are counted in ones")
    return Budget(kind, float(amount))


def settings_of_budget(budget: Budget) -> dict[str, str]:
    """The settings of a run, key -> text, that make the budget what ends it."""
    limits = {key: f"{budget.amount:.15g}" if kind == budget.kind else "0" for kind, key in _BUDGET_KEYS.items()}
    return {"run.iterations": _ENDLESS_ITERATIONS, **limits}


@dataclass(frozen=True)
class CompareSpec:
    """What a comparison runs."""

    recipe: str
    """Name of a recipe, or path of a YAML file; every run trains with it."""
    algorithms: tuple[str, ...] = COMPARED
    """Compared algorithms as in the setting `algorithm`, each once; the tables keep this order. The first is compared
    with the others; the tables say when each algorithm reaches the best accuracy of the second."""
    seeds: int = 5
    """Number of runs per algorithm, with run.seed 0, 1, ..., seeds - 1."""
    budget: Budget = Budget("updates", 96)  # noqa: RUF009 (a named tuple is immutable)
    """What every run may use."""
    out: str = ""
    """Directory of the comparison: runs, logs, tables, plots. An existing comparison is continued."""
    jobs: int = 1
    """Runs at the same time. More than 1 shares the processor, and with it the meaning of seconds."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Further settings by dotted key, the same for all runs; those of an algorithm apply to its own runs."""

    def __post_init__(self) -> None:
        require(bool(self.recipe), "recipe is empty; name a recipe or a YAML file")
        require(bool(self.out), "out is empty; name the directory of the comparison with --out DIR")
        require(bool(self.algorithms), f"algorithms is empty; allowed: {', '.join(BUILT_IN)}, or module:object")
        names = [arm.name for arm in self.arms]
        doubled = sorted({name for name in names if names.count(name) > 1})
        require(not doubled, f"algorithms has {', '.join(doubled)} more than once; name each once")
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be at least 1")
        require(self.jobs >= 1, f"jobs is {self.jobs}; it must be at least 1")
        _checked_budget(self.budget)
        ours = ("algorithm", "run.dir", "run.seed", *settings_of_budget(self.budget))
        for key in self.overrides:
            require(key not in ours, f"override {key} is set by compare itself; use --algorithms, --seeds, --budget")
            section = key.split(".")[0]
            require(
                section in names or section not in BUILT_IN,
                f"{key} is a setting of {section}, which is not compared; leave it out, or add it to --algorithms",
            )

    @property
    def arms(self) -> tuple[Algorithm, ...]:
        """The compared algorithms."""
        return tuple(find_algorithm(spec) for spec in self.algorithms)

    def overrides_of(self, algorithm: Algorithm) -> dict[str, str]:
        """The overrides without the settings of the other algorithms."""
        foreign = {arm.name for arm in self.arms} - {algorithm.name}
        return {key: value for key, value in self.overrides.items() if key.split(".")[0] not in foreign}

    def identity(self) -> dict[str, Any]:
        """What must stay the same when a comparison is continued; algorithms, seeds and jobs may change."""
        return {
            "recipe": self.recipe,
            "recipe_sha256": _recipe_digest(self.recipe),
            "budget": str(self.budget),
            "overrides": [f"--{key}={value}" for key, value in self.overrides.items()],
        }


def _recipe_digest(recipe: str) -> str | None:
    """Hash of the recipe's text, so that a recipe edited half-way is noticed; None where there is no such file."""
    packaged = Path(__file__).parents[1] / "recipes" / f"{recipe}.yaml"
    for path in (packaged, Path(recipe)):
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def check_same_comparison(recorded: dict[str, Any] | None, spec: CompareSpec, out: Path) -> None:
    """Refuse to mix runs of different settings in one directory.

    Raises:
        UserError: naming the first setting that differs from the recorded one.
    """
    wanted = spec.identity()
    for key in wanted if recorded is not None else ():
        old, new = (recorded or {}).get(key), wanted[key]
        if old == new:
            continue
        what = f"{key} {_show(old)}, not {_show(new)}"
        if key == "recipe_sha256":
            what = f"an earlier text of recipe {spec.recipe}"
        raise UserError(f"--out {out} holds a comparison with {what}; name another --out, or go back to that setting")


def _show(value: Any) -> str:
    return (" ".join(map(str, value)) or "(none)") if isinstance(value, list) else str(value)
