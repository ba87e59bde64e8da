"""Format the results of a comparison as text: a table, and sentences below the table.

In all functions, `result` is the content of `compare.json`. The reference is the second of the compared algorithms.
"""

from __future__ import annotations

from typing import Any

from vineppo.compare.figures import AXES

_COLUMNS = (
    "algorithm",
    "runs",
    "accuracy before",
    "accuracy after",
    "updates",
    "rollout tokens",
    "MC tokens",
    "seconds",
)
"""Names of the columns that every table has."""


def header(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the column names of the table.

    If there is a reference, two more columns show the updates and the seconds after which an algorithm reaches the best
    accuracy of the reference.
    """
    if result["reference"] is None:
        return _COLUMNS
    label = result["algorithms"][result["reference"]]["label"]
    return (*_COLUMNS, f"updates to {label}'s best", f"seconds to {label}'s best")


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return one row of text cells for each algorithm. The columns are those that `header` names."""
    rows: list[tuple[str, ...]] = []
    for name, figures in result["algorithms"].items():
        reach = figures["reach_reference_best"] or {}
        row: tuple[str, ...] = (
            name,
            _runs_cell(result, name, figures["num_runs"]),
            format_percent(figures["accuracy_before"]["mean"]),
            _percent_interval(figures["final_accuracy"]),
            format_count(figures["updates"]),
            format_count(figures["tokens"]["rollouts"]),
            format_count(figures["tokens"]["mc"]),
            format_count(figures["seconds"]["mean"]),
        )
        if result["reference"] is not None:
            row = (*row, format_count(reach.get("updates")), format_count(reach.get("seconds")))
        rows.append(row)
    return rows


def _runs_cell(result: dict[str, Any], algorithm: str, finished: int) -> str:
    """Return the number of finished runs, such as `3 of 5 (1 failed, 1 stopped)`."""
    states = [gap.get("state", "failed") for gap in result["missing"] if gap["algorithm"] == algorithm]
    counts = [f"{states.count(state)} {state}" for state in ("failed", "stopped", "skipped") if state in states]
    return f"{finished} of {result['spec']['seeds']}" + (f" ({', '.join(counts)})" if counts else "")


def conclusions(result: dict[str, Any]) -> list[str]:
    """Return the sentences below the table.

    They state the differences and ratios between algorithms, the accuracies at equal amounts of resources, the budget,
    and which runs are missing.
    """
    spec = result["spec"]
    lines = [_pair_sentence(result, result["vs_reference"])]
    best = result["vs_best"]
    if best["baseline"] not in (None, result["reference"]):
        lines.append(_pair_sentence(result, best))
    lines += _equal_sentences(result["equal"])
    lines.append(
        f"Budget of each run: {spec['budget']}. Accuracy after: mean over runs with its 95% Student t interval. "
        f"Seconds: training without evaluation, on {result['cpu_count']} cores, {spec['jobs']} run(s) at a time."
    )
    lines += [
        f"{gap.get('state', 'failed').upper()}: {gap['algorithm']} seed {gap['seed']}: {gap['reason']}"
        for gap in result["missing"]
    ]
    return [line for line in lines if line]


def _equal_sentences(equal: dict[str, Any]) -> list[str]:
    """Return one sentence per resource with the accuracy of each algorithm at the same amount of the resource.

    Args:
        equal: the dictionary that `at_equal_amounts` returned.
    """
    return [
        f"At equal {axis} ({format_count(at['amount'])} a run), accuracy during training: "
        + ", ".join(f"{name} {_percent_interval(interval)}" for name, interval in at["accuracy"].items())
        + "."
        for axis, at in equal.items()
    ]


def _pair_sentence(result: dict[str, Any], pair: dict[str, Any]) -> str:
    """Return sentences about the comparison of the first algorithm with a baseline.

    The text is empty if one of the two has no finished and evaluated run.

    Args:
        pair: the entry `vs_reference` or `vs_best` of `result`.
    """
    if pair["baseline"] is None or "baseline_reach" not in pair:
        return ""
    first, name = (result["algorithms"][key]["label"] for key in (result["first"], pair["baseline"]))
    ends = f"{first} against {name}: final accuracy {_points(pair['final_accuracy_difference'])}, paired by seed."
    best = f"{name}'s best mean accuracy during training is {format_percent(pair['baseline_best_accuracy'])}"
    if pair["reason"]:
        return f"{ends} {best}: {pair['reason']}."
    ratios = ", ".join(
        f"{axis} {pair[f'{axis}_ratio']:.2f}{_ratio_interval(pair[f'{axis}_ratio_interval'])}" for axis in AXES
    )
    share, form = pair["share_reached_without_one_run"], ""
    if share is not None:
        form = " (95% log-ratio t interval over seeds)"
        if share < 1:
            form = f" (no interval: without one of the runs, {first} reaches it in only {share:.0%} of the cases)"
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


def markdown(result: dict[str, Any]) -> str:
    """Return the content of `table.md`: the table and the sentences below it."""
    names = header(result)
    rows = [names, tuple("---" for _ in names), *table_rows(result)]
    escaped_bar = r"\|"
    table = "\n".join(f"| {' | '.join(cell.replace('|', escaped_bar) for cell in row)} |" for row in rows)
    return "\n\n".join([table, *conclusions(result)]) + "\n"


def format_percent(value: float | None) -> str:
    """Format a share in percent: 0.725 becomes `72.5%`, and None becomes a dash."""
    return "-" if value is None else f"{100 * value:.1f}%"


def _percent_interval(interval: dict[str, float | None]) -> str:
    """Format a mean and its bounds as `72.5% [70.1, 74.9]`. The bounds are left out if one of them is None."""
    low, high = interval["low"], interval["high"]
    bounds = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return format_percent(interval["mean"]) + bounds


def format_count(value: float | None) -> str:
    """Format a number as a whole number: 20000.4 becomes `20,000`, and None becomes a dash."""
    return "-" if value is None else f"{value:,.0f}"
