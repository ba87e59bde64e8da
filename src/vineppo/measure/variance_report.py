"""Write the report of `vineppo variance`, and draw its plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from vineppo.measure.output import about_brackets, heading, interval, number, table
from vineppo.measure.variance import recommendation
from vineppo.run.figures import canvas, finish, legend_below, save

_COLOURS = {"settled": "#009E73", "open": "#0072B2", "decisive": "#D55E00", "last": "#CC79A7", "all": "#000000"}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the text of variance.md from the content of variance.json."""
    lines = [
        *heading(result, "Which K?"),
        f"**{recommendation(result)}**",
        "",
        f"{result['num_steps']} steps of {result['num_responses']} responses to {result['num_problems']} problems, "
        f"valued {result['repeats']} times with every method and K. The mean reward is {result['mean_reward']:.3f}. "
        f"The prediction is p(1-p)/K before the step plus p(1-p)/K after it, with p from {result['gold'] // 2} "
        f"other continuations; {result['gold'] // 2} more decide the kinds. "
        f"{about_brackets(result['num_problems'])}",
        "",
    ]
    rows = [
        [
            kind,
            str(part["steps"]),
            row["method"],
            str(row["k"]),
            interval(row["measured"], 4),
            number(row["predicted"], 4),
            interval(row["ratio"], 2),
        ]
        for kind, part in result["by_kind"].items()
        for row in part["rows"]
    ]
    lines += table(["steps", "number", "method", "K", "variance of the advantage", "predicted", "ratio"], rows)
    exponents = ", ".join(f"{name} {number(value, 2)}" for name, value in result["exponents"].items())
    lines += [
        "",
        f"*decisive*: the value changes by at least {result['decisive']:g}; *settled*: both values are below 0.05 or "
        "above 0.95; *last*: the response ends with the step; *open*: the others. Independent continuations have the "
        "ratio 1; reuse shares them between the two states of a step.",
        "",
        f"The mean variance is proportional to K to the power of: {exponents} (independent continuations: -1).",
        "",
        *_budget(result),
        "Plots: [variance.png](variance.png), [budget.png](budget.png).",
        "",
    ]
    return "\n".join(lines)


def _budget(result: Mapping[str, Any]) -> list[str]:
    """Return the lines about the error at a token budget."""
    budget = result["budget"]
    sizes = sorted({row["group_size"] for row in budget["rows"]})
    cells = {(row["method"], row["k"], row["group_size"]): row["error"] for row in budget["rows"]}
    arms = list(dict.fromkeys((row["method"], row["k"]) for row in budget["rows"]))
    rows = [
        [
            "none" if method == "none" else f"{method}, K = {k}",
            number(result["tokens_per_response"] + budget["tokens"].get(f"{method} {k}", 0.0), 0),
            interval(budget["equal_responses"][f"{method} {k}"], 2),
            interval(cells[method, k, 1], 2),
            *(number(cells[method, k, size]["mean"], 2) for size in sizes[1:]),
        ]
        for method, k in arms
    ]
    spread = budget["spread"]
    return [
        "Squared error of the mean gradient at the same generated tokens, relative to the best combination. The number "
        "of problems follows from the budget; G is the number of responses per problem. *Equal responses* compares at "
        "the same number of trained responses (G = 1), whatever their continuations cost:",
        "",
        *table(["continuations", "tokens per response", "equal responses", *(f"G = {size}" for size in sizes)], rows),
        "",
        f"Of the variance of a response's gradient with exact values, {number(spread['problems'], 3)} is between "
        f"problems and {number(spread['responses'], 3)} between responses to a problem. *none* gives every token the "
        "reward minus the exact value of the prompt, a baseline that RLOO reaches with a large group only. The "
        "gradient is that of the output layer; its norm is not that of an optimizer's step. One response per "
        "problem is best in this model whenever new problems cost nothing.",
        "",
    ]


def plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw variance.png and budget.png, and return their paths."""
    return [save(_variance(result), folder / "variance.png"), save(_errors(result), folder / "budget.png")]


def _variance(result: Mapping[str, Any]) -> Any:
    """Plot the variance over K of every kind of step, measured (points) and predicted (lines)."""
    subtitle = f"{result['num_steps']} steps of {result['num_problems']} problems; lines: p(1-p)/K + p'(1-p')/K"
    figure, axes = canvas("Variance of the advantage over K", subtitle)
    for kind, part in result["by_kind"].items():
        for method, marker in (("fresh", "o"), ("reuse", "^")):
            rows = [row for row in part["rows"] if row["method"] == method and (row["measured"]["mean"] or 0) > 0]
            if not rows:
                continue
            ks, colour = [row["k"] for row in rows], _COLOURS[kind]
            axes.plot(
                ks,
                [row["measured"]["mean"] for row in rows],
                color=colour,
                marker=marker,
                linestyle="none" if method == "fresh" else ":",
                label=f"{kind}, {method}",
            )
            if method == "fresh":
                axes.plot(ks, [row["predicted"] for row in rows], color=colour, linewidth=1)
    finish(axes, "K: continuations per state", "variance of the step advantage")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _ticks_at_k(axes, result)
    legend_below(axes)
    return figure


def _errors(result: Mapping[str, Any]) -> Any:
    """Plot the error at equal tokens over K, for one response per problem."""
    subtitle = f"one response per problem, {result['num_problems']} problems, 95% intervals over problems"
    figure, axes = canvas("Squared error of the gradient at equal tokens", subtitle)
    rows = [row for row in result["budget"]["rows"] if row["group_size"] == 1]
    for method, colour in (("fresh", "#0072B2"), ("reuse", "#D55E00")):
        own = [row for row in rows if row["method"] == method]
        if own:
            ks, errors = [row["k"] for row in own], [row["error"] for row in own]
            axes.plot(ks, [e["mean"] for e in errors], color=colour, marker="o", label=method)
            for k, error in zip(ks, errors, strict=True):
                if error["low"] is not None:
                    axes.plot([k, k], [error["low"], error["high"]], color=colour, linewidth=1)
    plain = next(row["error"]["mean"] for row in rows if row["method"] == "none")
    axes.axhline(plain, color="#444444", linestyle="--", linewidth=1.2, label="no continuations")
    finish(axes, "K: continuations per state", "relative squared error (best combination: 1)")
    axes.set_xscale("log")
    _ticks_at_k(axes, result)
    legend_below(axes)
    return figure


def _ticks_at_k(axes: Axes, result: Mapping[str, Any]) -> None:
    """Put the ticks of the x axis at the measured K."""
    ks = sorted({row["k"] for part in result["by_kind"].values() for row in part["rows"]})
    axes.minorticks_off()
    axes.set_xticks(ks, [str(k) for k in ks])
