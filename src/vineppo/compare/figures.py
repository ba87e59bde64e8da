"""Compute the results of a comparison from its finished runs: accuracies, learning curves and used resources.

The resources are optimizer updates, generated tokens, trained tokens and seconds of training. An arm has several runs,
one for each seed. Its curve is the mean accuracy of these runs as a function of the number of updates. Each point of
the curve also has the mean numbers of tokens and seconds that the runs had used after that number of updates. Therefore
"the first point at which a curve reaches an accuracy" is the same point for all resources.

Only `load_run` reads files; the other functions are pure.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vineppo.compare.spec import Arm
from vineppo.run.directory import RunDirectory
from vineppo.statistics import interval_over_seeds, log_ratio_interval

AXES = ("updates", "tokens", "trained", "seconds")
"""Names of the resources: optimizer updates, generated tokens, trained tokens and seconds of training. Each resource is
an attribute of `Evaluation`, `Curves` and `Reach`, and the x axis of a plot."""
_TIE = 1e-9
"""Accuracies that differ by less than this count as equal, because means of floats have rounding errors."""


@dataclass(frozen=True)
class Evaluation:
    """The accuracy at one evaluation during a run, and the resources that the run had used by then."""

    updates: float
    """Number of optimizer updates since the start of the run."""
    tokens: float
    """Number of tokens generated for training since the start of the run, in rollouts and MC rollouts."""
    trained: float
    """Number of trained tokens since the start of the run, counted in every epoch."""
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

    arm: str
    """Name of the arm."""
    seed: int
    """Seed of the run."""
    summary: dict[str, Any]
    """The content of `summary.json`."""
    evaluations: tuple[Evaluation, ...]
    """Evaluations during the run, ordered by number of updates."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved settings of the run, as nested dictionaries: the content of `config.yaml`."""
    level: str = ""
    """Text that names the problems in titles of plots: `task.level` if the task is `chain`, else `task.name`."""


def load_run(directory: Path, arm: str = "") -> RunRecord:
    """Read the files `summary.json`, `metrics.jsonl` and `config.yaml` of a finished run.

    Args:
        directory: directory of the run.
        arm: name of its arm; by default, the name of its algorithm.
    Raises:
        UserError: if a file is damaged.
    """
    run = RunDirectory.open(directory, writable=False)
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    task = run.config.get("task", {})
    level = task.get("level", "") if task.get("name") == "chain" else task.get("name", "")
    evaluations = evaluations_of(run.read_metrics())
    return RunRecord(arm or summary["algorithm"], int(summary["seed"]), summary, evaluations, run.config, level)


def evaluations_of(lines: Sequence[dict[str, Any]]) -> tuple[Evaluation, ...]:
    """Return the evaluations in the lines of metrics.jsonl, ordered by number of updates."""
    has_kl = any(line.get("kl/ref") is not None for line in lines)
    evaluations = [_evaluation(line, has_kl) for line in lines if line.get("eval/accuracy") is not None]
    # Several evaluations can have the same number of updates, but a curve has one accuracy for each. Keep the last one.
    unique = {evaluation.updates: evaluation for evaluation in evaluations}
    return tuple(unique[updates] for updates in sorted(unique))


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
        trained=float(record.get("tokens/trained", 0)),
        seconds=float(record.get("seconds/train", 0)),
        accuracy=float(record["eval/accuracy"]),
        kl=None if kl is None else float(kl),
    )


@dataclass(frozen=True)
class Curves:
    """The learning curves of the N runs of one arm, all interpolated at the same E numbers of updates."""

    updates: np.ndarray
    """The E numbers of updates in increasing order, shape (E,). They are the numbers of updates at which at least one
    run was evaluated, within the range of updates that the evaluations of every run cover."""
    accuracy: np.ndarray
    """Accuracy between 0 and 1, shape (N, E)."""
    tokens: np.ndarray
    """Number of tokens generated since the start of the run, shape (N, E)."""
    trained: np.ndarray
    """Number of trained tokens since the start of the run, shape (N, E)."""
    seconds: np.ndarray
    """Seconds of training since the start of the run, shape (N, E)."""
    kl: np.ndarray | None
    """KL divergence from the starting model in nats, shape (N, E), or None if an evaluation has no KL divergence."""

    def without(self, run: int) -> Curves:
        """Return the curves without one run, given by its index, 0 <= run < N."""
        kept = np.arange(len(self.accuracy)) != run
        kl = None if self.kl is None else self.kl[kept]
        used = (self.tokens[kept], self.trained[kept], self.seconds[kept])
        return Curves(self.updates, self.accuracy[kept], *used, kl)


def align(runs: Sequence[RunRecord]) -> Curves | None:
    """Interpolate the runs of one arm at the same numbers of updates.

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
    used = (rows("tokens"), rows("trained"), rows("seconds"))
    return Curves(grid, rows("accuracy"), *used, rows("kl") if has_kl else None)


@dataclass(frozen=True)
class Reach:
    """The resources that an arm had used when its curve first reached a given accuracy (mean over its runs)."""

    updates: float
    """Number of optimizer updates."""
    tokens: float
    """Number of generated tokens."""
    trained: float
    """Number of trained tokens."""
    seconds: float
    """Seconds of training, without evaluation."""


def first_reach(curves: Curves, level: float) -> Reach | None:
    """Return the resources used at the first point at which the mean accuracy reaches `level`.

    Between evaluations, the accuracy and the resources are interpolated linearly.

    Args:
        curves: the curves of one arm. The mean is over its runs.
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

    used = (curves.tokens, curves.trained, curves.seconds)
    return Reach(amount(curves.updates), *(amount(rows.mean(axis=0)) for rows in used))


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


def versus(curves: Curves, baseline: Curves, *, level: float = 0.95) -> dict[str, Any]:
    """Compare the resources that an algorithm and a baseline need to reach the baseline's best accuracy.

    The best accuracy is the maximum of the baseline's mean curve. The ratio of a resource is the amount that the
    baseline needs to reach this accuracy, divided by the amount that the algorithm needs. So a ratio of 3 means that
    the algorithm needs a third of the baseline's amount. The ratio is None if the algorithm never reaches the accuracy,
    or if it starts at or above the accuracy.

    The intervals of the ratios are log-ratio t intervals (`log_ratio_interval`): the comparison is repeated without
    each run in turn, and the best accuracy is determined again each time. Both bounds are None if one of the two has
    only one run, or if there is no ratio without one of the runs, for example because the algorithm then never reaches
    the accuracy.

    Args:
        curves: curves of the algorithm.
        baseline: curves of the baseline.
        level: confidence level of the intervals, between 0 and 1.
    Returns:
        A dictionary with the keys `baseline_best_accuracy`, `reach` (resources of the algorithm), `baseline_reach`
        (resources of the baseline), `<axis>_ratio` and `<axis>_ratio_interval` for each of `AXES`, and
        `share_reached_without_one_run` (share of the repetitions without one run in which the algorithm reaches the
        best accuracy; None if one of the two has only one run).
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
        return {**result, **unknown, "share_reached_without_one_run": None}
    groups = (
        [_ratios(curves.without(run), baseline) for run in range(num_runs)],
        [_ratios(curves, baseline.without(run)) for run in range(num_baseline_runs)],
    )
    for axis in AXES:
        # A missing ratio is NaN, and the bounds are then NaN, too.
        without_one = [[_number(ratios[axis]) for _, _, ratios in group] for group in groups]
        interval = log_ratio_interval(_number(ratios[axis]), without_one, level).as_dict()
        result[f"{axis}_ratio_interval"] = {"low": interval["low"], "high": interval["high"]}
    reached = [reach is not None for group in groups for reach, _, _ in group]
    return {**result, "share_reached_without_one_run": sum(reached) / len(reached)}


def _number(ratio: float | None) -> float:
    """Return NaN for a missing ratio."""
    return math.nan if ratio is None else ratio


def at_equal_amounts(curves: Mapping[str, Curves | None]) -> dict[str, Any]:
    """For each resource, compute the accuracy of each arm after the same amount of the resource.

    This amount is the smallest total amount that any run used. The accuracy of a run is interpolated linearly between
    its evaluations. If the learning rate decays until the end of a run, the comparison favours the run with the
    smallest total amount, because only this run has completed its decay at the compared amount.

    Args:
        curves: name of the arm -> its curves, or None if it has no curves.
    Returns:
        A dictionary from each of `AXES` to a dictionary with the keys `amount` and `accuracy` (name of the arm -> mean
        and interval over seeds). A resource is left out if a run has used or recorded nothing of it. The dictionary is
        empty if fewer than two arms have curves.
    """
    evaluated = {name: curve for name, curve in curves.items() if curve is not None}
    result = {}
    for axis in AXES if len(evaluated) > 1 else ():
        used = {
            name: np.broadcast_to(getattr(curve, axis), curve.accuracy.shape) for name, curve in evaluated.items()
        }  # (N, E)
        amount = min(float(rows[:, -1].min()) for rows in used.values())
        if amount == 0:
            continue
        accuracy = {
            name: interval_over_seeds(
                [float(np.interp(amount, x, y)) for x, y in zip(used[name], curve.accuracy, strict=True)]
            )
            for name, curve in evaluated.items()
        }
        result[axis] = {"amount": amount, "accuracy": {name: mean.as_dict() for name, mean in accuracy.items()}}
    return result


def difference_at_equal_tokens(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, float | None]:
    """Compute the difference in accuracy between two arms after the same number of generated tokens, paired by seed.

    The number of tokens is the smallest total that a run of the two arms with a common seed used. The accuracy of a run
    is interpolated linearly between its evaluations.

    Args:
        runs: the runs of the arm from whose accuracies the others are subtracted.
        baseline: the runs of the other arm.
    Returns:
        The keys `tokens` (the number of generated tokens), `mean`, `low` and `high` (difference between -1 and 1, with
        Student's t interval over seeds). All are None if no seed has evaluated runs of both arms.
    """
    found = [{run.seed: run.evaluations for run in group if run.evaluations} for group in (runs, baseline)]
    pairs = [(found[0][seed], found[1][seed]) for seed in sorted(found[0].keys() & found[1].keys())]
    if not pairs:
        return {"tokens": None, "mean": None, "low": None, "high": None}
    tokens = min(evaluations[-1].tokens for pair in pairs for evaluations in pair)

    def accuracy(evaluations: Sequence[Evaluation]) -> float:
        return float(np.interp(tokens, [e.tokens for e in evaluations], [e.accuracy for e in evaluations]))

    differences = [accuracy(own) - accuracy(other) for own, other in pairs]
    return {"tokens": tokens, **interval_over_seeds(differences).as_dict()}


def analyse(runs: Sequence[RunRecord], arms: Sequence[Arm], baselines: Collection[str] = ()) -> dict[str, Any]:
    """Compute the results that `compare.json` contains.

    The first arm is compared with two others. One is the second arm, which is called the reference. The other is the
    arm that has the highest final accuracy, not counting the first arm. In addition, the best arm that is no baseline
    is compared with the best baseline (`_best_versus_baseline`).

    Args:
        runs: the finished runs of all arms.
        arms: the compared arms, in the order of the tables.
        baselines: names of the arms that are baselines.
    Returns:
        A dictionary with the keys `arms` (name -> results, which are None if the arm has no finished run), `first` and
        `reference` (names of the first and the second arm), `vs_reference` and `vs_best` (results of the two
        comparisons), `best_vs_baseline`, `baselines` and `equal` (accuracies at equal amounts of each resource).
    """
    labels = {arm.name: arm.label for arm in arms}
    grouped = {name: sorted((r for r in runs if r.arm == name), key=lambda r: r.seed) for name in labels}
    curves = {name: align(group) for name, group in grouped.items()}
    first, reference = arms[0].name, arms[1].name if len(arms) > 1 else None
    figures = {arm.name: _arm_figures(arm, grouped[arm.name], curves[arm.name]) for arm in arms}
    reference_curve = curves[reference] if reference else None
    for name, curve in curves.items():
        reach = None
        if reference_curve is not None and curve is not None:
            reach = first_reach(curve, float(reference_curve.accuracy.mean(axis=0).max()))
        figures[name]["reach_reference_best"] = None if reach is None else vars(reach).copy()
    finals = {name: figures[name]["final_accuracy"]["mean"] for name in labels}
    pair = functools.partial(_pair, grouped=grouped, curves=curves, labels=labels)
    return {
        "arms": figures,
        "first": first,
        "reference": reference,
        "baselines": [name for name in labels if name in baselines],
        "vs_reference": pair(first, reference),
        "vs_best": pair(first, _best(finals, [name for name in labels if name != first])),
        "best_vs_baseline": _best_versus_baseline(finals, baselines, pair, grouped),
        "equal": at_equal_amounts(curves),
    }


def _best(finals: Mapping[str, float | None], names: Sequence[str]) -> str | None:
    """Return the one of `names` with the highest mean final accuracy, or None if none of them has one."""
    known = {name: final for name in names if (final := finals[name]) is not None}
    return max(known, key=lambda name: known[name], default=None)


def _best_versus_baseline(
    finals: Mapping[str, float | None],
    baselines: Collection[str],
    pair: Callable[[str, str | None], dict[str, Any]],
    grouped: Mapping[str, list[RunRecord]],
) -> dict[str, Any]:
    """Compare the best arm that is no baseline with the best baseline.

    The best arm of a class is the one with the highest mean final accuracy, the first one if several are equal. It is
    chosen from the same runs as the result. So with many arms in a class, its accuracy is too high on average: choose
    few arms beforehand, or repeat the comparison of the two with fresh seeds. A ratio is the amount that the baseline
    needs to reach its own best mean accuracy, divided by the amount that the arm needs to reach the same accuracy
    (`versus`).

    Args:
        finals: name of the arm -> mean final accuracy, or None.
        baselines: names of the arms that are baselines.
        pair: function that compares two arms.
        grouped: name of the arm -> its finished runs.
    Returns:
        The dictionary of `_pair`, with two more keys: `arm` (name) and `difference_at_equal_tokens`. The names are None
        if a class has no arm with a final accuracy.
    """
    arm = _best(finals, [name for name in finals if name not in baselines])
    baseline = _best(finals, [name for name in finals if name in baselines])
    if arm is None or baseline is None:
        absent = "a baseline" if arm is not None else "an arm that is no baseline"
        unknown = _without_ratios(baseline, f"no finished and evaluated run of {absent}")
        return {"arm": arm, **unknown, "difference_at_equal_tokens": difference_at_equal_tokens([], [])}
    difference = difference_at_equal_tokens(grouped[arm], grouped[baseline])
    return {"arm": arm, **pair(arm, baseline), "difference_at_equal_tokens": difference}


def _arm_figures(arm: Arm, runs: Sequence[RunRecord], curves: Curves | None) -> dict[str, Any]:
    """Return the results of one arm for `compare.json`, from its finished runs and their curves."""

    # This function returns the mean and interval over the runs of one number in summary.json, found at nested keys.
    def over_seeds(*keys: str) -> dict[str, float | None]:
        return _interval([number_in(run.summary, *keys) for run in runs])

    # The gain that greedy decoding of the starting model does not have.
    above = [
        None if (greedy := number_in(run.summary, "greedy_before", "mean")) is None else after - greedy
        for run in runs
        if (after := number_in(run.summary, "accuracy_after", "mean")) is not None
    ]
    return {
        "label": arm.label,
        "colour": arm.colour,
        "algorithm": arm.algorithm,
        "settings": dict(arm.overrides),
        "cells": arm.cells,
        "shape": shape_of(runs[0].config) if runs else None,
        "num_runs": len(runs),
        "final_accuracy": over_seeds("accuracy_after", "mean"),
        "accuracy_before": over_seeds("accuracy_before", "mean"),
        "greedy_before": over_seeds("greedy_before", "mean"),
        "greedy_after": over_seeds("greedy_after", "mean"),
        "above_greedy_start": _interval(above),
        "updates": over_seeds("updates")["mean"],
        "seconds": over_seeds("seconds"),
        "seconds_eval": over_seeds("seconds_eval")["mean"],
        "tokens": {phase: over_seeds("tokens", phase)["mean"] for phase in ("rollouts", "mc", "generated", "trained")},
        "curve": None if curves is None else _curve_figures(curves),
        "per_seed": [_run_figures(run) for run in runs],
    }


def _interval(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return the mean and the interval over seeds of the known numbers, or None for all three if there are none."""
    known = [value for value in values if value is not None]
    return interval_over_seeds(known).as_dict() if known else {"mean": None, "low": None, "high": None}


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that determine its batches and steps: short name -> value, None if unknown."""
    keys = {
        "num_problems": "rollouts.num_problems",
        "group_size": "rollouts.group_size",
        "minibatch_size": "learner.minibatch_size",
        "epochs": "learner.epochs",
        "lr": "learner.lr",
        "kl": "learner.kl.coefficient",
    }
    return {name: setting_in(config, key) for name, key in keys.items()}


def setting_in(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key in nested dictionaries, or None if it is missing."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _curve_figures(curves: Curves) -> dict[str, Any]:
    """Return the curve of an arm for `compare.json`: name of a quantity -> list of its E values.

    The values are means over the runs. The bounds of the accuracy are those of Student's t interval; they are None if
    there is only one run. `best_accuracy` and `best_updates` are the highest mean accuracy and its number of updates.
    """
    band = [interval_over_seeds(column).as_dict() for column in curves.accuracy.T]
    mean = curves.accuracy.mean(axis=0)
    return {
        "updates": curves.updates.tolist(),
        "tokens": curves.tokens.mean(axis=0).tolist(),
        "trained": curves.trained.mean(axis=0).tolist(),
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

    It is a row of `compare.csv`, and an entry of the list `per_seed` of the arm in `compare.json`.
    """
    figures: dict[str, Any] = {"arm": run.arm, "algorithm": run.summary.get("algorithm"), "seed": run.seed}
    for key in ("accuracy_before", "accuracy_after", "greedy_before", "greedy_after"):
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
    """Compare an arm with another one, which is called its baseline.

    Args:
        first: name of the arm.
        baseline: name of the baseline, or None if there is no other arm with a finished run.
        grouped: name of the arm -> its finished runs.
        curves: name of the arm -> its curves, or None if it has no curves.
        labels: name of the arm -> its label, which is the name shown to users.
    Returns:
        The dictionary that `versus` returns, with three more keys: `baseline`, `final_accuracy_difference` and `reason`
        (why the ratios are None, else None). If one of the two has no curves, the keys are `baseline`, `reason`, and
        the ratios and their intervals, which are None.
    """
    first_curves = curves[first]
    baseline_curves = curves[baseline] if baseline else None
    if baseline is None or first_curves is None or baseline_curves is None:
        absent = labels[first] if first_curves is None else labels[baseline] if baseline else "a second arm"
        return _without_ratios(baseline, f"no finished and evaluated run of {absent}")
    result = versus(first_curves, baseline_curves)
    reason = None
    if result["reach"] is None:
        reason = f"{labels[first]} never reached the best accuracy of {labels[baseline]}"
    elif result["updates_ratio"] is None:
        reason = f"{labels[first]} starts at or above the best accuracy of {labels[baseline]}"
    difference = _paired_difference(grouped[first], grouped[baseline])
    return {"baseline": baseline, **result, "final_accuracy_difference": difference, "reason": reason}


def _without_ratios(baseline: str | None, reason: str) -> dict[str, Any]:
    """Return the result of a comparison of two arms that have no ratios."""
    empty: dict[str, Any] = {f"{axis}_ratio": None for axis in AXES}
    empty |= {f"{axis}_ratio_interval": {"low": None, "high": None} for axis in AXES}
    return {"baseline": baseline, **empty, "reason": reason}


def _paired_difference(runs: Sequence[RunRecord], baseline: Sequence[RunRecord]) -> dict[str, float | None]:
    """Return the mean difference in final accuracy between two arms, with its interval over seeds.

    The difference is computed for each seed, because runs with the same seed use the same problems.

    Args:
        runs: the runs of the arm from whose accuracies the others are subtracted.
        baseline: the runs of the other arm.
    Returns:
        The keys `mean`, `low` and `high` -> difference between -1 and 1, or None if it is unknown.
    """
    after = [
        {run.seed: number_in(run.summary, "accuracy_after", "mean") for run in group} for group in (runs, baseline)
    ]
    pairs = [(after[0][seed], after[1][seed]) for seed in sorted(after[0].keys() & after[1].keys())]
    return _interval([None if own is None or other is None else own - other for own, other in pairs])


def number_in(record: dict[str, Any], *keys: str) -> float | None:
    """Return the number at `record[key1][key2]...` for any number of keys, or None if it is missing or not finite."""
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
