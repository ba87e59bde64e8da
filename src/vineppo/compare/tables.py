"""A comparison's figures as text: the rows of its table, the sentences under it, Markdown."""

from __future__ import annotations

from typing import Any

from vineppo.compare.figures import AXES

HEADER = (
    "algorithm",
    "runs",
    "accuracy before",
    "accuracy after",
    "updates",
    "rollout tokens",
    "MC tokens",
    "seconds",
    "updates to PPO's best",
    "seconds to PPO's best",
)


def table_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's rows as text, one per algorithm, in the order of `HEADER`."""
    rows: list[tuple[str, ...]] = []
    for name, figures in result["algorithms"].items():
        reach = figures["reach_ppo_best"] or {}
        row = (
            name,
            f"{figures['num_runs']} of {result['spec']['seeds']}",
            percent(figures["accuracy_before"]["mean"]),
            _percent_interval(figures["final_accuracy"]),
            count(figures["updates"]),
            count(figures["tokens"]["rollouts"]),
            count(figures["tokens"]["mc"]),
            count(figures["seconds"]["mean"]),
            count(reach.get("updates")),
            count(reach.get("seconds")),
        )
        rows.append(row)
    return rows


def conclusions(result: dict[str, Any]) -> list[str]:
    """What the comparison says beside its table, one sentence a line."""
    spec = result["spec"]
    lines = [_pair_sentence(result["vineppo_vs_ppo"])]
    best = result["vs_best_baseline"]
    if best["baseline"] not in (None, "ppo"):
        lines.append(_pair_sentence(best))
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


def _pair_sentence(pair: dict[str, Any]) -> str:
    name = (pair["baseline"] or "").upper()
    if not name or "baseline_reach" not in pair:
        return ""
    ends = f"VinePPO against {name}: final accuracy {_points(pair['final_accuracy_difference'])}, paired by seed."
    best = f"{name}'s best mean accuracy during training is {percent(pair['baseline_best_accuracy'])}"
    if pair["reason"]:
        return f"{ends} {best}: {pair['reason']}."
    ratios = ", ".join(
        f"{axis} {pair[f'{axis}_ratio']:.2f}{_ratio_interval(pair[f'{axis}_ratio_interval'])}" for axis in AXES
    )
    share = pair["share_of_resamples_reached"]
    reached = "" if share is None else f" (95% bootstrap over seeds; reached in {share:.0%} of resamples)"
    return f"{ends} {best}; to reach it, {name}'s amount over VinePPO's: {ratios}{reached}."


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
    rows = [HEADER, tuple("---" for _ in HEADER), *table_rows(result)]
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
