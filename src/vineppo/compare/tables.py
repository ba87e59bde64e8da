"""A comparison's figures as text: the rows of its table, the sentences under it, Markdown."""

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


def header(result: dict[str, Any]) -> tuple[str, ...]:
    """Names of the table's columns; the last two name the reference algorithm, if there is one."""
    if result["reference"] is None:
        return _COLUMNS
    label = result["algorithms"][result["reference"]]["label"]
    return (*_COLUMNS, f"updates to {label}'s best", f"seconds to {label}'s best")


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows as text, one per algorithm, with the columns of `header`."""
    rows: list[tuple[str, ...]] = []
    for name, figures in result["algorithms"].items():
        reach = figures["reach_reference_best"] or {}
        row: tuple[str, ...] = (
            name,
            f"{figures['num_runs']} of {result['spec']['seeds']}",
            percent(figures["accuracy_before"]["mean"]),
            _percent_interval(figures["final_accuracy"]),
            count(figures["updates"]),
            count(figures["tokens"]["rollouts"]),
            count(figures["tokens"]["mc"]),
            count(figures["seconds"]["mean"]),
        )
        if result["reference"] is not None:
            row = (*row, count(reach.get("updates")), count(reach.get("seconds")))
        rows.append(row)
    return rows


def conclusions(result: dict[str, Any]) -> list[str]:
    """What the comparison says beside its table, one sentence a line."""
    spec = result["spec"]
    lines = [_pair_sentence(result, result["vs_reference"])]
    best = result["vs_best"]
    if best["baseline"] not in (None, result["reference"]):
        lines.append(_pair_sentence(result, best))
    lines += _equal_sentences(result["equal"])
    lines.append(
        f"Budget of each run: {spec['budget']}. Accuracy after: mean over runs with its 95% Student t interval. "
        f"Seconds of training, evaluation not counted, {result['cpu_count']} cores, {spec['jobs']} run(s) at a time."
    )
    lines += [f"MISSING: {gap['algorithm']} seed {gap['seed']}: {gap['reason']}" for gap in result["missing"]]
    return [line for line in lines if line]


def _equal_sentences(equal: dict[str, Any]) -> list[str]:
    """One sentence an axis: every algorithm's accuracy during training, at what the thriftiest run used in all."""
    return [
        f"At equal {axis} ({count(at['amount'])} a run), accuracy during training: "
        + ", ".join(f"{name} {_percent_interval(interval)}" for name, interval in at["accuracy"].items())
        + "."
        for axis, at in equal.items()
    ]


def _pair_sentence(result: dict[str, Any], pair: dict[str, Any]) -> str:
    if pair["baseline"] is None or "baseline_reach" not in pair:
        return ""
    first, name = (result["algorithms"][key]["label"] for key in (result["first"], pair["baseline"]))
    ends = f"{first} against {name}: final accuracy {_points(pair['final_accuracy_difference'])}, paired by seed."
    best = f"{name}'s best mean accuracy during training is {percent(pair['baseline_best_accuracy'])}"
    if pair["reason"]:
        return f"{ends} {best}: {pair['reason']}."
    ratios = ", ".join(
        f"{axis} {pair[f'{axis}_ratio']:.2f}{_ratio_interval(pair[f'{axis}_ratio_interval'])}" for axis in AXES
    )
    share = pair["share_of_resamples_reached"]
    reached = "" if share is None else f" (95% bootstrap over seeds; reached in {share:.0%} of resamples)"
    return f"{ends} {best}; to reach it, {name}'s amount over {first}'s: {ratios}{reached}."


def _ratio_interval(interval: dict[str, float | None]) -> str:
    low, high = interval["low"], interval["high"]
    if low is None and high is None:
        return ""
    return f" [{'-' if low is None else f'{low:.2f}'}, {'-' if high is None else f'{high:.2f}'}]"


def _points(difference: dict[str, float | None]) -> str:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    if mean is None:
        return "an unknown number of points"
    bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{100 * mean:+.1f} points{bounds}"


def markdown(result: dict[str, Any]) -> str:
    """`table.md`: the table and the sentences under it."""
    names = header(result)
    rows = [names, tuple("---" for _ in names), *table_rows(result)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([table, *conclusions(result)]) + "\n"


def percent(value: float | None) -> str:
    """0.725 -> 72.5%; a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}%"


def _percent_interval(interval: dict[str, float | None]) -> str:
    low, high = interval["low"], interval["high"]
    bounds = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return percent(interval["mean"]) + bounds


def count(value: float | None) -> str:
    """20000.4 -> 20,000; a dash for None."""
    return "-" if value is None else f"{value:,.0f}"
