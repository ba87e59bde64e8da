"""Format the results of a comparison as text: a table, and sentences below the table.

In all functions, `result` is the content of `compare.json`. The reference is the second arm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vineppo.compare.curves import AXES
from vineppo.run.markdown import table_lines

AXIS_NAMES = {
    "updates": "updates",
    "tokens": "generated tokens",
    "trained": "trained tokens",
    "seconds": "seconds",
}
"""Each of `AXES` -> its name in tables and sentences."""


def header(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the column names of the table.

    The columns of greedy decoding and of the tuning cells exist only if an arm has such numbers. If there is a
    reference, the last columns show the amount of each resource after which an arm reaches the best accuracy of the
    reference.
    """
    arms = result["arms"]
    greedy = ("greedy before", "greedy after") if _has_greedy(result) else ()
    cells = ("tuning cells",) if _has_cells(result) else ()
    tokens = ("rollout tokens", "MC tokens", "trained tokens")
    columns = ("arm", "runs", *cells, "accuracy before", "accuracy after", *greedy, "updates", *tokens, "seconds")
    if result["reference"] is None:
        return columns
    label = arms[result["reference"]]["label"]
    return (*columns, *(f"{AXIS_NAMES[axis]} to {label}'s best" for axis in AXES))


def _has_greedy(result: dict[str, Any]) -> bool:
    return any(figures["greedy_before"]["mean"] is not None for figures in result["arms"].values())


def _has_cells(result: dict[str, Any]) -> bool:
    return any(figures["cells"] is not None for figures in result["arms"].values())


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one row of text cells for each arm. The columns are those that `header` names."""
    rows: list[tuple[str, ...]] = []
    for name, figures in result["arms"].items():
        greedy = (format_percent(figures["greedy_before"]["mean"]), format_interval(figures["greedy_after"]))
        row: tuple[str, ...] = (
            name,
            _runs_cell(result, name, figures["num_runs"]),
            *((format_count(figures["cells"]),) if _has_cells(result) else ()),
            format_percent(figures["accuracy_before"]["mean"]),
            format_interval(figures["final_accuracy"]),
            *(greedy if _has_greedy(result) else ()),
            format_count(figures["updates"]),
            *(format_count(figures["tokens"][kind]) for kind in ("rollouts", "mc", "trained")),
            format_count(figures["seconds"]["mean"]),
        )
        if result["reference"] is not None:
            reach = figures["reach_reference_best"] or {}
            row = (*row, *(format_count(reach.get(axis)) for axis in AXES))
        rows.append(row)
    return rows


def _runs_cell(result: dict[str, Any], arm: str, finished: int) -> str:
    """Return the number of finished runs, such as `3 of 5 (1 failed, 1 stopped)`."""
    states = [gap.get("state", "failed") for gap in result["missing"] if gap["arm"] == arm]
    counts = [f"{states.count(state)} {state}" for state in ("failed", "stopped", "skipped") if state in states]
    return f"{finished} of {len(result['spec']['seeds'])}" + (f" ({', '.join(counts)})" if counts else "")


def conclusions(result: dict[str, Any]) -> list[str]:
    """Return the sentences below the table.

    They state the differences and ratios between arms, the accuracies at equal amounts of resources, the gains over
    greedy decoding of the starting model, and the budget.
    """
    spec = result["spec"]
    lines = [_pair_sentence(result, result["first"], result["vs_reference"])]
    said = {(result["first"], result["reference"])}
    best, classes = result["vs_best"], result["best_vs_baseline"]
    if (result["first"], best["baseline"]) not in said:
        lines.append(_pair_sentence(result, result["first"], best))
        said.add((result["first"], best["baseline"]))
    if classes["arm"] and classes["baseline"]:
        lines.append(_class_sentence(result, classes))
        if (classes["arm"], classes["baseline"]) not in said:
            lines.append(_pair_sentence(result, classes["arm"], classes))
    lines += _equal_sentences(result["equal"])
    lines.append(_sharpening_sentence(result))
    lines.append(
        f"Budget of each run: {spec['budget']}. Accuracy after: mean over runs with its 95% Student t interval. "
        f"Seconds: training without evaluation, on {result['cpu_count']} cores, {spec['jobs']} run(s) at a time."
    )
    return [line for line in lines if line]


def missing_lines(result: dict[str, Any]) -> list[str]:
    """Return one line for each run that failed, was stopped or was skipped."""
    return [
        f"{gap.get('state', 'failed').upper()}: {gap['arm']} seed {gap['seed']}: {gap['reason']}"
        for gap in result["missing"]
    ]


def _class_sentence(result: dict[str, Any], pair: dict[str, Any]) -> str:
    """Return the sentence about the best arm that is no baseline and the best baseline.

    Args:
        pair: the entry `best_vs_baseline` of `result`, with names of both arms.
    """
    arm, baseline = (result["arms"][pair[key]]["label"] for key in ("arm", "baseline"))
    at_equal = pair["difference_at_equal_tokens"]
    amount = "" if at_equal["tokens"] is None else f" ({format_count(at_equal['tokens'])} a run)"
    return (
        f"Best arm that is no baseline: {arm}. Best baseline: {baseline}. Difference of their accuracies at equal "
        f"generated tokens{amount}: {_points(at_equal)}, paired by seed."
    )


def _sharpening_sentence(result: dict[str, Any]) -> str:
    """Return a sentence about the gains that greedy decoding of the starting model does not already have."""
    known = [f for f in result["arms"].values() if f["above_greedy_start"]["mean"] is not None]
    if not known:
        return ""
    gains = ", ".join(f"{figures['label']} {_points(figures['above_greedy_start'])}" for figures in known)
    return (
        "Accuracy after training, sampled, minus the greedy accuracy before training: "
        f"{gains}. A gain that is not above 0 here is sharpening of the distribution."
    )


def _equal_sentences(equal: dict[str, Any]) -> list[str]:
    """Return one sentence per resource with the accuracy of each arm at the same amount of the resource.

    Args:
        equal: the dictionary that `at_equal_amounts` returned.
    """
    return [
        f"At equal {AXIS_NAMES[axis]} ({format_count(at['amount'])} a run), accuracy during training: "
        + ", ".join(f"{name} {format_interval(interval)}" for name, interval in at["accuracy"].items())
        + "."
        for axis, at in equal.items()
    ]


def _pair_sentence(result: dict[str, Any], arm: str, pair: dict[str, Any]) -> str:
    """Return sentences about the comparison of an arm with a baseline.

    The text is empty if one of the two has no finished run that was evaluated during training.

    Args:
        arm: name of the arm.
        pair: the entry `vs_reference`, `vs_best` or `best_vs_baseline` of `result`.
    """
    if pair["baseline"] is None or "baseline_reach" not in pair:
        return ""
    first, name = (result["arms"][key]["label"] for key in (arm, pair["baseline"]))
    ends = f"{first} against {name}: final accuracy {_points(pair['final_accuracy_difference'])}, paired by seed."
    best = f"{name}'s best mean accuracy during training is {format_percent(pair['baseline_best_accuracy'])}"
    if pair["reason"]:
        return f"{ends} {best}: {pair['reason']}."
    ratios = ", ".join(
        f"{AXIS_NAMES[axis]} {pair[f'{axis}_ratio']:.2f}{_ratio_interval(pair[f'{axis}_ratio_interval'])}"
        for axis in AXES
        if pair[f"{axis}_ratio"] is not None
    )
    share, form = pair["share_reached_without_one_run"], ""
    if share is not None:
        form = " (95% log-ratio t interval over seeds)"
        if share < 1:
            form = f" (no interval: without one of the runs, {first} reaches it in only {share:.0%} of the cases)"
        elif all(pair[f"{axis}_ratio_interval"]["low"] is None for axis in AXES):
            form = f" (no interval: without one of the runs, {first} starts at or above it, or no ratio changes)"
    return f"{ends} {best}. To reach it, {name} needs these multiples of {first}'s amounts: {ratios}{form}."


def _ratio_interval(interval: dict[str, float | None]) -> str:
    """Format the bounds of a ratio as ` [1.20, 3.40]`. An unknown bound is a dash; without bounds the text is empty."""
    low, high = interval["low"], interval["high"]
    if low is None and high is None:
        return ""
    return f" [{'-' if low is None else f'{low:.2f}'}, {'-' if high is None else f'{high:.2f}'}]"


def _points(difference: dict[str, float | None]) -> str:
    """Format a difference of accuracies in percentage points, such as `+2.5 points [+0.4, +4.6]`."""
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "an unknown number of points"
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * mean:+.1f} points{bounds}"


def markdown(result: dict[str, Any], checklist: Sequence[tuple[str, str]]) -> str:
    """Return the content of `table.md`: the table, the sentences below it, the missing runs and the checklist.

    Args:
        checklist: pairs of an item and its answer (`vineppo.compare.checklist`).
    """
    table = markdown_table([header(result), *table_rows(result)])
    answers = markdown_table([("item", "this comparison"), *checklist])
    return "\n\n".join([table, *conclusions(result), *missing_lines(result), "## Checklist", answers]) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of text cells as a table of Markdown. The first row has the names of the columns."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(table_lines(escaped[0], escaped[1:]))


def format_percent(value: float | None) -> str:
    """Format a share in percent: 0.725 becomes `72.5%`, and None becomes a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def format_interval(interval: dict[str, float | None]) -> str:
    """Format the mean and the bounds of an accuracy as `72.5% [70.1, 74.9]`.

    A bound outside 0 to 100% is printed as 0 or 100, because no accuracy lies there. The bounds are left out if one of
    them is None.
    """
    low, high = interval["low"], interval["high"]
    bounds = "" if low is None or high is None else f" [{100 * max(0.0, low):.1f}, {100 * min(1.0, high):.1f}]"
    return format_percent(interval["mean"]) + bounds


def format_count(value: float | None) -> str:
    """Format a number as a whole number: 20000.4 becomes `20,000`, and None becomes a dash."""
    return "-" if value is None else f"{value:,.0f}"
