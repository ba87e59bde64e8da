"""Write the report of `vineppo values`, and draw its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vineppo.measure.output import about_brackets, heading, interval, table
from vineppo.run.figures import band, canvas, finish, legend_below, save

_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
"""Colours that people with colour blindness can distinguish (Okabe and Ito 2008), and a grey."""
_MARKERS = "os^DvPX*"


def markdown(result: Mapping[str, Any]) -> str:
    """Return the text of values.md from the content of values.json."""
    estimates = result["estimates"]
    lines = [
        *heading(result, "Are the values right?"),
        f"{result['num_states']} states of {result['num_responses']} responses to {result['num_problems']} problems. "
        f"A gold value is the mean reward of {result['gold']} continuations that no estimate uses; its noise has the "
        f"standard deviation {result['gold_noise']:.3f}, and the gold values have {result['gold_spread']:.3f}. The "
        f"mean reward is {result['mean_reward']:.3f}. {about_brackets(result['num_problems'])} Errors are against "
        "exact values: the noise of gold is subtracted.",
        "",
        *(
            []
            if result["gold_spread"]
            else ["**All gold values are equal, so there is nothing to tell apart; give another task or model.**", ""]
        ),
    ]
    lines += table(
        ["estimate", "bias", "RMSE", "explained variance", "explained within", "calibration error"],
        [[label, *(interval(e.get(key)) for key in _VALUE_COLUMNS)] for label, e in estimates.items()],
    )
    lines += [
        "",
        "Explained variance is 1 - MSE / variance of the exact values. Its zero line is one constant for all states, "
        "their mean value. The zero line of *explained within* is one constant per problem, the mean value of its "
        "states: an estimate below 0 says less about the states of a problem than the problem alone.",
        "",
    ]
    first = next(iter(estimates.values()))
    lines += table(
        ["estimate", "correlation", "within problems", "RMSE of advantages", "sign of advantages"],
        [[label, *(interval(e.get(key)) for key in _STEP_COLUMNS)] for label, e in estimates.items()]
        + [["exact values", interval(first.get("ceiling")), interval(first.get("ceiling_within")), "0", "1"]],
    )
    lines += [
        "",
        "The row *exact values* is the ceiling: the correlation that the noise of gold allows. The sign is that of the "
        "steps whose gold advantage is more than two standard errors from 0; a guess has 0.5.",
        "",
    ]
    lines += _labels(result) + _depths(result) + _choices(result)
    lines += ["Plots: [calibration.png](calibration.png), [depth.png](depth.png).", ""]
    return "\n".join(lines)


_VALUE_COLUMNS = ("bias", "rmse", "explained_variance", "explained_within", "calibration_error")
_STEP_COLUMNS = ("correlation", "correlation_within", "advantage_rmse", "sign_accuracy")


def _labels(result: Mapping[str, Any]) -> list[str]:
    """Return the lines about good and bad states."""
    rows = [
        [label, interval(e.get("bad_called_good")), interval(e.get("good_called_bad"))]
        for label, e in result["estimates"].items()
    ]
    return [
        f"A state is good if its value is at least {result['threshold']:g}. States that gold cannot tell apart from "
        "that (two standard errors) are left out.",
        "",
        *table(["estimate", "bad states called good", "good states called bad"], rows),
        "",
    ]


def _depths(result: Mapping[str, Any]) -> list[str]:
    """Return the lines about the error along the response."""
    bins = len(result["states_per_depth"])
    head = ["estimate", *(f"{b / bins:.1f} to {(b + 1) / bins:.1f}" for b in range(bins)), "last - first", "error"]
    rows = [
        [
            label,
            *(interval({"mean": e.get(f"depth_{b}", {}).get("mean")}) for b in range(bins)),
            interval(e.get("trend")),
            result["picture"][label],
        ]
        for label, e in result["estimates"].items()
    ]
    return [
        "RMSE by depth (share of the steps of the response before the state), and RMSE over the last two fifths minus "
        "RMSE over the first two fifths:",
        "",
        *table(head, rows),
        "",
    ]


def _choices(result: Mapping[str, Any]) -> list[str]:
    """Return the lines about the choice among five next steps."""
    choices = result["choices"]
    if not choices:
        return ["One of five: no state was found at which the sampled next steps differ in value.", ""]
    rows = [
        [label, *(interval(e[key]) for key in ("accuracy", "chance", "regret", "chance_regret"))]
        for label, e in choices["estimates"].items()
    ]
    return [
        f"One of five: at {choices['states']} of {choices['sampled_states']} states, gold tells at least one of five "
        "sampled next steps apart from the best. Accuracy is the probability that the chosen step is among the best "
        "(within two standard errors of gold), regret the gold value that the choice loses:",
        "",
        *table(["estimate", "accuracy", "chance", "regret", "regret of chance"], rows),
        "",
    ]


def plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw calibration.png and depth.png, and return their paths."""
    return [save(_calibration(result), folder / "calibration.png"), save(_depth(result), folder / "depth.png")]


def _shown(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the estimates in the plots: all but middle numbers of continuations, which would cover the others."""
    labels = list(result["estimates"])
    fresh, reuse = ([label for label in labels if label.startswith(kind)] for kind in ("fresh", "reuse"))
    hidden = {*fresh[1:-1], *reuse[:-1]}
    return {label: estimate for label, estimate in result["estimates"].items() if label not in hidden}


def _subtitle(result: Mapping[str, Any]) -> str:
    return (
        f"{result['num_states']} states of {result['num_problems']} problems, gold from {result['gold']} continuations"
    )


def _calibration(result: Mapping[str, Any]) -> Any:
    """Plot the mean gold value over the mean estimate of each bin."""
    figure, axes = canvas("Calibration of the values", _subtitle(result))
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--", label="exact")
    for n, (label, estimate) in enumerate(_shown(result).items()):
        x, y, counts = zip(*estimate["calibration"], strict=True) if estimate["calibration"] else ((), (), ())
        colour, marker = _COLOURS[n % len(_COLOURS)], _MARKERS[n % len(_MARKERS)]
        axes.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        sizes = [12 + 120 * count / max(counts) for count in counts]
        axes.scatter(x, y, s=sizes, color=colour, marker=marker, alpha=0.8, linewidths=0, label=label)
    finish(axes, "estimated value", "gold value")
    legend_below(axes)
    return figure


def _depth(result: Mapping[str, Any]) -> Any:
    """Plot the RMSE of every estimate over the depth, with its interval."""
    figure, axes = canvas("Error of the values along the response", _subtitle(result))
    bins = len(result["states_per_depth"])
    places = [(b + 0.5) / bins for b in range(bins)]
    for n, (label, estimate) in enumerate(_shown(result).items()):
        rows = [estimate.get(f"depth_{b}", {}) for b in range(bins)]
        colour = _COLOURS[n % len(_COLOURS)]
        known = [(x, row["mean"]) for x, row in zip(places, rows, strict=True) if row.get("mean") is not None]
        band(axes, places, [r.get("low") for r in rows], [r.get("high") for r in rows], colour, None)
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, marker=_MARKERS[n % len(_MARKERS)], label=label)
    finish(axes, "depth: share of the steps before the state", "RMSE against exact values")
    axes.set_ylim(bottom=0)
    legend_below(axes)
    return figure
