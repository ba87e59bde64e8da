"""Functions that give all figures the same style. They draw titles, confidence bands, axes and legends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vineppo.run.files import written_aside

GREY = "#444444"

_SUBTITLE_CHARACTERS = 92
"""Number of characters that fit in one line of a figure. A longer subtitle gets a smaller font, and a longer legend is
split into rows."""


def canvas(title: str, subtitle: str, height: float = 5.0) -> tuple[Figure, Axes]:
    """Return a new figure with a title and a subtitle. The figure is created without pyplot, so no display is needed.

    Args:
        title: bold text above the axes.
        subtitle: one line of text between the title and the axes.
        height: height of the figure in inches; the width is 8 inches.
    """
    figure = Figure(figsize=(8, height), dpi=130, layout="constrained")
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
    note.set_in_layout(False)  # a long subtitle must not reduce the size of the axes
    return figure, axes


def band(
    axes: Axes,
    x: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    colour: str,
    label: str | None,
) -> None:
    """Shade the area between `low` and `high`. Points at which one of the bounds is None are left out."""
    known = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if b is not None and c is not None]
    if known:
        xs, lows, highs = zip(*known, strict=True)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0, label=label)


def finish(axes: Axes, x_label: str, y_label: str) -> None:
    """Set the axis labels, the grid, the ticks and the margins."""
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def percent_axis(axes: Axes) -> None:
    """Format the y axis as percent and clip its limits to 0-100%, even if confidence bands extend further."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0, high) + 0.002)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def legend_below(axes: Axes) -> None:
    """Place the legend below the axes, in as many rows as it needs."""
    handles, labels = axes.get_legend_handles_labels()
    if handles and axes.figure is not None:
        width = sum(len(label) + 8 for label in labels)  # in characters; the line sample and gaps of an entry need 8
        rows = math.ceil(width / _SUBTITLE_CHARACTERS)
        columns = math.ceil(len(labels) / rows)
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11, columnspacing=1.6
        )


def short_number(value: float, position: int | None = None) -> str:
    """Format a tick label: 1500000 -> 1.5M, 20000 -> 20k, 96 -> 96. Matplotlib passes `position`, which is not used."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def plain_text(text: str) -> str:
    """Return a text in which Matplotlib shows `$` as it is, instead of reading it as the start of a formula."""
    return text.replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Save the figure as PNG, atomically, and return the path.

    The Matplotlib version is left out of the metadata, so the same figure always gives the same file.
    """
    with written_aside(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    return path
