"""Analysis of finished runs: curves at common points, the first point that reaches an accuracy, ratios with intervals.

Only `load_run` reads files; the other functions are pure. The curve of an algorithm is its mean accuracy over seeds as
a function of the number of updates. The tokens and seconds of a point are the means over seeds at that number of
updates, so the first point that reaches an accuracy is the same on every axis.
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
"""Resources that are compared: updates, generated tokens, seconds of training."""
_TIE = 1e-9
"""Accuracies that differ by less than this are equal: means of floats have rounding errors."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation during a run, and the resources that the run had used before it."""

    updates: float
    tokens: float
    """Tokens generated for training: rollouts and MC rollouts."""
    seconds: float
    """Seconds of training, without evaluation."""
    accuracy: float
    kl: float | None
    """KL from the starting model (the metric `kl/ref`), or None if it was not measured."""


@dataclass(frozen=True)
class RunRecord:
    """The data of one finished run that the analysis uses."""

    algorithm: str
    seed: int
    summary: dict[str, Any]
    evaluations: tuple[Evaluation, ...]
    level: str = ""
    """Name of the training problems in titles: the level of the chain task, or the name of another task."""


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
    # A curve has one accuracy per number of updates: keep the last evaluation.
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
    """All runs of one algorithm at the same numbers of updates: N runs (rows), E points (columns)."""

    updates: np.ndarray
    """Numbers of updates at which any run was evaluated, within the range that every run covers, shape (E,)."""
    accuracy: np.ndarray
    """Shape (N, E)."""
    tokens: np.ndarray
    """Shape (N, E)."""
    seconds: np.ndarray
    """Shape (N, E)."""
    kl: np.ndarray | None
    """Shape (N, E), or None if an evaluation has no KL."""

    def resampled(self, rows: np.ndarray) -> Curves:
        """The curves of a resample of the runs; `rows` are the indices of its runs, shape (N,)."""
        kl = None if self.kl is None else self.kl[rows]
        return Curves(self.updates, self.accuracy[rows], self.tokens[rows], self.seconds[rows], kl)


def align(runs: Sequence[RunRecord]) -> Curves | None:
    """Interpolate the runs of one algorithm at common numbers of updates.

    The points are all numbers of updates at which a run was evaluated. The mean of piecewise linear curves is linear
    between these points, so the result does not depend on the choice of a grid. Curves are not extrapolated.

    Returns:
        The curves, or None if a run has no evaluation or the runs have no common point.
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
    """Resources that an algorithm had used when its mean curve first reached an accuracy."""

    updates: float
    tokens: float
    seconds: float


def first_reach(curves: Curves, level: float) -> Reach | None:
    """The first point at which the mean accuracy over seeds reaches `level`, or None; linear between evaluations."""
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


def _ratios(curves: Curves, baseline: Curves) -> tuple[Reach | None, Reach, dict[str, float | None]]:
    """Resources to reach the baseline's best accuracy: (of `curves`, of `baseline`, baseline / curves on each axis)."""
    level = float(baseline.accuracy.mean(axis=0).max())
    reach, baseline_reach = first_reach(curves, level), first_reach(baseline, level)
    assert baseline_reach is not None, "a curve reaches its own maximum"
    ratios: dict[str, float | None] = dict.fromkeys(AXES)
    if reach is not None:
        amounts = {axis: (getattr(baseline_reach, axis), getattr(reach, axis)) for axis in AXES}
        ratios = {axis: above / below if below > 0 else None for axis, (above, below) in amounts.items()}
    return reach, baseline_reach, ratios


def versus(
    curves: Curves, baseline: Curves, *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Compare the resources that an algorithm and a baseline need to reach the baseline's best accuracy.

    The best accuracy is the maximum of the baseline's mean curve over the evaluation points. A ratio is the amount that
    the baseline needs to reach it, divided by the amount of the algorithm: 3 means that the algorithm needs a third. It
    is None if the algorithm never reaches the best accuracy or starts at or above it.

    The intervals are bootstrap percentiles: the runs of both algorithms are resampled, and the best accuracy is found
    again in each resample. A resample in which the algorithm never reaches the best accuracy counts as below every
    ratio, so a `low` of None means that the ratio has no lower bound at this confidence. A resample in which only the
    algorithm starts at the best accuracy counts as above every ratio. Without two runs of each there is no interval.

    Args:
        curves: runs of the algorithm.
        baseline: runs of the baseline.
        num_resamples: number of bootstrap resamples.
        seed: seed of the resamples.
        level: confidence of the intervals, between 0 and 1.
    Returns:
        `baseline_best_accuracy`, `reach`, `baseline_reach`, `<axis>_ratio`, `<axis>_ratio_interval` for updates,
        tokens and seconds, and `share_of_resamples_reached`.
    """
    reach, baseline_reach, ratios = _ratios(curves, baseline)
    result: dict[str, Any] = {
        "baseline_best_accuracy": float(baseline.accuracy.mean(axis=0).max()),
        "reach": None if reach is None else vars(reach).copy(),
        "baseline_reach": vars(baseline_reach).copy(),
        **{f"{axis}_ratio": ratios[axis] for axis in AXES},
    }
    num_runs, num_baseline_runs = len(curves.accuracy), len(baseline.accuracy)
    if min(num_runs, num_baseline_runs) < 2:
        unknown = {f"{axis}_ratio_interval": {"low": None, "high": None} for axis in AXES}
        return {**result, **unknown, "share_of_resamples_reached": None}
    generator = np.random.default_rng(seed)
    resamples = [
        _ratios(
            curves.resampled(generator.integers(0, num_runs, num_runs)),
            baseline.resampled(generator.integers(0, num_baseline_runs, num_baseline_runs)),
        )
        for _ in range(num_resamples)
    ]
    for axis in AXES:
        values = np.array([_extended_ratio(*resample, axis) for resample in resamples])
        low = float(np.quantile(values, (1 - level) / 2, method="lower"))
        high = float(np.quantile(values, (1 + level) / 2, method="higher"))
        result[f"{axis}_ratio_interval"] = {
            "low": low if math.isfinite(low) else None,
            "high": high if math.isfinite(high) else None,
        }
    reached = sum(resample[0] is not None for resample in resamples)
    return {**result, "share_of_resamples_reached": reached / num_resamples}


def _extended_ratio(reach: Reach | None, baseline_reach: Reach, ratios: Mapping[str, float | None], axis: str) -> float:
    """The ratio of a resample as a number that can be sorted.

    It is -inf if the algorithm never reaches the best accuracy, inf if only the algorithm starts at it, and 1 if both
    start at it.
    """
    if reach is None:
        return -math.inf
    ratio = ratios[axis]
    if ratio is None:
        return math.inf if getattr(baseline_reach, axis) > 0 else 1.0
    return ratio


def at_equal_amounts(curves: Mapping[str, Curves | None]) -> dict[str, Any]:
    """Accuracy of each algorithm at an equal amount of a resource: the smallest amount that any run used in total.

    The accuracy of a run is interpolated linearly between its evaluations. If the learning rate decays to the end of a
    run, the run with the smallest amount is measured after its decay and the others before theirs, which favours it.

    Returns:
        axis -> `amount` and `accuracy` (name -> interval over seeds); empty if there are fewer than two curves.
    """
    evaluated = {name: curve for name, curve in curves.items() if curve is not None}
    result = {}
    for axis in AXES if len(evaluated) > 1 else ():
        used = {
            name: np.broadcast_to(getattr(curve, axis), curve.accuracy.shape) for name, curve in evaluated.items()
        }  # (N, E)
        amount = min(float(rows[:, -1].min()) for rows in used.values())
        accuracy = {
            name: interval_over_seeds(
                [float(np.interp(amount, x, y)) for x, y in zip(used[name], curve.accuracy, strict=True)]
            )
            for name, curve in evaluated.items()
        }
        result[axis] = {"amount": amount, "accuracy": {name: mean.as_dict() for name, mean in accuracy.items()}}
    return result


def analyse(runs: Sequence[RunRecord], arms: Sequence[Algorithm]) -> dict[str, Any]:
    """Compute the figures of `compare.json` from finished runs.

    The first algorithm is compared with two baselines: the second algorithm, which is the reference of the tables, and
    the algorithm with the highest final accuracy among all but the first.

    Returns:
        `algorithms` (name -> figures; None values if it has no finished run), `first` and `reference` (names),
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
    for name, curve in curves.items():
        reach = None
        if reference_curve is not None and curve is not None:
            reach = first_reach(curve, float(reference_curve.accuracy.mean(axis=0).max()))
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
    """The entry of one algorithm in `compare.json`."""

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
    """The mean curve and its Student t interval as lists of E numbers; the bounds are None if there is a single run."""
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
    """The figures of one run without nesting: an entry of `per_seed` and a row of `compare.csv`."""
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
    """Compare the first algorithm with a baseline; figures are None, with a `reason`, if one of them has no curve."""
    first_curves = curves[first]
    baseline_curves = curves[baseline] if baseline else None
    if baseline is None or first_curves is None or baseline_curves is None:
        absent = labels[first] if first_curves is None else labels[baseline] if baseline else "a second algorithm"
        empty: dict[str, Any] = {f"{axis}_ratio": None for axis in AXES}
        empty |= {f"{axis}_ratio_interval": {"low": None, "high": None} for axis in AXES}
        return {"baseline": baseline, **empty, "reason": f"no finished and evaluated run of {absent}"}
    result = versus(first_curves, baseline_curves)
    reason = None
    if result["reach"] is None:
        reason = f"{labels[first]} never reached the best accuracy of {labels[baseline]}"
    elif result["updates_ratio"] is None:
        reason = f"{labels[first]} starts at or above the best accuracy of {labels[baseline]}"
    difference = _paired_difference(grouped[first], grouped[baseline])
    return {"baseline": baseline, **result, "final_accuracy_difference": difference, "reason": reason}


def _paired_difference(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, float | None]:
    """Difference in final accuracy, paired by seed: runs with the same seed use the same problems."""
    after = [{run.seed: number_in(run.summary, "accuracy_after", "mean") for run in side} for side in (runs, baseline)]
    pairs = [(after[0][seed], after[1][seed]) for seed in sorted(after[0].keys() & after[1].keys())]
    values = [accuracy - other for accuracy, other in pairs if accuracy is not None and other is not None]
    interval = interval_over_seeds(values) if values else Interval(math.nan, math.nan, math.nan)
    return interval.as_dict()


def number_in(record: dict[str, Any], *keys: str) -> float | None:
    """The number at nested keys, or None if it is missing or not finite."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
