"""Plot the metrics of one run as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from vineppo.run.directory import RunDirectory
from vineppo.run.figures import band, canvas, finish, legend_below, percent_axis, plain_text, save, short_number
from vineppo.types import UserError

_PHASES = {"rollouts": ("rollouts", "#0072B2"), "mc": ("MC rollouts", "#E69F00")}
"""Last part of the name of a metric `tokens/...` -> (label, colour)."""
_SECONDS = {
    "seconds/sample": ("sampling", "#0072B2"),
    "seconds/credit": ("credit", "#E69F00"),
    "seconds/update": ("updates", "#009E73"),
    "seconds/eval": ("evaluation", "#999999"),
}
"""Name of a metric -> (label, colour)."""


def plot_run(run_dir: Path) -> list[Path]:
    """Plot accuracy, reward, tokens and seconds of a run, and save the plots to `plots/` in the run directory.

    Returns:
        Paths of `accuracy.png`, `tokens.png` and `seconds.png`; empty if the run has no finished iteration.
    Raises:
        UserError: if the directory is not a run directory, or a line of metrics.jsonl lacks a metric.
        OSError: if the plots cannot be written.
    """
    run_dir = Path(run_dir)
    run = RunDirectory.open(run_dir, writable=False)
    records = run.read_metrics()
    iterations = [record for record in records if record["iteration"] > 0]
    if not iterations:
        return []
    _check_records(run, records)
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    name = _run_title(run)
    return [
        save(_accuracy_figure(records, iterations, name), folder / "accuracy.png"),
        save(_tokens_figure(iterations, name), folder / "tokens.png"),
        save(_seconds_figure(iterations, name), folder / "seconds.png"),
    ]


def _check_records(run: RunDirectory, records: Sequence[dict[str, Any]]) -> None:
    """Raise UserError if a line of metrics.jsonl lacks a metric without which it cannot be plotted.

    The mean reward is None if no rollout has a reward. Iteration 0, the starting model, has no mean reward.
    """
    for record in records:
        required: dict[str, Any] = {"updates": int | float}
        if record["iteration"] > 0:
            required["reward/mean"] = int | float | None
        for name, kind in required.items():
            if name not in record or not isinstance(record[name], kind):
                raise UserError(
                    f"{run.metrics} is damaged: the line of iteration {record['iteration']} has no number {name!r}; "
                    "remove that line"
                )


def _run_title(run: RunDirectory) -> str:
    """Return a text that names the run, such as `VinePPO, seed 0, judgement`.

    If the run is not finished, it has no summary.json, and the text is the name of the directory.
    """
    summary = run.read_summary()
    if not summary:
        return run.path.resolve().name
    parts = [plain_text(summary.get("label", "")), f"seed {summary.get('seed')}", str(summary.get("recipe") or "")]
    return ", ".join(part for part in parts if part)


def _accuracy_figure(records: Sequence[dict[str, Any]], iterations: Sequence[dict[str, Any]], name: str) -> Figure:
    """Plot the mean reward of the rollouts and the accuracy on validation problems over updates.

    Args:
        records: all lines of metrics.jsonl, including iteration 0, which is the starting model.
        iterations: the same lines without iteration 0, which has no reward.
        name: subtitle.
    """
    figure, axes = canvas("Accuracy and reward over updates", name)
    updates = [record["updates"] for record in iterations]
    # The mean is None if no rollout has a reward. The curve has a gap at NaN.
    rewards = [math.nan if record["reward/mean"] is None else record["reward/mean"] for record in iterations]
    axes.plot(updates, rewards, color="#56B4E9", linewidth=1, alpha=0.6, label="mean reward of the rollouts")
    if len(rewards) >= 10:
        width = max(5, len(rewards) // 10)
        axes.plot(updates, _trailing_mean(rewards, width), color="#0072B2", label=f"mean reward of {width} iterations")
    measured = [record for record in records if record.get("eval/accuracy") is not None]
    if measured:
        x = [record["updates"] for record in measured]
        mean = [record["eval/accuracy"] for record in measured]
        low = [record.get("eval/accuracy_low") for record in measured]
        high = [record.get("eval/accuracy_high") for record in measured]
        label = "accuracy, validation problems"
        axes.plot(x, mean, color="#D55E00", marker="o", markersize=5, linewidth=2, label=label)
        band(axes, x, low, high, "#D55E00", "95% interval over problems")
    finish(axes, "updates", "accuracy, reward")
    if all(0 <= reward <= 1 for reward in rewards if not math.isnan(reward)):
        percent_axis(axes)
    legend_below(axes)
    return figure


def _trailing_mean(values: Sequence[float], width: int) -> list[float]:
    """Return, for each value, the mean of this value and the `width - 1` values before it (fewer at the start).

    Values that are NaN are left out. A mean is NaN if no value is left.
    """
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    known = [[value for value in window if not math.isnan(value)] for window in windows]
    return [sum(window) / len(window) if window else math.nan for window in known]


def _tokens_figure(iterations: Sequence[dict[str, Any]], name: str) -> Figure:
    """Plot the cumulative numbers of tokens in rollouts and in MC rollouts over updates."""
    figure, axes = canvas("Tokens generated for training, by phase", name)
    updates = [record["updates"] for record in iterations]
    layers = {
        label: ([record.get(f"tokens/{phase}", 0) for record in iterations], colour)
        for phase, (label, colour) in _PHASES.items()
    }
    _stack(axes, updates, layers)
    finish(axes, "updates", "tokens, cumulative")
    axes.yaxis.set_major_formatter(FuncFormatter(short_number))
    legend_below(axes)
    return figure


def _seconds_figure(iterations: Sequence[dict[str, Any]], name: str) -> Figure:
    """Plot the cumulative seconds of each phase of the iterations over updates."""
    figure, axes = canvas("Time of each phase", name)
    updates = [record["updates"] for record in iterations]
    layers = {
        label: (_cumulative([record.get(key) or 0 for record in iterations]), colour)
        for key, (label, colour) in _SECONDS.items()
    }
    _stack(axes, updates, layers)
    finish(axes, "updates", "seconds, cumulative")
    legend_below(axes)
    return figure


def _cumulative(values: Sequence[float]) -> list[float]:
    """Return the running totals of the values, as a list of the same length."""
    totals, total = [], 0.0
    for value in values:
        total += value
        totals.append(total)
    return totals


def _stack(axes: Axes, x: Sequence[float], layers: dict[str, tuple[list[float], str]]) -> None:
    """Draw one area for each quantity, stacked on each other. Each area starts at the value 0 at x = 0.

    A quantity whose values are all 0 is left out. The legend shows the share of each quantity in the final total.

    Args:
        axes: the axes to draw on.
        x: x coordinates, shape (N,).
        layers: label of the quantity -> (cumulative values with shape (N,), colour).
    """
    used = {label: layer for label, layer in layers.items() if any(layer[0])}
    if not used:
        return
    total = sum(values[-1] for values, _ in used.values())
    labels = [f"{label} ({values[-1] / total:.0%})" for label, (values, _) in used.items()]
    columns = [[0, *values] for values, _ in used.values()]
    axes.stackplot([0, *x], *columns, labels=labels, colors=[colour for _, colour in used.values()], alpha=0.85)
    axes.set_ylim(bottom=0)
