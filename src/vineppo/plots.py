"""Pictures of one run and of a comparison, as PNG files. Reads records and figures; computes nothing that is reported.

Colours belong to algorithms, everywhere the same, and are told apart by colour-blind readers (Okabe and Ito 2008);
line styles and markers repeat the distinction for print in grey.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from vineppo.run import RunDirectory


class _Style(NamedTuple):
    label: str
    colour: str
    marker: str
    line: str


STYLES: dict[str, _Style] = {
    "vineppo": _Style("VinePPO", "#D55E00", "o", "-"),
    "ppo": _Style("PPO", "#0072B2", "s", "-"),
    "grpo": _Style("GRPO", "#009E73", "^", "--"),
    "rloo": _Style("RLOO", "#CC79A7", "D", "--"),
    "reinforce": _Style("REINFORCE", "#56B4E9", "v", ":"),
}
_PHASES = {"rollouts": ("rollouts", "#0072B2"), "mc": ("MC rollouts", "#E69F00")}
_SECONDS = {
    "seconds/sample": ("sampling", "#0072B2"),
    "seconds/credit": ("credit", "#E69F00"),
    "seconds/update": ("updates", "#009E73"),
    "seconds/eval": ("evaluation", "#999999"),
}
_GREY = "#444444"
_AXIS_LABELS = {
    "updates": "updates",
    "tokens": "generated tokens (rollouts and MC rollouts)",
    "seconds": "seconds of training (evaluation not counted)",
    "kl": "KL from the starting model",
}


# --- one run ----------------------------------------------------------------------------------------------------------


def plot_run(run_dir: Path) -> list[Path]:
    """Draw a run directory's accuracy and reward, tokens by phase and seconds by phase into its `plots/`.

    Returns:
        The files written: `accuracy.png`, `tokens.png`, `seconds.png`; none for a run without finished iterations.
    """
    run_dir = Path(run_dir)
    records = RunDirectory.open(run_dir, writable=False).read_metrics()
    iterations = [record for record in records if record.get("iteration", 0) > 0]
    if not iterations:
        return []
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    name = _run_title(run_dir)
    return [
        _save(_accuracy_figure(records, iterations, name), folder / "accuracy.png"),
        _save(_tokens_figure(iterations, name), folder / "tokens.png"),
        _save(_seconds_figure(iterations, name), folder / "seconds.png"),
    ]


def _run_title(run_dir: Path) -> str:
    """`VinePPO, seed 0, judgement`, or the directory's name for a run that is still going on."""
    summary_path = run_dir / "summary.json"
    if not summary_path.exists():
        return run_dir.resolve().name
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    style = STYLES.get(summary.get("algorithm", ""))
    parts = [style.label if style else "", f"seed {summary.get('seed')}", str(summary.get("recipe") or "")]
    return ", ".join(part for part in parts if part)


def _accuracy_figure(records: Sequence[dict[str, Any]], iterations: Sequence[dict[str, Any]], name: str) -> Figure:
    figure, axes = _canvas("Accuracy and reward over updates", name)
    updates = [record["updates"] for record in iterations]
    rewards = [record["reward/mean"] for record in iterations]
    axes.plot(updates, rewards, color="#56B4E9", linewidth=1, alpha=0.6, label="mean reward of the rollouts")
    if len(rewards) >= 10:
        width = max(5, len(rewards) // 10)
        axes.plot(updates, _trailing_mean(rewards, width), color="#0072B2", label=f"its mean over {width} iterations")
    measured = [record for record in records if record.get("eval/accuracy") is not None]
    if measured:
        x = [record["updates"] for record in measured]
        mean = [record["eval/accuracy"] for record in measured]
        low = [record.get("eval/accuracy_low") for record in measured]
        high = [record.get("eval/accuracy_high") for record in measured]
        label = "accuracy, validation problems"
        axes.plot(x, mean, color="#D55E00", marker="o", markersize=5, linewidth=2, label=label)
        _band(axes, x, low, high, "#D55E00", "95% interval over problems")
    _finish(axes, "updates", "accuracy, reward")
    if all(0 <= reward <= 1 for reward in rewards):
        _percent_axis(axes)
    _legend_below(axes)
    return figure


def _trailing_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to `width - 1` values before it."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _tokens_figure(iterations: Sequence[dict[str, Any]], name: str) -> Figure:
    figure, axes = _canvas("Tokens generated for training, by phase", name)
    updates = [record["updates"] for record in iterations]
    layers = {
        label: ([record.get(f"tokens/{phase}", 0) for record in iterations], colour)
        for phase, (label, colour) in _PHASES.items()
    }
    _stack(axes, updates, layers)
    _finish(axes, "updates", "tokens, cumulative")
    axes.yaxis.set_major_formatter(FuncFormatter(_short_number))
    _legend_below(axes)
    return figure


def _seconds_figure(iterations: Sequence[dict[str, Any]], name: str) -> Figure:
    figure, axes = _canvas("Where the time went", name)
    updates = [record["updates"] for record in iterations]
    layers = {
        label: (_cumulative([record.get(key) or 0 for record in iterations]), colour)
        for key, (label, colour) in _SECONDS.items()
    }
    _stack(axes, updates, layers)
    _finish(axes, "updates", "seconds, cumulative")
    _legend_below(axes)
    return figure


def _cumulative(values: Sequence[float]) -> list[float]:
    totals, total = [], 0.0
    for value in values:
        total += value
        totals.append(total)
    return totals


def _stack(axes: Axes, x: Sequence[float], layers: dict[str, tuple[list[float], str]]) -> None:
    """Stacked areas from 0; a layer that is 0 throughout is left out, its name too."""
    used = {label: layer for label, layer in layers.items() if any(layer[0])}
    if not used:
        return
    total = sum(values[-1] for values, _ in used.values())
    labels = [f"{label} ({values[-1] / total:.0%})" for label, (values, _) in used.items()]
    columns = [[0, *values] for values, _ in used.values()]
    axes.stackplot([0, *x], *columns, labels=labels, colors=[colour for _, colour in used.values()], alpha=0.85)
    axes.set_ylim(bottom=0)


# --- a comparison -----------------------------------------------------------------------------------------------------


def plot_comparison(result: dict[str, Any], out: Path) -> list[Path]:
    """Draw the content of `compare.json` into a directory.

    Returns:
        The files written: `accuracy_over_updates.png`, `..._tokens.png`, `..._seconds.png`, `..._kl.png` (where a run
        measured KL) and `final_accuracy.png`.
    """
    files = []
    for axis in _AXIS_LABELS:
        figure = _curves_figure(result, axis)
        if figure is not None:
            files.append(_save(figure, out / f"accuracy_over_{axis}.png"))
    figure = _final_figure(result)
    return files if figure is None else [*files, _save(figure, out / "final_accuracy.png")]


def _subtitle(result: dict[str, Any], band: bool) -> str:
    """`Recipe default (judgement), 96 updates per run, mean of 5 seeds, 95% t interval`."""
    spec = result["spec"]
    level = spec.get("level") or ""
    recipe = Path(spec["recipe"]).stem
    runs = [figures["num_runs"] for figures in result["algorithms"].values() if figures["num_runs"]]
    seeds = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
    task = recipe if level.rpartition(":")[2] in ("", recipe) else f"{recipe} ({level})"
    amount = f"{float(spec['budget'].partition('=')[2]):,.0f}"
    kind = {"tokens": "generated tokens", "seconds": "seconds of training"}.get(
        spec["budget"].partition("=")[0], "updates"
    )
    mean = "1 seed" if seeds == "1" else f"mean of {seeds} seeds"
    interval = ", 95% t interval" if band else ""
    return f"Recipe {task}, {amount} {kind} per run, {mean}{interval}"


def _curves_figure(result: dict[str, Any], axis: str) -> Figure | None:
    curves = {
        name: figures["curve"]
        for name, figures in result["algorithms"].items()
        if figures["curve"] is not None and figures["curve"].get(axis) is not None
    }
    if not curves:
        return None
    # A mean KL may fall, and a band around a line that turns back shows nothing.
    has_band = axis != "kl" and any(bound is not None for curve in curves.values() for bound in curve["accuracy_low"])
    figure, axes = _canvas(f"Accuracy over {_AXIS_LABELS[axis].split(' (')[0]}", _subtitle(result, has_band))
    for name, curve in curves.items():
        style = STYLES[name]
        x, mean = curve[axis], curve["accuracy"]
        if has_band:
            _band(axes, x, curve["accuracy_low"], curve["accuracy_high"], style.colour, None)
        axes.plot(
            x,
            mean,
            color=style.colour,
            linestyle=style.line,
            marker=style.marker,
            markersize=5,
            markevery=max(1, len(x) // 12),
            linewidth=2.4 if name == "vineppo" else 1.8,
            zorder=4 if name == "vineppo" else 3,
            label=style.label,
        )
    if axis != "kl":
        _mark_best_of_ppo(axes, result)
    _finish(axes, _AXIS_LABELS[axis], "accuracy on validation problems")
    if axis in ("tokens", "updates"):
        axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
    _percent_axis(axes)
    _legend_below(axes)
    return figure


def _mark_best_of_ppo(axes: Axes, result: dict[str, Any]) -> None:
    """The level whose reach the ratios compare."""
    best = result["vineppo_vs_ppo"].get("baseline_best_accuracy")
    if best is not None:
        label = f"PPO's best, {100 * best:.1f}%"
        axes.axhline(best, color=STYLES["ppo"].colour, linewidth=1, linestyle=(0, (1, 2)), zorder=2, label=label)


def _final_figure(result: dict[str, Any]) -> Figure | None:
    """One row per algorithm: mean with interval, and a small dot for each run."""
    shown = {name: f for name, f in result["algorithms"].items() if f["final_accuracy"]["mean"] is not None}
    if not shown:
        return None
    has_band = any(f["final_accuracy"]["low"] is not None for f in shown.values())
    figure, axes = _canvas("Final accuracy", _subtitle(result, has_band), height=1.9 + 0.62 * len(shown))
    starts = [f["accuracy_before"]["mean"] for f in shown.values() if f["accuracy_before"]["mean"] is not None]
    if starts:
        start = sum(starts) / len(starts)
        axes.axvline(start, color=_GREY, linewidth=1.2, linestyle="--", label=f"before training, {100 * start:.1f}%")
    for row, (name, figures) in enumerate(shown.items()):
        style, final = STYLES[name], figures["final_accuracy"]
        single = [run["accuracy_after"] for run in figures["per_seed"] if run["accuracy_after"] is not None]
        axes.scatter(single, [row + 0.2] * len(single), s=18, color=style.colour, alpha=0.55, linewidths=0)
        if final["low"] is not None:
            axes.plot([final["low"], final["high"]], [row, row], color=style.colour, linewidth=3, solid_capstyle="butt")
        axes.plot(final["mean"], row, color=style.colour, marker=style.marker, markersize=9)
        text = f"{100 * final['mean']:.1f}%"
        axes.annotate(text, (final["mean"], row), xytext=(0, 9), textcoords="offset points", ha="center", fontsize=11)
    axes.scatter([], [], s=18, color=_GREY, alpha=0.7, linewidths=0, label="single runs")
    _finish(axes, "accuracy after training, held-out problems", "")
    axes.set_yticks(range(len(shown)), [STYLES[name].label for name in shown], fontsize=12)
    axes.set_ylim(len(shown) - 0.4, -0.65)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    left, right = axes.get_xlim()
    axes.set_xlim(max(0, left), min(1, right + 0.01))
    _legend_below(axes)
    return figure


# --- shared looks -----------------------------------------------------------------------------------------------------


_SUBTITLE_LETTERS = 92
"""As many stand in one line beside the vertical axis; longer subtitles are written smaller."""


def _canvas(title: str, subtitle: str, height: float = 5.0) -> tuple[Figure, Axes]:
    """A figure whose title says what is compared. No pyplot: nothing global, no display needed."""
    figure = Figure(figsize=(8, height), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=14, fontweight="bold", loc="left", pad=26)
    note = axes.annotate(
        subtitle,
        (0, 1),
        xytext=(0, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=min(10.5, 10.5 * _SUBTITLE_LETTERS / max(1, len(subtitle))),
        color=_GREY,
    )
    note.set_in_layout(False)  # a long line must not narrow the picture
    return figure, axes


def _band(
    axes: Axes,
    x: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    colour: str,
    label: str | None,
) -> None:
    """Shade the interval where it is known."""
    known = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if b is not None and c is not None]
    if known:
        xs, lows, highs = zip(*known, strict=True)
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.14, linewidth=0, label=label)


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label, fontsize=12)
    axes.set_ylabel(y_label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def _percent_axis(axes: Axes) -> None:
    """Percent on the vertical axis, within 0 to 100: an interval's band may leave it, an accuracy cannot."""
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low), min(1.0, high) + 0.002)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend_below(axes: Axes) -> None:
    """All names under the picture, where they hide nothing, in as many rows as they need."""
    handles, labels = axes.get_legend_handles_labels()
    if handles and axes.figure is not None:
        width = sum(len(label) + 8 for label in labels)  # in letters; the handle and the gaps are worth 8
        rows = math.ceil(width / 92)
        columns = math.ceil(len(labels) / rows)
        axes.figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11, columnspacing=1.6
        )


def _short_number(value: float, position: int | None = None) -> str:
    """1500000 -> 1.5M, 20000 -> 20k, 96 -> 96."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> Path:
    """Write the PNG without a software stamp, so that equal data give equal files."""
    figure.savefig(path, metadata={"Software": None})
    return path
