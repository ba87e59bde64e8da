"""Plot the results of a comparison as PNG files.

In all functions, `result` is the content of `compare.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from vineppo.run.figures import GREY, band, canvas, finish, legend_below, percent_axis, plain_text, save, short_number

_AXIS_LABELS = {
    "updates": "updates",
    "tokens": "generated tokens (rollouts and MC rollouts)",
    "trained": "trained tokens (counted in every epoch)",
    "seconds": "seconds of training (evaluation not counted)",
    "kl": "KL from the starting model",
}
"""Quantity on the x axis (a key of a curve in `compare.json`) -> label of the axis."""


class Style(NamedTuple):
    """The label of an arm, and the colour, marker and line style that all plots use for the arm."""

    label: str
    colour: str
    marker: str
    line: str


_PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
"""Colours that people with colour blindness can distinguish (Okabe and Ito 2008), and a grey."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Markers of Matplotlib, one for each arm."""
_LINES = ("-", "-", "--", "--", ":", "-.", "-.", ":")
"""Line styles of Matplotlib. Markers and line styles distinguish the curves if a plot is printed without colour."""


def styles_of(result: dict[str, Any]) -> dict[str, Style]:
    """Return a dictionary from the name of each arm to its style.

    The first arm of an algorithm has the colour of the algorithm. An arm whose colour is taken, or whose algorithm
    defines none, gets the next unused colour of the palette. With more arms than colours, colours repeat with other
    markers.
    """
    arms = result["arms"]
    free = [colour for colour in _PALETTE if colour not in {figures["colour"] for figures in arms.values()}]
    styles: dict[str, Style] = {}
    for i, (name, figures) in enumerate(arms.items()):
        taken = {style.colour for style in styles.values()}
        colour = figures["colour"] if figures["colour"] not in taken else ""
        colour = colour or (free.pop(0) if free else _PALETTE[i % len(_PALETTE)])
        marker = _MARKERS[(i + i // len(_MARKERS)) % len(_MARKERS)]
        styles[name] = Style(plain_text(figures["label"]), colour, marker, _LINES[i % len(_LINES)])
    return styles


def plot_comparison(result: dict[str, Any], out: Path) -> list[Path]:
    """Plot accuracies over updates, tokens, trained tokens, seconds and KL divergence, and the final accuracies.

    Args:
        result: the content of `compare.json`.
        out: directory to which the plots are saved.
    Returns:
        Paths of the plots: `accuracy_over_updates.png`, `accuracy_over_tokens.png`, `accuracy_over_trained.png`,
        `accuracy_over_seconds.png`, `accuracy_over_kl.png` (if the KL divergence was measured) and
        `final_accuracy.png`.
    """
    files = []
    for axis in _AXIS_LABELS:
        figure = _curves_figure(result, axis)
        if figure is not None:
            files.append(save(figure, out / f"accuracy_over_{axis}.png"))
    figure = _final_figure(result)
    return files if figure is None else [*files, save(figure, out / "final_accuracy.png")]


def _subtitle(result: dict[str, Any], band: bool) -> str:
    """Return a subtitle such as `Recipe default (judgement), 96 updates per run, mean of 5 seeds, 95% t interval`.

    Args:
        band: whether the plot shows the interval.
    """
    spec = result["spec"]
    level = spec.get("level") or ""
    recipe = Path(spec["recipe"]).stem
    runs = [figures["num_runs"] for figures in result["arms"].values() if figures["num_runs"]]
    seeds = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    # `level` names the problems. It is left out if it is empty or equals the name of the recipe. If it is
    # `reasoning_gym:NAME`, only NAME is compared with the name of the recipe.
    task = recipe if level.rpartition(":")[2] in ("", recipe) else f"{recipe} ({level})"
    amount = f"{float(spec['budget'].partition('=')[2]):,.0f}"
    kind = {"tokens": "generated tokens", "seconds": "seconds of training"}.get(
        spec["budget"].partition("=")[0], "updates"
    )
    mean = "1 seed" if seeds == "1" else f"mean of {seeds} seeds"
    interval = ", 95% t interval" if band else ""
    return f"Recipe {task}, {amount} {kind} per run, {mean}{interval}"


def _curves_figure(result: dict[str, Any], axis: str) -> Figure | None:
    """Plot the accuracy curves of all arms over a quantity, or return None if no curve has this quantity.

    Args:
        axis: the quantity on the x axis, a key of `_AXIS_LABELS`.
    """
    curves = {
        name: figures["curve"]
        for name, figures in result["arms"].items()
        if figures["curve"] is not None and any(x is not None for x in figures["curve"].get(axis) or ())
    }
    if not curves:
        return None
    # The mean KL can decrease, so the curve can go backwards in x. A band around such a curve would be unreadable.
    has_band = axis != "kl" and any(bound is not None for curve in curves.values() for bound in curve["accuracy_low"])
    styles = styles_of(result)
    figure, axes = canvas(f"Accuracy over {_AXIS_LABELS[axis].split(' (')[0]}", _subtitle(result, has_band))
    for name, curve in curves.items():
        style = styles[name]
        # The KL divergence after the last iteration is not known.
        x, mean = zip(
            *((x, y) for x, y in zip(curve[axis], curve["accuracy"], strict=True) if x is not None), strict=True
        )
        if has_band:
            band(axes, x, curve["accuracy_low"], curve["accuracy_high"], style.colour, None)
        axes.plot(
            x,
            mean,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            markevery=max(1, len(x) // 12),
            linewidth=2.4 if name == result["first"] else 1.8,
            zorder=4 if name == result["first"] else 3,
            label=style.label,
        )
    if axis != "kl":
        _mark_reference_best(axes, result)
    finish(axes, _AXIS_LABELS[axis], "accuracy on validation problems")
    if axis in ("tokens", "trained", "updates"):
        axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    percent_axis(axes)
    legend_below(axes)
    return figure


def _mark_reference_best(axes: Axes, result: dict[str, Any]) -> None:
    """Draw a horizontal line at the best mean accuracy of the reference, which is the second arm."""
    best = result["vs_reference"].get("baseline_best_accuracy")
    if best is not None:
        style = styles_of(result)[result["reference"]]
        label = f"{style.label}'s best, {100 * best:.1f}%"
        axes.axhline(best, color=style.colour, linewidth=1, linestyle=(0, (1, 2)), zorder=2, label=label)


def _final_figure(result: dict[str, Any]) -> Figure | None:
    """Plot the mean final accuracy of each arm with its interval, and a small dot for each run.

    The result is None if no arm has a final accuracy.
    """
    shown = {name: f for name, f in result["arms"].items() if f["final_accuracy"]["mean"] is not None}
    if not shown:
        return None
    has_band = any(f["final_accuracy"]["low"] is not None for f in shown.values())
    styles = styles_of(result)
    figure, axes = canvas("Final accuracy", _subtitle(result, has_band), height=1.9 + 0.62 * len(shown), width=9)
    starts = [f["accuracy_before"]["mean"] for f in shown.values() if f["accuracy_before"]["mean"] is not None]
    if starts:
        start = sum(starts) / len(starts)
        axes.axvline(start, color=GREY, linewidth=1.2, linestyle="--", label=f"before training, {100 * start:.1f}%")
    for row, (name, figures) in enumerate(shown.items()):
        style, final = styles[name], figures["final_accuracy"]
        single = [run["accuracy_after"] for run in figures["per_seed"] if run["accuracy_after"] is not None]
        axes.scatter(single, [row + 0.2] * len(single), s=18, color=style.colour, alpha=0.55, linewidths=0)
        if final["low"] is not None:
            axes.plot([final["low"], final["high"]], [row, row], color=style.colour, linewidth=3, solid_capstyle="butt")
        axes.plot(final["mean"], row, color=style.colour, marker=style.marker, markersize=9)
        text = f"{100 * final['mean']:.1f}%"
        axes.annotate(text, (final["mean"], row), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=11)
    axes.scatter([], [], s=18, color=GREY, alpha=0.7, linewidths=0, label="single runs")
    finish(axes, "accuracy after training, held-out problems", "")
    # A label such as "REINFORCE (batch64)" gets two lines, and the figure is wide, so that the subtitle fits.
    labels = [styles[name].label.replace(" (", "\n(") for name in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=12)
    axes.set_ylim(len(shown) - 0.4, -0.65)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left, right = axes.get_xlim()
    axes.set_xlim(max(0, left), min(1, right + 0.01))
    legend_below(axes)
    return figure
