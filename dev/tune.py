"""Tune several algorithms with equal care: successive halving over a grid of settings, by generated tokens.

    python dev/tune.py judgement --algorithms reinforce,grpo --grid learner.lr=1e-4,2e-4,4e-4 \
        --grid rollouts.num_problems=32,80,160 --grid grpo:rollouts.group_size=2,4 --grid reinforce:learner.epochs=1,2 \
        --cells 12 --budget 800000 --rungs 3 --target 0.9 --seeds 100,101 --jobs 2 --out runs/tune
    vineppo compare judgement --arms runs/tune/arms.yaml --budget tokens=2000000 --out runs/tuned

A cell is one combination of the values in the grid of an algorithm. `--grid A+B=1,2` gives two settings the same value,
for example `rollouts.num_problems+learner.minibatch_size`, and `--grid A+B=8:32,20:80` gives them two values. Every
algorithm gets the same number of cells and the same budget of generated tokens per cell. If a grid has more
combinations than `--cells`, a fixed random choice of them is tried. On the first rung, all cells train to a small
budget; the best half goes on to twice the budget, and so on until `--budget` (`--eta 3`: the best third and three times
the budget). Cells that reach `--target`, the mean validation accuracy over the seeds, are ranked by the generated
tokens to it. They come before all others, which are ranked by their accuracy at the budget of the rung. Cells with a
failed run come last.

Runs are continued from rung to rung with `vineppo train --resume`, so the learning rate must not decay. What exists in
`--out` is not repeated: after an interruption, start the same command again. Use seeds from 100 on, so that no setting
is tuned on the seeds of published comparisons. Accuracies of few problems are noisy, and large batches use many tokens
between two evaluations: `--set eval.num_problems=256 --set eval.every=2`.

The results are `arms.yaml`, the best cell of each algorithm for `vineppo compare --arms`, and `tune.json` with all
cells and rungs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vineppo.cli.common import training_config
from vineppo.compare.arms import parse_values, short_name, with_setting
from vineppo.compare.curves import align, first_reach
from vineppo.compare.records import Evaluation, RunRecord, evaluations_of
from vineppo.compare.runs import read_json, run_state
from vineppo.compare.spec import Arm, Budget, arms_of, parse_seeds, settings_of_budget
from vineppo.run.directory import RunDirectory
from vineppo.types import UserError

_FIXED = {"run.save_rollouts": "false", "run.checkpoint_every": "0", "eval.final_num_problems": "0"}
"""Settings of all runs: no files except metrics and one checkpoint, and no evaluation except during training."""
_NOT_TUNED = ("eval", "run")
"""Sections of shared settings that are not written to arms.yaml, because they do not change the training."""


@dataclass(frozen=True)
class Score:
    """The result of a cell on a rung, over all seeds."""

    accuracy: float | None
    """Mean validation accuracy after the budget of the rung, or None if a run failed."""
    tokens: float | None = None
    """Generated tokens at which the mean curve reached the target within the budget, or None if it did not."""
    reason: str = ""
    """Last line of the log of a failed run, or empty."""


@dataclass(frozen=True)
class Plan:
    """What is tuned, and how."""

    recipe: str
    out: Path
    seeds: tuple[int, ...]
    shared: Mapping[str, str]
    """Settings of all cells: dotted key -> text."""
    target: float
    """Validation accuracy, above 0 and at most 1."""
    budgets: tuple[int, ...]
    """Generated tokens of a run at the end of each rung, increasing."""
    eta: float
    """A rung keeps one of `eta` cells."""
    jobs: int


def budgets_of(budget: int, rungs: int, eta: float) -> tuple[int, ...]:
    """Return the budget of each rung: the last one is `budget`, and each one is `eta` times the one before."""
    return tuple(round(budget / eta ** (rungs - 1 - rung)) for rung in range(rungs))


def ranked(scores: Mapping[str, Score]) -> list[str]:
    """Return the names of cells, best first. Equal cells keep their order.

    Cells that reached the target come first, by their tokens. The others follow by their accuracy, the highest first.
    Cells with a failed run are last.
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


def score(runs: Sequence[Sequence[Evaluation]], budget: float, target: float) -> Score:
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


def grids_of(algorithms: Sequence[Arm], texts: Iterable[str]) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the grid of each algorithm: name -> dotted key -> values.

    Args:
        algorithms: the algorithms, as arms without settings.
        texts: grids such as `learner.lr=1e-4,2e-4` for all algorithms, or `grpo:rollouts.group_size=2,4` for one, whose
            values replace those for all. A key in the section of an algorithm belongs to this algorithm only.
            `KEY+OTHER=A,B` gives both settings the same value, `KEY+OTHER=A:B,C:D` two values.
    Raises:
        UserError: if a text has another form, or belongs to no algorithm.
    """
    names = {arm.name for arm in algorithms}
    shared: dict[str, tuple[str, ...]] = {}
    own: dict[str, dict[str, tuple[str, ...]]] = {name: {} for name in names}
    for text in texts:
        place, values = parse_values(text, "--grid")
        name, _, key = place.rpartition(":")
        name = name or (key.split(".")[0] if key.split(".")[0] in names else "")
        if name and name not in names:
            raise UserError(f"--grid {text}: {name} is not tuned; algorithms: {', '.join(sorted(names))}")
        (own[name] if name else shared)[key] = values
    return {name: {**shared, **own[name]} for name in names}


def cells_of(arm: Arm, grid: Mapping[str, Sequence[str]], count: int | None) -> list[Arm]:
    """Return the cells of an algorithm, as arms whose names show the values of the grid.

    Args:
        arm: the algorithm, as an arm without settings.
        grid: dotted key -> values.
        count: number of cells, chosen at random in a way that depends on the name of the algorithm only; None takes all
            combinations.
    Raises:
        UserError: if there are fewer combinations than `count`.
    """
    points = list(itertools.product(*grid.values()))
    if count is not None and len(points) < count:
        raise UserError(f"the grid of {arm.name} has {len(points)} combinations, but --cells is {count}; add values")
    if count is not None and len(points) > count:
        chosen = sorted(random.Random(arm.name).sample(range(len(points)), count))
        points = [points[i] for i in chosen]
    cells, firsts = [], [keys.split("+")[0] for keys in grid]
    for point in points:
        cell = arm
        for keys, value in zip(grid, point, strict=True):
            key, *tied = keys.split("+")
            first, *others = value.split(":") if tied and ":" in value else [value] * (1 + len(tied))
            if len(others) != len(tied):
                raise UserError(f"--grid {keys}: {value} has {1 + len(others)} values for {1 + len(tied)} settings")
            cell = with_setting(cell, key, first, short_name(key, firsts))
            cell = replace(cell, overrides={**cell.overrides, **dict(zip(tied, others, strict=True))})
        cells.append(cell)
    return cells


def evaluations_in(directory: Path) -> tuple[Evaluation, ...]:
    """Return the evaluations of a run so far; none if it has not started."""
    return evaluations_of(RunDirectory(directory, {}).read_metrics()) if directory.is_dir() else ()


def command_of(plan: Plan, cell: Arm, seed: int, budget: int) -> tuple[str, ...]:
    """Return the command that trains a run of a cell up to a budget; empty if the run has already used the budget."""
    directory = run_of(plan, cell, seed)
    if any(evaluation.tokens >= budget for evaluation in evaluations_in(directory)):
        return ()
    program = (sys.executable, "-m", "vineppo", "train")
    if run_state(directory) in ("finished", "resumable"):
        return (*program, "--resume", str(directory), f"--run.max_tokens={budget}")
    settings = {**plan.shared, **cell.overrides, **_FIXED, **settings_of_budget(Budget("tokens", budget))}
    settings |= {"algorithm": cell.algorithm, "run.seed": str(seed), "run.dir": str(directory)}
    return (*program, plan.recipe, *(f"--{key}={value}" for key, value in settings.items()))


def run_of(plan: Plan, cell: Arm, seed: int) -> Path:
    """Return the directory of a run."""
    return plan.out / "runs" / f"{cell.name}-seed{seed}"


def train(plan: Plan, cell: Arm, seed: int, budget: int) -> str:
    """Train a run up to a budget. Return an empty text, or the last line of its log if it failed."""
    command = command_of(plan, cell, seed, budget)
    if not command:
        return ""
    directory = run_of(plan, cell, seed)
    if "--resume" not in command and directory.exists():
        shutil.rmtree(directory)  # a run without a checkpoint
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // plan.jobs)), **os.environ}
    log = plan.out / "logs" / f"{directory.name}.log"
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "" if code == 0 else (lines[-1] if lines else f"exit code {code}")


def run_rung(plan: Plan, cells: Sequence[Arm], budget: int) -> dict[str, Score]:
    """Train all runs of some cells up to a budget, and return the score of each cell."""
    runs = [(cell, seed) for cell in cells for seed in plan.seeds]
    with ThreadPoolExecutor(plan.jobs) as pool:
        futures = {(cell.name, seed): pool.submit(train, plan, cell, seed, budget) for cell, seed in runs}
        try:
            failures = {run: future.result() for run, future in futures.items()}
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    scores = {}
    for cell in cells:
        reasons = [text for seed in plan.seeds if (text := failures[cell.name, seed])]
        evaluations = [evaluations_in(run_of(plan, cell, seed)) for seed in plan.seeds]
        scores[cell.name] = Score(None, reason=reasons[0]) if reasons else score(evaluations, budget, plan.target)
    return scores


def halve(plan: Plan, cells: Sequence[Arm]) -> tuple[list[str], list[dict[str, Any]]]:
    """Tune one algorithm.

    Returns:
        (names of the cells of the last rung, best first; for each rung a record for tune.json).
    """
    left, rungs, order = list(cells), [], []
    for number, budget in enumerate(plan.budgets):
        scores = run_rung(plan, left, budget)
        order = ranked(scores)
        rungs.append({"budget": budget, "cells": {name: vars(scores[name]) for name in order}})
        for name in order:
            print(f"  {budget:>10,} tokens  {_shown(scores[name]):44} {name}", flush=True)
        if number + 1 < len(plan.budgets):
            kept = survivors([name for name in order if scores[name].accuracy is not None] or order, plan.eta)
            left = [cell for cell in left if cell.name in kept]
    return order, rungs


def _shown(score: Score) -> str:
    if score.accuracy is None:
        return f"failed: {score.reason[:30]}"
    reached = "" if score.tokens is None else f", target after {score.tokens:,.0f} tokens"
    return f"{100 * score.accuracy:5.1f}%{reached}"


def arm_of(plan: Plan, algorithm: Arm, best: Arm, cells: int) -> dict[str, Any]:
    """Return the entry of arms.yaml for the best cell of an algorithm."""
    shared = {key: value for key, value in plan.shared.items() if key.split(".")[0] not in _NOT_TUNED}
    return {"algorithm": algorithm.algorithm, "cells": cells, **shared, **best.overrides}


def check_cells(plan: Plan, cells: Iterable[Arm]) -> None:
    """Raise UserError before the first run if a cell has a setting that is not allowed."""
    for cell in cells:
        settings = {**plan.shared, **cell.overrides, **_FIXED, **settings_of_budget(Budget("tokens", plan.budgets[-1]))}
        try:
            config = training_config(plan.recipe, settings, cell.algorithm)
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from None
        if not config.eval.every:
            raise UserError("eval.every is 0, so there is no accuracy to rank by; give --set eval.every=N")


def open_directory(plan: Plan) -> None:
    """Create the output directory, or raise UserError if it belongs to another recipe or other shared settings."""
    record, identity = plan.out / "tune-spec.json", {"recipe": plan.recipe, "shared": dict(plan.shared)}
    found = read_json(record)
    if found not in (None, identity):
        raise UserError(f"--out {plan.out} was tuned with {json.dumps(found)}; choose another --out")
    for name in ("runs", "logs"):
        (plan.out / name).mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def tune(plan: Plan, algorithms: Sequence[Arm], cells: Mapping[str, Sequence[Arm]]) -> dict[str, Any]:
    """Tune all algorithms, write arms.yaml and tune.json, and return the content of tune.json.

    Args:
        algorithms: the algorithms, as arms without settings.
        cells: name of an algorithm -> its cells.
    """
    sizes = {name: len(own) for name, own in cells.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"the grids have different numbers of cells {sizes}; give --cells {min(sizes.values())}")
    check_cells(plan, itertools.chain(*cells.values()))
    open_directory(plan)
    spec = {**vars(plan), "out": str(plan.out), "cells": next(iter(sizes.values()))}
    result: dict[str, Any] = {"spec": spec, "algorithms": {}}
    arms: dict[str, Any] = {}
    for algorithm in algorithms:
        print(f"{algorithm.name}: {sizes[algorithm.name]} cells", flush=True)
        order, rungs = halve(plan, cells[algorithm.name])
        by_name = {cell.name: cell for cell in cells[algorithm.name]}
        runs = [run_of(plan, cell, seed) for cell in by_name.values() for seed in plan.seeds]
        spent = [evaluations[-1].tokens for run in runs if (evaluations := evaluations_in(run))]
        settings = {cell.name: dict(cell.overrides) for cell in by_name.values()}
        best = next((name for name in order if rungs[-1]["cells"][name]["accuracy"] is not None), None)
        result["algorithms"][algorithm.name] = {
            "best": best,
            "generated_tokens": sum(spent),
            "settings": settings,
            "rungs": rungs,
        }
        if best is None:
            print(f"  all cells of the last rung failed, so arms.yaml has no {algorithm.name}: see {plan.out / 'logs'}")
        else:
            arms[algorithm.name] = arm_of(plan, algorithm, by_name[best], len(by_name))
        (plan.out / "arms.yaml").write_text(yaml.safe_dump(arms, sort_keys=False), encoding="utf-8")
        (plan.out / "tune.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {plan.out / 'arms.yaml'}, {plan.out / 'tune.json'}")
    return result


def parsed(arguments: Sequence[str] | None = None) -> tuple[Plan, tuple[Arm, ...], dict[str, list[Arm]]]:
    """Parse the command line. Return the plan, the algorithms as arms without settings, and the cells of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--algorithms", required=True, metavar="A,B", help="algorithms to tune")
    parser.add_argument("--grid", action="append", required=True, metavar="[ALGORITHM:]KEY=A,B", help="repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="setting of all cells")
    parser.add_argument("--cells", type=int, help="cells per algorithm; default: all combinations")
    parser.add_argument("--budget", type=float, required=True, help="generated tokens of a run on the last rung")
    parser.add_argument("--rungs", type=int, default=3)
    parser.add_argument("--eta", type=float, default=2.0, help="a rung keeps one of ETA cells")
    parser.add_argument("--target", type=float, default=0.9, help="validation accuracy")
    parser.add_argument("--seeds", default="100,101", help="as for `vineppo compare`")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time")
    parser.add_argument("--out", default="runs/tune")
    given = parser.parse_args(arguments)
    if given.rungs < 1 or given.eta <= 1 or given.budget < 1 or not 0 < given.target <= 1 or given.jobs < 1:
        raise UserError("--rungs, --budget and --jobs must be at least 1, --eta above 1, --target above 0, at most 1")
    if not all("=" in text for text in given.set):
        raise UserError("--set must be KEY=VALUE")
    shared = dict(text.split("=", 1) for text in given.set)
    budgets = budgets_of(int(given.budget), given.rungs, given.eta)
    seeds = parse_seeds(given.seeds)
    plan = Plan(given.recipe, Path(given.out), seeds, shared, given.target, budgets, given.eta, given.jobs)
    algorithms = arms_of(name.strip() for name in given.algorithms.split(","))
    grids = grids_of(algorithms, given.grid)
    return plan, algorithms, {arm.name: cells_of(arm, grids[arm.name], given.cells) for arm in algorithms}


def main() -> int:
    """Parse the command line and tune. Return the exit code."""
    try:
        tune(*parsed())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
