"""Write the report of `vineppo scaling`, and draw its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vineppo.measure.costmodel import CostModel
from vineppo.measure.output import heading, number, table
from vineppo.run.figures import canvas, finish, legend_below, save

_COLOURS = {"fixed_k": "#0072B2", "reuse": "#D55E00", "bisection": "#009E73", "value network": "#000000"}


def markdown(result: Mapping[str, Any]) -> str:
    """Return the text of scaling.md from the content of scaling.json."""
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    lengths = sorted({row["steps"] for row in result["rows"]})
    cell = {(row["method"], row["steps"]): row for row in result["rows"]}
    lines = [
        *heading(result, "What does credit cost over the length of a chain?"),
        f"Chains of {result['step_tokens']} tokens per step by a model with {result['parameters']:,} parameters and "
        f"random weights, K = {result['k']}, {result['machine']}, {result['sampler']}. *fixed_k*: K new continuations "
        "of every state; *reuse*, *bisection*: vineppo.reuse and vineppo.bisection; *value network*: one prediction "
        f"and two epochs of training. {'CPU seconds' if result['clock'] == 'cpu' else 'Seconds'} per response:",
        "",
        *table(
            ["steps", *methods],
            [
                [str(n), *(number(cell[m, n]["seconds"], 4) if (m, n) in cell else "-" for m in methods)]
                for n in lengths
            ],
        ),
        "",
        "Generated tokens per response:",
        "",
        *table(
            ["steps", *(m for m in methods if m != "value network")],
            [
                [str(n)]
                + [f"{cell[m, n]['tokens']:,.0f}" if (m, n) in cell else "-" for m in methods if m != "value network"]
                for n in lengths
            ],
        ),
        "",
        *_models(result),
        *larger_models(result["gpus"], result["assumptions"]),
        "Plot: [scaling.png](scaling.png).",
        "",
    ]
    return "\n".join(lines)


def _break_even(value: float | None) -> str:
    """Return the number of steps at which two costs are equal as text."""
    return f"{value:.0f}" if value is not None else "none"


def _models(result: Mapping[str, Any]) -> list[str]:
    """Return the lines about the cost models and the break-even on this machine."""
    rows = []
    for method, fit in result["models"].items():
        held = fit.get("held_out")
        rows.append(
            [
                method,
                *(f"{c:.2e}" for c in fit["coefficients"]),
                f"{held['measured']:.4f}" if held else "-",
                f"{held['predicted']:.4f}" if held else "-",
                f"{100 * held['error']:+.0f}%" if held else "-",
                "" if method == "value network" else _break_even(result["break_even"].get(method)),
            ]
        )
    return [
        f"Cost model: seconds = a + b steps + c steps^2 + d steps^3, fitted without the chains of {result['held_out']} "
        "steps, and checked there. Break-even is the number of steps at which continuations cost as much as the value "
        f"network, looked for from 1 to {max(row['steps'] for row in result['rows'])}:",
        "",
        *table(["method", "a", "b", "c", "d", "measured", "predicted", "error", "break-even steps"], rows),
        "",
    ]


def _ratio(part: Mapping[str, Any]) -> str:
    """Return the cost of continuations relative to the value network, and of the whole iteration in parentheses."""
    return f"{part['continuations'] / part['value_network']:.1f} ({part['iteration_ratio']:.1f})"


def larger_models(gpus: Sequence[Mapping[str, Any]], assumptions: Sequence[str]) -> list[str]:
    """Return the lines about larger models.

    Args:
        gpus: the rows of `gpu_rows`; without any, there are no lines.
        assumptions: what the numbers assume.
    """
    if not gpus:
        return []
    lengths = [part["steps"] for part in gpus[0]["lengths"]]
    rows = [
        [row["model"], row["gpus"], row["method"], *map(_ratio, row["lengths"]), _break_even(row["break_even"])]
        for row in gpus
    ]
    return [
        "Larger models, from data sheets: seconds of the continuations relative to those of the value network, and in "
        "parentheses the seconds of a whole iteration relative to one with a value network, over the number of steps:",
        "",
        *table(["model", "GPUs", "method", *map(str, lengths), "break-even"], rows),
        "",
        "These numbers assume:",
        "",
        *(f"- {text}." for text in assumptions),
        "",
    ]


def plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw scaling.png: measured seconds per response and the fitted models."""
    subtitle = f"K = {result['k']}, {result['step_tokens']} tokens per step; lines: cost model; hollow: held out"
    figure, axes = canvas("Cost of the credit of one response", subtitle)
    for method, colour in _COLOURS.items():
        own = [row for row in result["rows"] if row["method"] == method]
        for row in own:
            hollow = row["steps"] == result["held_out"]
            face = "white" if hollow else colour
            axes.plot(row["steps"], row["seconds"], "o", color=colour, markerfacecolor=face, zorder=3)
        if own and method in result["models"]:
            model = CostModel(tuple(result["models"][method]["coefficients"]))
            low, high = min(r["steps"] for r in own), max(r["steps"] for r in result["rows"])
            xs = [low * (high / low) ** (n / 50) for n in range(51)]
            axes.plot(xs, [model.seconds(x) for x in xs], color=colour, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    lengths = sorted({row["steps"] for row in result["rows"]})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.minorticks_off()
    finish(axes, "steps of the response", "seconds per response")
    legend_below(axes)
    return [save(figure, folder / "scaling.png")]
