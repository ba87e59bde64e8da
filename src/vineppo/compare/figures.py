"""Compute the results of a comparison from its finished runs: accuracies, learning curves and used resources."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from vineppo.compare.curves import (
    AXES,
    Curves,
    align,
    at_equal_amounts,
    difference_at_equal_tokens,
    first_reach,
    versus,
)
from vineppo.compare.records import RunRecord, number_in, shape_of
from vineppo.compare.spec import Arm
from vineppo.statistics import interval_over_seeds


def analyse(runs: Sequence[RunRecord], arms: Sequence[Arm], baselines: Collection[str] = ()) -> dict[str, Any]:
    """Compute the results that `compare.json` contains.

    The first arm is compared with two others. One is the second arm, which is called the reference. The other is the
    arm that has the highest final accuracy, not counting the first arm and arms with less than half of the finished
    runs that another of them has. In addition, the best arm that is no baseline is compared with the best baseline
    (`_best_versus_baseline`).

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
        "vs_best": pair(first, _best(finals, _with_enough_runs([n for n in labels if n != first], grouped))),
        "best_vs_baseline": _best_versus_baseline(finals, baselines, pair, grouped),
        "equal": at_equal_amounts(curves),
    }


def _best(finals: Mapping[str, float | None], names: Sequence[str]) -> str | None:
    """Return the one of `names` with the highest mean final accuracy, or None if none of them has one."""
    known = {name: final for name in names if (final := finals[name]) is not None}
    return max(known, key=lambda name: known[name], default=None)


def _with_enough_runs(names: Sequence[str], grouped: Mapping[str, list[RunRecord]]) -> list[str]:
    """Return those of `names` that have at least half of the finished runs of the one with the most."""
    most = max((len(grouped[name]) for name in names), default=0)
    return [name for name in names if 2 * len(grouped[name]) >= most]


def _best_versus_baseline(
    finals: Mapping[str, float | None],
    baselines: Collection[str],
    pair: Callable[[str, str | None], dict[str, Any]],
    grouped: Mapping[str, list[RunRecord]],
) -> dict[str, Any]:
    """Compare the best arm that is no baseline with the best baseline.

    The best arm of a class is the one with the highest mean final accuracy, the first one if several are equal. An arm
    with less than half of the finished runs that another arm of its class has is not chosen. The best arm is chosen
    from the same runs as the result. So with many arms in a class, its accuracy is too high on average: choose
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
    arm, baseline = (
        _best(finals, _with_enough_runs([name for name in finals if (name in baselines) is wanted], grouped))
        for wanted in (False, True)
    )
    if arm is None or baseline is None:
        absent = "a baseline" if arm is not None else "an arm that is no baseline"
        unknown = _without_ratios(baseline, f"no finished run of {absent} was evaluated during training")
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


def _curve_figures(curves: Curves) -> dict[str, Any]:
    """Return the curve of an arm for `compare.json`: name of a quantity -> list of its E values.

    The values are means over the runs. The bounds of the accuracy are those of Student's t interval; they are None if
    there is only one run. A KL divergence that a run did not measure is None. `best_accuracy` and `best_updates` are
    the highest mean accuracy and its number of updates.
    """
    band = [interval_over_seeds(column).as_dict() for column in curves.accuracy.T]
    mean = curves.accuracy.mean(axis=0)
    return {
        "updates": curves.updates.tolist(),
        "tokens": curves.tokens.mean(axis=0).tolist(),
        "trained": curves.trained.mean(axis=0).tolist(),
        "seconds": curves.seconds.mean(axis=0).tolist(),
        "kl": None if curves.kl is None else [_known(value) for value in curves.kl.mean(axis=0).tolist()],
        "accuracy": mean.tolist(),
        "accuracy_low": [point["low"] for point in band],
        "accuracy_high": [point["high"] for point in band],
        "best_accuracy": float(mean.max()),
        "best_updates": float(curves.updates[int(mean.argmax())]),
    }


def _known(value: float) -> float | None:
    """Return None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


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
        return _without_ratios(baseline, f"no finished run of {absent} was evaluated during training")
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
