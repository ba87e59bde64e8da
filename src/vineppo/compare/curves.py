"""Align the runs of an arm to a mean learning curve, and compare arms by the resources that they need.

The resources are optimizer updates, generated tokens, trained tokens and seconds of training. An arm has several runs,
one for each seed. Its curve is the mean accuracy of these runs as a function of the number of updates. Each point of
the curve also has the mean numbers of tokens and seconds that the runs had used after that number of updates. Therefore
"the first point at which a curve reaches an accuracy" is the same point for all resources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vineppo.compare.records import Evaluation, RunRecord
from vineppo.statistics import interval_over_seeds, log_ratio_interval

AXES = ("updates", "tokens", "trained", "seconds")
"""Names of the resources: optimizer updates, generated tokens, trained tokens and seconds of training. Each resource is
an attribute of `Evaluation`, `Curves` and `Reach`, and the x axis of a plot."""
_TIE = 1e-9
"""Accuracies that differ by less than this count as equal, because means of floats have rounding errors."""


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
    """KL divergence from the starting model in nats per response, shape (N, E), NaN where it was not measured; None if
    it never was."""

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
        values = [[_number(getattr(e, field)) for e in run.evaluations] for run in runs]
        return np.stack([np.interp(grid, x, y) for x, y in zip(knots, values, strict=True)])

    kl = rows("kl")
    used = (rows("tokens"), rows("trained"), rows("seconds"))
    return Curves(grid, rows("accuracy"), *used, None if np.isnan(kl).all() else kl)


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


def _number(value: float | None) -> float:
    """Return NaN for a missing number."""
    return math.nan if value is None else float(value)


def at_equal_amounts(curves: Mapping[str, Curves | None]) -> dict[str, Any]:
    """For each resource, compute the accuracy of each arm after the same amount of the resource.

    This amount is the smallest amount that any run had used at the end of the curves of its arm. The accuracy of a run
    is interpolated linearly between the points of its curve. If the learning rate decays until the end of a run, the
    comparison favours the run with the smallest amount, because only this run has completed its decay at that amount.

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
    is interpolated linearly between its evaluations; if no run has any, between the accuracies before and after
    training.

    Args:
        runs: the runs of the arm from whose accuracies the others are subtracted.
        baseline: the runs of the other arm.
    Returns:
        The keys `tokens` (the number of generated tokens), `mean`, `low` and `high` (difference between -1 and 1, with
        Student's t interval over seeds). All are None if no seed has evaluated runs of both arms.
    """
    evaluated = any(run.evaluations for run in (*runs, *baseline))
    found = [
        {run.seed: points for run in group if (points := run.evaluations if evaluated else run.ends)}
        for group in (runs, baseline)
    ]
    pairs = [(found[0][seed], found[1][seed]) for seed in sorted(found[0].keys() & found[1].keys())]
    if not pairs:
        return {"tokens": None, "mean": None, "low": None, "high": None}
    tokens = min(evaluations[-1].tokens for pair in pairs for evaluations in pair)

    def accuracy(evaluations: Sequence[Evaluation]) -> float:
        return float(np.interp(tokens, [e.tokens for e in evaluations], [e.accuracy for e in evaluations]))

    differences = [accuracy(own) - accuracy(other) for own, other in pairs]
    return {"tokens": tokens, **interval_over_seeds(differences).as_dict()}
