"""Tune several algorithms with equal care, for the command `vineppo tune`: successive halving by generated tokens.

A *cell* is one combination of settings of an algorithm. On the first *rung*, all cells train to a small budget. The
best half goes on to twice the budget, and so on. The runs of a cell differ in their seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from vineppo.compare.curves import align, first_reach
from vineppo.compare.directory import exclusive_lock, open_directory
from vineppo.compare.records import Evaluation, RunRecord, evaluations_of
from vineppo.compare.runs import Action, PlannedRun, outcome_of_missing, print_line, run_all, run_state
from vineppo.compare.spec import Arm, Budget, check_keys, identity_of, settings_of_budget, shared_settings
from vineppo.config.settings import require
from vineppo.run.directory import RunDirectory
from vineppo.run.files import write_text

_FIXED = {"run.save_rollouts": "false", "run.checkpoint_every": "0", "eval.final_num_problems": "0"}
"""Settings of all runs: no files except metrics and one checkpoint, and no evaluation except during training."""
_NOT_TUNED = ("eval", "run")
"""Sections of shared settings that are not written to arms.yaml, because they do not change the training."""


@dataclass(frozen=True)
class TuneSpec:
    """What is tuned, and how."""

    recipe: str
    """Name of the recipe that all runs use, or path of its YAML file."""
    cells: Mapping[str, Sequence[Arm]]
    """Name of an algorithm -> its cells, at least one."""
    budget: int
    """Generated tokens of a run on the last rung."""
    out: str
    """Directory for runs, logs and results. If it contains a tuning, that tuning is continued."""
    rungs: int = 3
    """Number of rungs."""
    eta: float = 2.0
    """A rung keeps one of `eta` cells, rounded up; the budget of the next rung is `eta` times as large."""
    target: float = 0.9
    """Validation accuracy, above 0 and at most 1. Cells that reach it are ranked by the tokens to it."""
    seeds: tuple[int, ...] = (100, 101)
    """Seeds of the runs of every cell."""
    jobs: int = 1
    """Number of runs that train at the same time."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Settings of all cells: dotted key -> text. They win over the recipe, and those of a cell win over them."""

    def __post_init__(self) -> None:
        require(bool(self.cells), "algorithms is empty; give at least one algorithm")
        sizes = {name: len(cells) for name, cells in self.cells.items()}
        require(
            len(set(sizes.values())) == 1,
            f"the grids have different numbers of cells {sizes}; give --cells {min(sizes.values())}",
        )
        names = [cell.name for cell in self.all_cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(
            not twice,
            f"--grid gives two cells the name {', '.join(twice)}, which is also the name of their directory: two "
            "values are equal, or differ only in characters that a directory cannot have; remove one of them",
        )
        require(self.rungs >= 1, f"rungs is {self.rungs}; it must be at least 1")
        require(1 < self.eta < math.inf, f"eta is {self.eta:g}; it must be a finite number above 1")
        require(0 < self.target <= 1, f"target is {self.target:g}; it must be above 0 and at most 1")
        require(self.jobs >= 1, f"jobs is {self.jobs}; it must be at least 1")
        require(
            self.budgets[0] >= 1,
            f"budget is {self.budget}, so that the first of {self.rungs} rungs has less than one token; raise it",
        )
        check_keys(self.overrides, self.all_cells, self._reserved, "tune")

    @property
    def budgets(self) -> tuple[int, ...]:
        """Generated tokens of a run at the end of each rung, increasing."""
        return budgets_of(self.budget, self.rungs, self.eta)

    @property
    def all_cells(self) -> list[Arm]:
        """The cells of all algorithms."""
        return list(itertools.chain(*self.cells.values()))

    @property
    def _reserved(self) -> tuple[str, ...]:
        return ("algorithm", "run.dir", "run.seed", *_FIXED, *settings_of_budget(Budget("tokens", self.budget)))

    def settings_of(self, cell: Arm, budget: int) -> dict[str, str]:
        """Return the settings of the runs of a cell up to a budget, without algorithm, seed and directory."""
        limits = settings_of_budget(Budget("tokens", budget))
        return {**shared_settings(self.overrides, cell, self.all_cells), **cell.overrides, **_FIXED, **limits}


@dataclass(frozen=True)
class Score:
    """The result of a cell on a rung, over all seeds."""

    accuracy: float | None
    """Mean validation accuracy after the budget of the rung, or None if a run did not finish."""
    tokens: float | None = None
    """Generated tokens at which the mean curve reached the target within the budget, or None if it did not."""
    reason: str = ""
    """Why a run did not finish, such as the last line of its log, or empty."""


def budgets_of(budget: int, rungs: int, eta: float) -> tuple[int, ...]:
    """Return the budget of each rung: the last one is `budget`, and each one is `eta` times the one before."""
    return tuple(round(budget / eta ** (rungs - 1 - rung)) for rung in range(rungs))


def ranked(scores: Mapping[str, Score]) -> list[str]:
    """Return the names of cells, best first. Equal cells keep their order.

    Cells that reached the target come first, by their tokens. The others follow by their accuracy, the highest first.
    Cells with a run that did not finish are last.
    """

    def place(name: str) -> tuple[int, float]:
        score = scores[name]
        if score.accuracy is None:
            return 2, 0.0
        return (1, -score.accuracy) if score.tokens is None else (0, score.tokens)

    return sorted(scores, key=place)


def survivors(order: Sequence[str], eta: float) -> list[str]:
    """Return the best cells, one of `eta`, rounded up."""
    return list(order[: max(1, math.ceil(len(order) / eta))])


def score_of(runs: Sequence[Sequence[Evaluation]], budget: float, target: float) -> Score:
    """Compute the result of a cell from the evaluations of its runs, one sequence per seed.

    Evaluations after the first one at or above the budget are left out, so that the result does not depend on whether
    the runs have already gone on. Between evaluations, the accuracy is interpolated linearly over generated tokens.
    """
    records = []
    for seed, evaluations in enumerate(runs):
        beyond = next(i for i, evaluation in enumerate(evaluations) if evaluation.tokens >= budget)
        records.append(RunRecord("", seed, {}, tuple(evaluations[: beyond + 1])))
    accuracy = np.mean(
        [
            np.interp(budget, [e.tokens for e in record.evaluations], [e.accuracy for e in record.evaluations])
            for record in records
        ]
    )
    curves = align(records)
    reach = None if curves is None else first_reach(curves, target)
    return Score(float(accuracy), None if reach is None or reach.tokens > budget else reach.tokens)


def tune(spec: TuneSpec, console: Console | None = None) -> dict[str, Any]:
    """Tune all algorithms, write `arms.yaml` and `tune.json`, and return the content of `tune.json`.

    Args:
        spec: what is tuned. `vineppo.cli.tune.check_cells` checks the settings of its cells.
        console: object that prints the progress; by default, it prints to standard output.
    Raises:
        UserError: if the directory `spec.out` cannot be written, is in use, or contains another tuning.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the running processes have saved their checkpoints.
    """
    console, out = console or Console(), Path(spec.out)
    identity = identity_of(spec.recipe, spec.overrides, spec.all_cells)
    open_directory(out, "tune-spec.json", identity, "tuning")
    arms: dict[str, Any] = {}
    result: dict[str, Any] = {"spec": _spec_record(spec), "algorithms": {}}
    with exclusive_lock(out):
        for name, cells in spec.cells.items():
            print_line(console, f"{name}: {len(cells)} cells, seeds {', '.join(map(str, spec.seeds))}")
            found = result["algorithms"][name] = _tune_algorithm(spec, cells, console)
            best = next((cell for cell in cells if cell.name == found["best"]), None)
            if best is None:
                text = f"  no cell of the last rung finished, so arms.yaml has no {name}; see {out / 'logs'}"
                print_line(console, text)
            else:
                arms[name] = _arm_entry(spec, best, len(cells))
            write_text(out / "arms.yaml", yaml.safe_dump(arms, sort_keys=False))
            write_text(out / "tune.json", json.dumps(result, indent=2) + "\n")
    print_line(console, f"written: {out / 'arms.yaml'}, {out / 'tune.json'}")
    return result


def _tune_algorithm(spec: TuneSpec, cells: Sequence[Arm], console: Console) -> dict[str, Any]:
    """Tune one algorithm, and return its entry in `tune.json`."""
    left, rungs = list(cells), []
    for number, budget in enumerate(spec.budgets):
        scores = _run_rung(spec, left, budget, console)
        order = ranked(scores)
        rungs.append({"budget": budget, "cells": {name: vars(scores[name]) for name in order}})
        for name in order:
            print_line(console, f"  {budget:>10,} tokens  {_shown(scores[name]):44} {name}")
        if number + 1 < len(spec.budgets):
            finished = [name for name in order if scores[name].accuracy is not None]
            kept = survivors(finished or order, spec.eta)
            left = [cell for cell in left if cell.name in kept]
    spent = [
        evaluations[-1].tokens
        for cell in cells
        for seed in spec.seeds
        if (evaluations := _evaluations(_directory(spec, cell, seed)))
    ]
    return {
        "best": order[0] if scores[order[0]].accuracy is not None else None,
        "generated_tokens": sum(spent),
        "settings": {cell.name: dict(cell.overrides) for cell in cells},
        "rungs": rungs,
    }


def _shown(score: Score) -> str:
    """Return a score as text."""
    if score.accuracy is None:
        return f"did not finish: {score.reason[:28]}"
    reached = "" if score.tokens is None else f", target after {score.tokens:,.0f} tokens"
    return f"{100 * score.accuracy:5.1f}%{reached}"


# --- runs ---


def _run_rung(spec: TuneSpec, cells: Sequence[Arm], budget: int, console: Console) -> dict[str, Score]:
    """Train all runs of some cells up to a budget, and return the score of each cell."""
    plans = {cell.name: [planned_run(spec, cell, seed, budget) for seed in spec.seeds] for cell in cells}
    failures = run_all(list(itertools.chain(*plans.values())), spec.jobs, console)
    scores = {}
    for name, own in plans.items():
        runs = [_evaluations(plan.directory) for plan in own]
        missing = [plan for plan, run in zip(own, runs, strict=True) if not _has_used(run, budget)]
        if missing:
            scores[name] = Score(None, reason=outcome_of_missing(missing[0], failures)[1])
        else:
            scores[name] = score_of(runs, budget, spec.target)
    return scores


def planned_run(spec: TuneSpec, cell: Arm, seed: int, budget: int) -> PlannedRun:
    """Return the run of a cell up to a budget, with what is left to do. This function only reads the directory."""
    directory = _directory(spec, cell, seed)
    log = Path(spec.out) / "logs" / f"{directory.name}.log"
    train = (sys.executable, "-m", "vineppo", "train")
    if _has_used(_evaluations(directory), budget):
        return PlannedRun(cell.name, seed, directory, log, "keep", ())
    state = run_state(directory)
    if state in ("finished", "resumable"):
        resume = (*train, "--resume", str(directory), f"--run.max_tokens={budget}")
        return PlannedRun(cell.name, seed, directory, log, "resume", resume)
    settings = {**spec.settings_of(cell, budget), "algorithm": cell.algorithm}
    settings |= {"run.seed": str(seed), "run.dir": str(directory)}
    action: Action = "start" if state == "absent" else "restart"
    start = (*train, spec.recipe, *(f"--{key}={value}" for key, value in settings.items()))
    return PlannedRun(cell.name, seed, directory, log, action, start)


def _directory(spec: TuneSpec, cell: Arm, seed: int) -> Path:
    """Return the directory of a run."""
    return Path(spec.out) / "runs" / f"{cell.name}-seed{seed}"


def _evaluations(directory: Path) -> tuple[Evaluation, ...]:
    """Return the evaluations of a run so far; none if it has not started."""
    return evaluations_of(RunDirectory(directory, {}).read_metrics()) if directory.is_dir() else ()


def _has_used(run: Sequence[Evaluation], budget: float) -> bool:
    """Return whether a run has an evaluation at or above a budget of generated tokens."""
    return any(evaluation.tokens >= budget for evaluation in run)


# --- files ---


def _spec_record(spec: TuneSpec) -> dict[str, Any]:
    """Return what is tuned, for `tune.json`."""
    return {
        "recipe": spec.recipe,
        "out": spec.out,
        "seeds": list(spec.seeds),
        "shared": dict(spec.overrides),
        "target": spec.target,
        "budgets": list(spec.budgets),
        "eta": spec.eta,
        "jobs": spec.jobs,
        "cells": len(next(iter(spec.cells.values()))),
    }


def _arm_entry(spec: TuneSpec, best: Arm, cells: int) -> dict[str, Any]:
    """Return the entry of an algorithm in `arms.yaml`: the settings of its best cell."""
    shared = shared_settings(spec.overrides, best, spec.all_cells)
    shared = {key: value for key, value in shared.items() if key.split(".")[0] not in _NOT_TUNED}
    return {"algorithm": best.algorithm, "cells": cells, **shared, **best.overrides}
