"""Functions that draw titles, confidence bands, axes and legends of all plots in the same style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vineppo.run.files import written_aside

GREY = "#444444"
"""Colour of subtitles, and of lines and markers that belong to no single algorithm."""

_SUBTITLE_CHARACTERS = 88
"""Number of characters that fit in one line across a figure. A longer subtitle gets a smaller font, and a longer legend
is split into rows."""


def canvas(title: str, subtitle: str, height: float = 5.0, width: float = 8.0) -> tuple[Figure, Axes]:
    """Create a figure with a title and a subtitle. The figure does not use pyplot, so no display is needed.

    Args:
        title: bold text above the axes.
        subtitle: one line of text between the title and the axes.
        height: height of the figure in inches.
        width: width of the figure in inches.
    Returns:
        The figure and its axes.
    """
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=14, fontweight="bold", loc="left", pad=26)
    note = axes.annotate(
        subtitle,
        (0, 1),
        xytext=(0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=min(10.5, 10.5 * _SUBTITLE_CHARACTERS / max(1, len(subtitle))),
        color=GREY,
    )
    note.set_in_layout(False)  # Otherwise the layout would make the axes smaller for a long subtitle.
    return figure, axes


def band(
    axes: Axes,
    x: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    colour: str,
    label: str | None,
) -> None:
    """Shade the area between two bounds.

    Args:
        axes: the axes to draw on.
        x: x coordinates, shape (N,).
        low: lower bounds, shape (N,). A point is left out if one of its bounds is None.
        high: upper bounds, shape (N,).
        colour: colour of the area.
        label: entry of the legend; None adds no entry.
    """
    known = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if b is not None and c is not None]
    if known:
        xs, lows, highs = zip(*known, strict=True)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0, label=label)


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Set the labels of the axes, the grid, the ticks and the margins."""
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def percent_axis(axes: Axes) -> None:
    """Format the y axis in percent, and clip its limits to 0% and 100%, even if confidence bands extend further."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0, high) + 0.002)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def legend_below(axes: Axes) -> None:
    """Place the legend below the axes, in as many rows as it needs."""
    handles, labels = axes.get_legend_handles_labels()
    if handles and axes.figure is not None:
        # In characters. An entry needs the width of 8 characters for its sample of the line and for gaps.
        width = sum(len(label) + 8 for label in labels)
        rows = math.ceil(width / _SUBTITLE_CHARACTERS)
        columns = math.ceil(len(labels) / rows)
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11, columnspacing=1.6
        )


def short_number(value: float, position: int | None = None) -> str:
    """Format the label of a tick: 1500000 becomes `1.5M`, 20000 becomes `20k`, and 96 stays `96`.

    Args:
        value: the number at the tick.
        position: not used. Matplotlib passes the position of the tick to every such function.
    """
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def plain_text(text: str) -> str:
    """Escape every `$` in a text. Otherwise Matplotlib would read `$` as the start of a formula."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Save the figure as PNG, atomically, and return the path.

    The version of Matplotlib is left out of the metadata, so that it does not change the content of the file.
    """
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
