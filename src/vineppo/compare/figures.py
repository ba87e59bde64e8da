"""What a comparison's finished runs say: curves on common points, the first reach of a level, ratios with intervals.

Pure functions of loaded runs; only `load_run` reads files. An algorithm's curve is its mean accuracy over seeds at each
count of updates; the tokens and seconds at a point of it are the means over seeds at that count. So "the level was
reached" means the same thing on every axis, and a baseline reaches its own best on each of them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vineppo.credit.algorithm import Algorithm
from vineppo.run.directory import RunDirectory
from vineppo.statistics import Interval, interval_over_seeds

AXES = ("updates", "tokens", "seconds")
"""What is counted when a level is reached."""
_TIE = 1e-9
"""Accuracies closer than this are the same level; means of floats differ by rounding."""


@dataclass(frozen=True)
class Evaluation:
    """One measurement during a run, with what the run had used by then."""

    updates: float
    tokens: float
    """Generated for training: rollouts and MC rollouts."""
    seconds: float
    """Of training, evaluation not counted."""
    accuracy: float
    kl: float | None
    """From the starting model, in the unit of the run's metric `kl/ref`; None where it was not measured."""


@dataclass(frozen=True)
class RunRecord:
    """What a comparison needs to know of a finished run."""

    algorithm: str
    seed: int
    summary: dict[str, Any]
    evaluations: tuple[Evaluation, ...]
    level: str = ""
    """What was trained on, for titles: the chain task's level, or the name of the task."""


def load_run(directory: Path) -> RunRecord:
    """Read a finished run's directory: `summary.json`, `metrics.jsonl` and `config.yaml`.

    Raises:
        UserError: if a file is damaged.
    """
    run = RunDirectory.open(directory, writable=False)
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    lines = run.read_metrics()
    has_kl = any(line.get("kl/ref") is not None for line in lines)
    evaluations = [_evaluation(line, has_kl) for line in lines if line.get("eval/accuracy") is not None]
    # Two measurements at one count of updates would make the curve ambiguous; the later one is the model's last word.
    unique = {evaluation.updates: evaluation for evaluation in evaluations}
    task = run.config.get("task", {})
    level = task.get("level", "") if task.get("name") == "chain" else task.get("name", "")
    ordered = tuple(unique[updates] for updates in sorted(unique))
    return RunRecord(summary["algorithm"], int(summary["seed"]), summary, ordered, level)


def _evaluation(record: dict[str, Any], has_kl: bool) -> Evaluation:
    kl = record.get("kl/ref")
    if kl is None and has_kl and record["updates"] == 0:
        kl = 0.0  # before the first update the policy is the reference
    return Evaluation(
        updates=float(record["updates"]),
        tokens=float(record.get("tokens/generated", 0)),
        seconds=float(record.get("seconds/train", 0)),
        accuracy=float(record["eval/accuracy"]),
        kl=None if kl is None else float(kl),
    )


@dataclass(frozen=True)
class Curves:
    """All runs of one algorithm at the same counts of updates. N runs (rows), E points (columns)."""

    updates: np.ndarray
    """Counts of updates at which any run was evaluated, within the range that every run covers, shape (E,)."""
    accuracy: np.ndarray
    """Shape (N, E)."""
    tokens: np.ndarray
    """Shape (N, E)."""
    seconds: np.ndarray
    """Shape (N, E)."""
    kl: np.ndarray | None
    """Shape (N, E)."""

    def resampled(self, rows: np.ndarray) -> Curves:
        """The same curves for a resample of the runs; `rows` has shape (N,)."""
        kl = None if self.kl is None else self.kl[rows]
        return Curves(self.updates, self.accuracy[rows], self.tokens[rows], self.seconds[rows], kl)


def align(runs: Sequence[RunRecord]) -> Curves | None:
    """Interpolate the runs of one algorithm to common counts of updates; None where they share none.

    The points are all counts of updates at which a run was evaluated. Means of piecewise linear curves are piecewise
    linear between these, so no grid has to be chosen and nothing is lost. Nothing is extrapolated either.
    """
    if not runs or not all(run.evaluations for run in runs):
        return None
    knots = [np.array([e.updates for e in run.evaluations]) for run in runs]
    first, last = max(x[0] for x in knots), min(x[-1] for x in knots)
    grid = np.unique(np.concatenate(knots))
    grid = grid[(grid >= first) & (grid <= last)]  # (E,)
    if grid.size == 0:
        return None

    def rows(field: str) -> np.ndarray:  # (N, E)
        values = [[float(getattr(e, field)) for e in run.evaluations] for run in runs]
        return np.stack([np.interp(grid, x, y) for x, y in zip(knots, values, strict=True)])

    has_kl = all(e.kl is not None for run in runs for e in run.evaluations)
    return Curves(grid, rows("accuracy"), rows("tokens"), rows("seconds"), rows("kl") if has_kl else None)


@dataclass(frozen=True)
class Reach:
    """What an algorithm had used when its mean curve first reached a level."""

    updates: float
    tokens: float
    seconds: float


def first_reach(curves: Curves, level: float) -> Reach | None:
    """Where the mean accuracy over seeds first reaches a level, linear between evaluations; None if it never does."""
    mean = curves.accuracy.mean(axis=0)  # (E,)
    reached = np.flatnonzero(mean >= level - _TIE)
    if reached.size == 0:
        return None
    after = int(reached[0])
    before = max(after - 1, 0)
    rise = float(mean[after] - mean[before])
    share = min(1.0, float(level - mean[before]) / rise) if rise > 0 else 1.0

    def amount(values: np.ndarray) -> float:
        return float(values[before] + share * (values[after] - values[before]))

    return Reach(amount(curves.updates), amount(curves.tokens.mean(axis=0)), amount(curves.seconds.mean(axis=0)))


def _ratios(ours: Curves, baseline: Curves) -> tuple[Reach | None, Reach, dict[str, float | None]]:
    """(our reach of the baseline's best, the baseline's own, baseline amount / our amount on each axis)."""
    level = float(baseline.accuracy.mean(axis=0).max())
    mine, theirs = first_reach(ours, level), first_reach(baseline, level)
    assert theirs is not None, "a curve reaches its own maximum"
    ratios: dict[str, float | None] = dict.fromkeys(AXES)
    if mine is not None:
        amounts = {axis: (getattr(theirs, axis), getattr(mine, axis)) for axis in AXES}
        ratios = {axis: above / below if below > 0 else None for axis, (above, below) in amounts.items()}
    return mine, theirs, ratios


def versus(
    ours: Curves, baseline: Curves, *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """How much less we use than a baseline to reach the baseline's best accuracy.

    The baseline's best is the maximum of its mean curve over the evaluation points. A ratio is the baseline's amount
    to reach it first, over ours: 3 means three times fewer. None where we never reach it, or where it is no more than
    the start. The intervals resample the runs of both algorithms, find the best anew each time, and take percentiles;
    a resample in which the level is never reached counts as below every ratio, so a `low` of None says that the ratio
    has no lower bound at this confidence; one in which only our start is at the level counts as above every ratio. With
    a single run there is no interval.

    Returns:
        `baseline_best_accuracy`, `reach`, `baseline_reach`, `<axis>_ratio`, `<axis>_ratio_interval` for updates,
        tokens and seconds, and `share_of_resamples_reached`.
    """
    mine, theirs, ratios = _ratios(ours, baseline)
    result: dict[str, Any] = {
        "baseline_best_accuracy": float(baseline.accuracy.mean(axis=0).max()),
        "reach": None if mine is None else vars(mine).copy(),
        "baseline_reach": vars(theirs).copy(),
        **{f"{axis}_ratio": ratios[axis] for axis in AXES},
    }
    num_ours, num_theirs = len(ours.accuracy), len(baseline.accuracy)
    if min(num_ours, num_theirs) < 2:
        nothing = {f"{axis}_ratio_interval": {"low": None, "high": None} for axis in AXES}
        return {**result, **nothing, "share_of_resamples_reached": None}
    generator = np.random.default_rng(seed)
    resamples = [
        _ratios(
            ours.resampled(generator.integers(0, num_ours, num_ours)),
            baseline.resampled(generator.integers(0, num_theirs, num_theirs)),
        )
        for _ in range(num_resamples)
    ]
    for axis in AXES:
        values = np.array([_bounded(*resample, axis) for resample in resamples])
        low = float(np.quantile(values, (1 - level) / 2, method="lower"))
        high = float(np.quantile(values, (1 + level) / 2, method="higher"))
        result[f"{axis}_ratio_interval"] = {
            "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None,
        }
    reached = sum(reach is not None for reach, _, _ in resamples)
    return {**result, "share_of_resamples_reached": reached / num_resamples}


def _bounded(mine: Reach | None, theirs: Reach, ratios: Mapping[str, float | None], axis: str) -> float:
    """A resample's ratio, which is infinite where only one side needs anything, and 1 where both start at the level."""
    if mine is None:
        return -math.inf
    ratio = ratios[axis]
    if ratio is None:
        return math.inf if getattr(theirs, axis) > 0 else 1.0
    return ratio


def at_equal_amounts(curves: Mapping[str, Curves | None]) -> dict[str, Any]:
    """Accuracy of the algorithms where every run has used the same amount: all that the thriftiest run used.

    Read off each run's own curve, linear between its evaluations. Where the learning rate decays to the end of a run,
    the thriftiest one is measured behind its decay and the others before theirs, which favours it.

    Returns:
        axis -> `amount` and `accuracy` (name -> interval over seeds); nothing for fewer than two curves.
    """
    known = {name: own for name, own in curves.items() if own is not None}
    result = {}
    for axis in AXES if len(known) > 1 else ():
        used = {name: np.broadcast_to(getattr(own, axis), own.accuracy.shape) for name, own in known.items()}  # (N, E)
        amount = min(float(rows[:, -1].min()) for rows in used.values())
        accuracy = {
            name: interval_over_seeds(
                [float(np.interp(amount, x, y)) for x, y in zip(used[name], own.accuracy, strict=True)]
            )
            for name, own in known.items()
        }
        result[axis] = {"amount": amount, "accuracy": {name: own.as_dict() for name, own in accuracy.items()}}
    return result


def analyse(runs: Sequence[RunRecord], arms: Sequence[Algorithm]) -> dict[str, Any]:
    """Everything that `compare.json` says about finished runs: a pure function of them.

    The first algorithm is compared with two others: the second one, which is the reference of the tables, and the one
    of the others with the highest final accuracy.

    Returns:
        `algorithms` (name -> figures; a name without finished runs has nulls), `first` and `reference` (names),
        `vs_reference` and `vs_best` (figures of the two comparisons), `equal` (all algorithms at equal updates, tokens
        and seconds).
    """
    labels = {arm.name: arm.label for arm in arms}
    grouped = {name: sorted((r for r in runs if r.algorithm == name), key=lambda r: r.seed) for name in labels}
    curves = {name: align(group) for name, group in grouped.items()}
    first, reference = arms[0].name, arms[1].name if len(arms) > 1 else None
    figures = {
        arm.name: {"label": arm.label, "colour": arm.colour, **_algorithm_figures(grouped[arm.name], curves[arm.name])}
        for arm in arms
    }
    reference_curve = curves[reference] if reference else None
    for name, own in curves.items():
        reach = None
        if reference_curve is not None and own is not None:
            reach = first_reach(own, float(reference_curve.accuracy.mean(axis=0).max()))
        figures[name]["reach_reference_best"] = None if reach is None else vars(reach).copy()
    finals = {name: figures[name]["final_accuracy"]["mean"] for name in labels if name != first}
    best = max((name for name, mean in finals.items() if mean is not None), key=lambda name: finals[name], default=None)
    pair = functools.partial(_pair, first, grouped=grouped, curves=curves, labels=labels)
    return {
        "algorithms": figures,
        "first": first,
        "reference": reference,
        "vs_reference": pair(reference),
        "vs_best": pair(best),
        "equal": at_equal_amounts(curves),
    }


def _algorithm_figures(runs: Sequence[RunRecord], curves: Curves | None) -> dict[str, Any]:
    """One algorithm's entry in `compare.json`."""

    def over_seeds(*keys: str) -> dict[str, float | None]:
        values = [number for run in runs if (number := number_in(run.summary, *keys)) is not None]
        return interval_over_seeds(values).as_dict() if values else {"mean": None, "low": None, "high": None}

    return {
        "num_runs": len(runs),
        "final_accuracy": over_seeds("accuracy_after", "mean"),
        "accuracy_before": over_seeds("accuracy_before", "mean"),
        "updates": over_seeds("updates")["mean"],
        "seconds": over_seeds("seconds"),
        "seconds_eval": over_seeds("seconds_eval")["mean"],
        "tokens": {phase: over_seeds("tokens", phase)["mean"] for phase in ("rollouts", "mc", "generated", "trained")},
        "curve": None if curves is None else _curve_figures(curves),
        "per_seed": [_run_figures(run) for run in runs],
    }


def _curve_figures(curves: Curves) -> dict[str, Any]:
    """The mean curve with its Student-t band, as lists of E numbers; the band is null at a single run."""
    band = [interval_over_seeds(column).as_dict() for column in curves.accuracy.T]
    mean = curves.accuracy.mean(axis=0)
    return {
        "updates": curves.updates.tolist(),
        "tokens": curves.tokens.mean(axis=0).tolist(),
        "seconds": curves.seconds.mean(axis=0).tolist(),
        "kl": None if curves.kl is None else curves.kl.mean(axis=0).tolist(),
        "accuracy": mean.tolist(),
        "accuracy_low": [point["low"] for point in band],
        "accuracy_high": [point["high"] for point in band],
        "best_accuracy": float(mean.max()),
        "best_updates": float(curves.updates[int(mean.argmax())]),
    }


def _run_figures(run: RunRecord) -> dict[str, Any]:
    """One run, flat: an entry of `per_seed` and a row of `compare.csv`."""
    figures: dict[str, Any] = {"algorithm": run.algorithm, "seed": run.seed}
    for key in ("accuracy_before", "accuracy_after"):
        for bound in ("mean", "low", "high"):
            name = key if bound == "mean" else f"{key}_{bound}"
            figures[name] = number_in(run.summary, key, bound)
    for key in ("updates", "iterations", "seconds", "seconds_eval", "seconds_total"):
        figures[key] = run.summary.get(key)
    for phase in ("rollouts", "mc", "generated", "trained"):
        figures[f"tokens_{phase}"] = number_in(run.summary, "tokens", phase)
    return {**figures, "finish_reason": run.summary.get("finish_reason")}


def _pair(
    first: str,
    baseline: str | None,
    *,
    grouped: Mapping[str, list[RunRecord]],
    curves: Mapping[str, Curves | None],
    labels: Mapping[str, str],
) -> dict[str, Any]:
    """The first algorithm against one other; all nulls, with the reason, where a side is missing."""
    ours = curves[first]
    theirs = curves[baseline] if baseline else None
    if baseline is None or ours is None or theirs is None:
        absent = labels[first] if ours is None else labels[baseline] if baseline else "a second algorithm"
        empty: dict[str, Any] = {f"{axis}_ratio": None for axis in AXES}
        empty |= {f"{axis}_ratio_interval": {"low": None, "high": None} for axis in AXES}
        return {"baseline": baseline, **empty, "reason": f"no finished and evaluated run of {absent}"}
    result = versus(ours, theirs)
    reason = None
    if result["reach"] is None:
        reason = f"{labels[first]} never reached the best accuracy of {labels[baseline]}"
    elif result["updates_ratio"] is None:
        reason = f"the best accuracy of {labels[baseline]} is no more than the start of {labels[first]}"
    difference = _paired_difference(grouped[first], grouped[baseline])
    return {"baseline": baseline, **result, "final_accuracy_difference": difference, "reason": reason}


def _paired_difference(ours: Sequence[RunRecord], theirs: Sequence[RunRecord]) -> dict[str, float | None]:
    """Difference in final accuracy, paired by seed: runs of one seed train and are measured on the same problems."""
    after = [{run.seed: number_in(run.summary, "accuracy_after", "mean") for run in side} for side in (ours, theirs)]
    pairs = [(after[0][seed], after[1][seed]) for seed in sorted(after[0].keys() & after[1].keys())]
    values = [mine - other for mine, other in pairs if mine is not None and other is not None]
    interval = interval_over_seeds(values) if values else Interval(math.nan, math.nan, math.nan)
    return interval.as_dict()


def number_in(record: dict[str, Any], *keys: str) -> float | None:
    """The finite number under nested keys, or None."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
