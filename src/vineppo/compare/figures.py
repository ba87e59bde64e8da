"""Compute the results of a comparison from its finished runs: accuracies, learning curves and used resources.

The resources are optimizer updates, generated tokens and seconds of training. An algorithm has several runs, one for
each seed. Its curve is the mean accuracy of these runs as a function of the number of updates. Each point of the curve
also has the mean number of tokens and seconds that the runs had used after that number of updates. Therefore "the first
point at which a curve reaches an accuracy" is the same point for all three resources.

Only `load_run` reads files; the other functions are pure.
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
"""Names of the resources: optimizer updates, generated tokens and seconds of training. Each resource is an attribute of
`Evaluation`, `Curves` and `Reach`, and the x axis of a plot."""
_TIE = 1e-9
"""Accuracies that differ by less than this count as equal, because means of floats have rounding errors."""


@dataclass(frozen=True)
class Evaluation:
    """The accuracy at one evaluation during a run, and the resources that the run had used by then."""

    updates: float
    """Number of optimizer updates since the start of the run."""
    tokens: float
    """Number of tokens generated for training since the start of the run, in rollouts and MC rollouts."""
    seconds: float
    """Seconds of training since the start of the run, without evaluation."""
    accuracy: float
    """Accuracy on the validation problems, between 0 and 1 (the metric `eval/accuracy`)."""
    kl: float | None
    """KL divergence from the starting model in nats per response (the metric `kl/ref`), or None if it was not
    measured."""


@dataclass(frozen=True)
class RunRecord:
    """The data of one finished run that the analysis uses."""

    algorithm: str
    """Name of the algorithm."""
    seed: int
    """Seed of the run."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    evaluations: tuple[Evaluation, ...]
    """Evaluations during the run, ordered by number of updates."""
    level: str = ""
    """Text that names the problems in titles of plots: `task.level` if the task is `chain`, else `task.name`."""


def load_run(directory: Path) -> RunRecord:
    """Read the files `summary.json`, `metrics.jsonl` and `config.yaml` of a finished run.

    Raises:
        UserError: if a file is damaged.
    """
    run = RunDirectory.open(directory, writable=False)
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    lines = run.read_metrics()
    has_kl = any(line.get("kl/ref") is not None for line in lines)
    evaluations = [_evaluation(line, has_kl) for line in lines if line.get("eval/accuracy") is not None]
    # Several evaluations can have the same number of updates, but a curve has one accuracy for each. Keep the last one.
    unique = {evaluation.updates: evaluation for evaluation in evaluations}
    task = run.config.get("task", {})
    level = task.get("level", "") if task.get("name") == "chain" else task.get("name", "")
    ordered = tuple(unique[updates] for updates in sorted(unique))
    return RunRecord(summary["algorithm"], int(summary["seed"]), summary, ordered, level)


def _evaluation(record: dict[str, Any], has_kl: bool) -> Evaluation:
    """Convert a line of metrics.jsonl to an evaluation.

    Args:
        record: the line as a dictionary. It must have an accuracy.
        has_kl: whether any line of the run has a KL divergence.
    """
    kl = record.get("kl/ref")
    if kl is None and has_kl and record["updates"] == 0:
        kl = 0.0  # The KL is not measured before the first update. At that time the policy equals the reference model.
    return Evaluation(
        updates=float(record["updates"]),
        tokens=float(record.get("tokens/generated", 0)),
        seconds=float(record.get("seconds/train", 0)),
        accuracy=float(record["eval/accuracy"]),
        kl=None if kl is None else float(kl),
    )


@dataclass(frozen=True)
class Curves:
    """The learning curves of the N runs of one algorithm, all interpolated at the same E numbers of updates."""

    updates: np.ndarray
    """The E numbers of updates in increasing order, shape (E,). They are the numbers of updates at which at least one
    run was evaluated, within the range of updates that the evaluations of every run cover."""
    accuracy: np.ndarray
    """Accuracy between 0 and 1, shape (N, E)."""
    tokens: np.ndarray
    """Number of tokens generated since the start of the run, shape (N, E)."""
    seconds: np.ndarray
    """Seconds of training since the start of the run, shape (N, E)."""
    kl: np.ndarray | None
    """KL divergence from the starting model in nats, shape (N, E), or None if an evaluation has no KL divergence."""

    def resampled(self, rows: np.ndarray) -> Curves:
        """Return the curves of a bootstrap resample, in which a run can occur several times or not at all.

        Args:
            rows: indices of the resampled runs, shape (N,).
        """
        kl = None if self.kl is None else self.kl[rows]
        return Curves(self.updates, self.accuracy[rows], self.tokens[rows], self.seconds[rows], kl)


def align(runs: Sequence[RunRecord]) -> Curves | None:
    """Interpolate the runs of one algorithm at the same numbers of updates.

    The curves are interpolated at all numbers of updates at which at least one run was evaluated. Between these points
    the mean of the piecewise linear curves is linear, so more points would not change the result. The curves are not
    extrapolated beyond the first and last evaluation of any run.

    Returns:
        The curves. None if there is no run, if a run has no evaluation, or if no number of updates is within the range
        of all runs.
    """
    if not runs or not all(run.evaluations for run in runs):
        return None
    # For each run, the numbers of updates at which it was evaluated.
    knots = [np.array([e.updates for e in run.evaluations]) for run in runs]
    first, last = max(x[0] for x in knots), min(x[-1] for x in knots)
    grid = np.unique(np.concatenate(knots))
    grid = grid[(grid >= first) & (grid <= last)]  # (E,)
    if grid.size == 0:
        return None

    # This function interpolates one field of `Evaluation` at the points of the grid, for each run.
    def rows(field: str) -> np.ndarray:  # (N, E)
        values = [[float(getattr(e, field)) for e in run.evaluations] for run in runs]
        return np.stack([np.interp(grid, x, y) for x, y in zip(knots, values, strict=True)])

    has_kl = all(e.kl is not None for run in runs for e in run.evaluations)
    return Curves(grid, rows("accuracy"), rows("tokens"), rows("seconds"), rows("kl") if has_kl else None)


@dataclass(frozen=True)
class Reach:
    """The resources that an algorithm had used when its curve first reached a given accuracy (mean over its runs)."""

    updates: float
    """Number of optimizer updates."""
    tokens: float
    """Number of generated tokens."""
    seconds: float
    """Seconds of training, without evaluation."""


def first_reach(curves: Curves, level: float) -> Reach | None:
    """Return the resources used at the first point at which the mean accuracy reaches `level`.

    Between evaluations, the accuracy and the resources are interpolated linearly.

    Args:
        curves: the curves of one algorithm. The mean is over its runs.
        level: an accuracy between 0 and 1.
    Returns:
        The resources, or None if the mean accuracy never reaches `level`.
    """
    mean = curves.accuracy.mean(axis=0)  # (E,)
    reached = np.flatnonzero(mean >= level - _TIE)
    if reached.size == 0:
        return None
    after = int(reached[0])
    before = max(after - 1, 0)
    rise = float(mean[after] - mean[before])
    # The mean accuracy reaches `level` after this share of the way from the point `before` to the point `after`.
    share = min(1.0, float(level - mean[before]) / rise) if rise > 0 else 1.0

    # This function interpolates a quantity, given at all E points, at the point where `level` is reached.
    def amount(values: np.ndarray) -> float:
        return float(values[before] + share * (values[after] - values[before]))

    return Reach(amount(curves.updates), amount(curves.tokens.mean(axis=0)), amount(curves.seconds.mean(axis=0)))


def _ratios(curves: Curves, baseline: Curves) -> tuple[Reach | None, Reach, dict[str, float | None]]:
    """Compute the resources that an algorithm and a baseline need to reach the best mean accuracy of the baseline.

    Args:
        curves: the curves of the algorithm.
        baseline: the curves of the baseline.
    Returns:
        A tuple of three entries. First, the resources of the algorithm, or None if it never reaches the accuracy.
        Second, the resources of the baseline. Third, a dictionary from each of `AXES` to the amount of the baseline
        divided by the amount of the algorithm; the values are None if the algorithm never reaches the accuracy or needs
        an amount of 0.
    """
    level = float(baseline.accuracy.mean(axis=0).max())
    reach, baseline_reach = first_reach(curves, level), first_reach(baseline, level)
    assert baseline_reach is not None, "a curve reaches its maximum"
    ratios: dict[str, float | None] = dict.fromkeys(AXES)
    if reach is not None:
        amounts = {axis: (getattr(baseline_reach, axis), getattr(reach, axis)) for axis in AXES}
        ratios = {axis: above / below if below > 0 else None for axis, (above, below) in amounts.items()}
    return reach, baseline_reach, ratios


def versus(
    curves: Curves, baseline: Curves, *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Compare the resources that an algorithm and a baseline need to reach the baseline's best accuracy.

    The best accuracy is the maximum of the baseline's mean curve. The ratio of a resource is the amount that the
    baseline needs to reach this accuracy, divided by the amount that the algorithm needs. So a ratio of 3 means that
    the algorithm needs a third of the baseline's amount. The ratio is None if the algorithm never reaches the accuracy,
    or if it starts at or above the accuracy.

    The intervals of the ratios are bootstrap percentiles: the runs of both algorithms are resampled, and the best
    accuracy is determined again in each resample. The ratio counts as minus infinity in a resample in which the
    algorithm never reaches the best accuracy, and as infinity in a resample in which only the algorithm starts at the
    best accuracy. A bound that is infinite is None. If one of the two has only one run, both bounds are None.

    Args:
        curves: curves of the algorithm.
        baseline: curves of the baseline.
        num_resamples: number of bootstrap resamples.
        seed: seed of the resampling.
        level: confidence level of the intervals, between 0 and 1.
    Returns:
        A dictionary with the keys `baseline_best_accuracy`, `reach` (resources of the algorithm), `baseline_reach`
        (resources of the baseline), `<axis>_ratio` and `<axis>_ratio_interval` for each of `AXES`, and
        `share_of_resamples_reached` (share of the resamples in which the algorithm reaches the best accuracy).
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
    """Return the ratio of a bootstrap resample as a number, so that quantiles of all resamples can be computed.

    The number is -inf if the algorithm never reaches the best accuracy of the baseline. It is inf if only the algorithm
    starts at the best accuracy, and 1 if both the algorithm and the baseline start at it.

    Args:
        reach, baseline_reach, ratios: the entries of the tuple that `_ratios` returned for the resample.
        axis: name of the resource.
    """
    if reach is None:
        return -math.inf
    ratio = ratios[axis]
    if ratio is None:
        return math.inf if getattr(baseline_reach, axis) > 0 else 1.0
    return ratio


def at_equal_amounts(curves: Mapping[str, Curves | None]) -> dict[str, Any]:
    """For each resource, compute the accuracy of each algorithm after the same amount of the resource.

    This amount is the smallest total amount that any run used. The accuracy of a run is interpolated linearly between
    its evaluations. If the learning rate decays until the end of a run, the comparison favours the run with the
    smallest total amount, because only this run has completed its decay at the compared amount.

    Args:
        curves: name of the algorithm -> its curves, or None if it has no curves.
    Returns:
        A dictionary from each of `AXES` to a dictionary with the keys `amount` and `accuracy` (name of the algorithm ->
        mean and interval over seeds). It is empty if fewer than two algorithms have curves.
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
    """Compute the results that `compare.json` contains.

    The first algorithm is compared with two baselines. One is the second algorithm, which is called the reference. The
    other is the algorithm that has the highest final accuracy, not counting the first algorithm.

    Args:
        runs: the finished runs of all algorithms.
        arms: the compared algorithms, in the order of the tables.
    Returns:
        A dictionary with the keys `algorithms` (name -> results, which are None if the algorithm has no
        finished run), `first` and `reference` (names of the first and the second algorithm), `vs_reference` and
        `vs_best` (results of the two comparisons), and `equal` (accuracies at equal updates, tokens and seconds).
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
    """Return the results of one algorithm for `compare.json`, from its finished runs and their curves."""

    # This function returns the mean and interval over the runs of one number in summary.json, found at nested keys.
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
    """Return the curve of an algorithm for `compare.json`: name of a quantity -> list of its E values.

    The values are means over the runs. The bounds of the accuracy are those of Student's t interval; they are None if
    there is only one run. `best_accuracy` and `best_updates` are the highest mean accuracy and its number of updates.
    """
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
    """Return the results of one run as a flat dictionary.

    It is a row of `compare.csv`, and an entry of the list `per_seed` of the algorithm in `compare.json`.
    """
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
    """Compare the first algorithm with a baseline.

    Args:
        first: name of the first algorithm.
        baseline: name of the baseline, or None if there is no other algorithm with a finished run.
        grouped: name of the algorithm -> its finished runs.
        curves: name of the algorithm -> its curves, or None if it has no curves.
        labels: name of the algorithm -> its label, which is the name shown to users.
    Returns:
        The dictionary that `versus` returns, with three more keys: `baseline`, `final_accuracy_difference` and `reason`
        (why the ratios are None, else None). If one of the two has no curves, the keys are `baseline`, `reason`, and
        the ratios and their intervals, which are None.
    """
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
    """Return the mean difference in final accuracy between two algorithms, with its interval over seeds.

    The difference is computed for each seed, because runs with the same seed use the same problems.

    Args:
        runs: the runs of the algorithm from whose accuracies the others are subtracted.
        baseline: the runs of the other algorithm.
    Returns:
        The keys `mean`, `low` and `high` -> difference between -1 and 1, or None if it is unknown.
    """
    after = [
        {run.seed: number_in(run.summary, "accuracy_after", "mean") for run in group} for group in (runs, baseline)
    ]
    pairs = [(after[0][seed], after[1][seed]) for seed in sorted(after[0].keys() & after[1].keys())]
    values = [accuracy - other for accuracy, other in pairs if accuracy is not None and other is not None]
    interval = interval_over_seeds(values) if values else Interval(math.nan, math.nan, math.nan)
    return interval.as_dict()


def number_in(record: dict[str, Any], *keys: str) -> float | None:
    """Return the number at `record[key1][key2]...` for any number of keys, or None if it is missing or not finite."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
