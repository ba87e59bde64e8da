"""Print the progress of a training run on standard output, and a report at the end of the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm

_PHASES = {"sample": "sampling", "credit": "credit", "update": "updating", "eval": "evaluating"}
"""Name of each phase of an iteration (`Reporter.phase`), in their order -> its name on the terminal."""


class ConsoleReporter:
    """Print the progress of a run on standard output. It implements the protocol `vineppo.training.session.Reporter`.

    On a terminal, the reporter shows a line that is updated: the phase of the iteration, a bar, the time that is left,
    the reward of the newest iteration, the newest accuracy, and tokens per second. It prints one line above this line
    for each evaluation. If standard output is a file or a pipe, the reporter prints one line per iteration.
    """

    def __init__(self, config: Config, live: bool | None = None) -> None:
        """Create a reporter.

        Args:
            config: configuration of the run.
            live: whether to show the line that is updated. None shows it if standard output is a terminal.
        """
        self._live = sys.stdout.isatty() if live is None else live
        self._config = config
        self._bar: Any = None  # the rich.progress.Progress that is shown now, or None
        self._row: Any = None  # the id that rich gave to the only row of the bar
        self._last: Mapping[str, Any] = {}  # the metrics of the newest iteration
        self._done = self._increment = 0.0  # completed share of the run, and how much of it is the newest iteration
        self._accuracy: float | None = None

    def start(self, sampler: str) -> None:
        """Print the first two lines of the output, and start the progress bar if there is one."""
        _print(headline(self._config))
        _print(sampler)
        if not self._live:
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.table import Column

        columns = (
            SpinnerColumn("line"),
            TextColumn("{task.fields[phase]:<10}", markup=False),
            BarColumn(bar_width=12),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
        )
        self._bar = Progress(*columns, expand=True)
        self._row = self._bar.add_task("starting model", total=1.0, phase="")
        self._bar.start()

    def before_iteration(self, iteration: int) -> None:
        """Print nothing."""

    def phase(self, name: str) -> None:
        """Show the name of the phase, and move the bar by the share of the iteration that earlier phases took.

        The shares are those of the iteration before.
        """
        if self._bar is not None:
            completed = min(1.0, self._done + self._increment * share_before(name, self._last))
            self._bar.update(self._row, completed=completed, phase=_PHASES.get(name, name))

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Show the metrics of one iteration.

        Args:
            metrics: the line of the iteration in metrics.jsonl, as a dictionary. Iteration 0 is the starting model.
        """
        iterations = self._config.run.iterations
        line = progress_line(metrics, iterations)
        if self._bar is None:
            # Iteration 0 is the starting model. Without an accuracy, there is nothing to print about it.
            if metrics.get("iteration") or "accuracy" in line:
                _print(line)
            return
        if metrics.get("eval/accuracy") is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._accuracy = metrics["eval/accuracy"]
        done = share_done(metrics, self._config)
        self._increment, self._done = (done - self._done if self._last else 0.0), done
        text = live_line(metrics, self._last, iterations, self._accuracy)
        self._bar.update(self._row, completed=done, description=text)
        self._last = metrics

    def saved(self, iteration: int) -> None:
        """Print nothing."""

    def wants_to_stop(self) -> bool:
        """Return False: this reporter never stops a run. The user stops it with Ctrl-C."""
        return False

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Stop the progress bar and print the report.

        Args:
            summary: the content of summary.json.
            run_dir: the directory of the run.
        """
        self.close()
        _print("")
        for line in final_report(summary, run_dir):
            _print(line)

    def close(self) -> None:
        """Stop the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def headline(config: Config) -> str:
    """Return one line about a run: its algorithm, model, task, responses per iteration, limits and seed."""
    task = f"chain ({config.task.level}, {config.task.num_steps} steps)"
    if config.task.name != "chain":
        task = " ".join(filter(None, (config.task.name, config.task.train_path)))
    length = f"{config.run.iterations:,} iterations"
    limits = {"updates": config.run.max_updates, "tokens": config.run.max_tokens, "seconds": config.run.max_seconds}
    active = [f"{amount:,.15g} {kind}" for kind, amount in limits.items() if amount]
    if active:
        length = f"until {' or '.join(active)}"
    rollouts = " x ".join(
        f"{count} {word}{'s' * (count != 1)}"
        for count, word in ((config.rollouts.num_problems, "problem"), (config.rollouts.group_size, "response"))
    )
    name = find_algorithm(config.algorithm).label
    return f"{name} on {config.model.path}, task {task}: {rollouts} per iteration, {length}, seed {config.run.seed}"


def share_done(metrics: Mapping[str, Any], config: Config) -> float:
    """Return the completed share of the run, from 0 to 1.

    The number of iterations is limited, and the settings can also limit updates, tokens and seconds. The run ends at
    the limit that it reaches first, so the result is the largest of the shares of the limits.

    Args:
        metrics: the newest line of metrics.jsonl.
        config: configuration of the run.
    """
    run = config.run
    pairs = [
        (metrics.get("iteration"), run.iterations),
        (metrics.get("updates"), run.max_updates),
        (metrics.get("tokens/generated"), run.max_tokens),
        (metrics.get("seconds/train"), run.max_seconds),
    ]
    return min(1.0, max((done or 0) / limit for done, limit in pairs if limit))


def progress_line(metrics: Mapping[str, Any], iterations: int) -> str:
    """Return one line about an iteration, such as `iteration  7/60  reward 0.250  tokens 45.6k  12 s`.

    Args:
        metrics: the line of the iteration in metrics.jsonl. Metrics that are missing or None are left out.
        iterations: number of iterations of the run.
    """
    number = metrics.get("iteration", 0)
    width = len(str(iterations))
    parts = [f"iteration {number:>{width}}/{iterations}" if number else "start".ljust(11 + 2 * width)]
    if metrics.get("reward/mean") is not None:
        parts.append(f"reward {metrics['reward/mean']:.3f}")
    if number:
        parts.append(f"tokens {short_number(metrics.get('tokens/generated', 0))}")
    if number and "seconds/train" in metrics:
        parts.append(f"{metrics['seconds/train']:.0f} s")
    if metrics.get("eval/accuracy") is not None:
        bounds = {name: metrics.get(f"eval/accuracy_{name}") for name in ("low", "high")}
        parts.append(f"accuracy {interval_text({'mean': metrics['eval/accuracy'], **bounds})}")
    return "  ".join(parts)


def share_before(phase: str, metrics: Mapping[str, Any]) -> float:
    """Return the share of an iteration's seconds that its phases before a phase took, from 0 to 1.

    Args:
        phase: name of the phase.
        metrics: the line of the iteration in metrics.jsonl. Without seconds, the result is 0.
    """
    seconds = {name: metrics.get(f"seconds/{name}") or 0.0 for name in _PHASES}
    names = list(_PHASES)
    before = names[: names.index(phase)] if phase in names else []
    total = sum(seconds.values())
    return sum(seconds[name] for name in before) / total if total else 0.0


def tokens_per_second(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> float | None:
    """Return the generated tokens of an iteration, divided by its seconds of sampling and credit; None if unknown.

    Args:
        metrics: the line of the iteration in metrics.jsonl.
        before: the line of the iteration before. Its number of tokens is subtracted.
    """
    seconds = (metrics.get("seconds/sample") or 0.0) + (metrics.get("seconds/credit") or 0.0)
    tokens, tokens_before = metrics.get("tokens/generated"), before.get("tokens/generated")
    if tokens is None or tokens_before is None or not seconds:
        return None
    return float(tokens - tokens_before) / seconds


def live_line(metrics: Mapping[str, Any], before: Mapping[str, Any], iterations: int, accuracy: float | None) -> str:
    """Return what the terminal shows beside the bar: iteration, reward, accuracy and tokens per second.

    Args:
        metrics: the line of the newest iteration in metrics.jsonl.
        before: the line before; empty if there is none.
        iterations: number of iterations of the run.
        accuracy: the newest accuracy on the validation problems; None if there is none.
    """
    parts = [f"{metrics.get('iteration', 0)}/{iterations}"]
    if metrics.get("reward/mean") is not None:
        parts.append(f"reward {metrics['reward/mean']:.3f}")
    if accuracy is not None:
        parts.append(f"accuracy {100 * accuracy:.1f}%")
    if (speed := tokens_per_second(metrics, before)) is not None:
        parts.append(f"{short_number(speed)} tokens/s")
    return "  ".join(parts)


def final_report(summary: Mapping[str, Any], run_dir: Path) -> list[str]:
    """Return the lines of the report that is printed at the end of a run.

    Args:
        summary: the content of summary.json.
        run_dir: the directory of the run.
    """
    before, after, tokens = (summary.get(key) or {} for key in ("accuracy_before", "accuracy_after", "tokens"))
    evaluation = duration(summary.get("seconds_eval"))
    amounts = f"{summary.get('iterations', 0):,} iterations, {summary.get('updates', 0):,} updates"
    title = f"{summary.get('label', '')}, seed {summary.get('seed')}: {amounts}"
    gain = ""
    if before.get("mean") is not None and after.get("mean") is not None:
        gain = f"   {100 * (after['mean'] - before['mean']):+.1f} points"
    generated = [f"{tokens.get('rollouts', 0):,} rollouts"]
    generated += [f"{tokens['mc']:,} MC rollouts"] if tokens.get("mc") else []
    greedy = {f"greedy {when}": summary.get(f"greedy_{when}") for when in ("before", "after")}
    rows = {
        "wall-clock": f"{duration(summary.get('seconds'))} training, {evaluation} evaluation",
        "accuracy before": interval_text(before),
        "accuracy after": interval_text(after) + gain,
        **{name: interval_text(interval) for name, interval in greedy.items() if interval},
        "tokens": f"{', '.join(generated)} (generated); {tokens.get('trained', 0):,} trained",
        "run": str(run_dir),
        "plots": str(run_dir / "plots"),
        "model": str(run_dir / (summary.get("final") or "final")),
    }
    if summary.get("finish_reason") == "interrupted":
        title += ", interrupted"
        rows = {key: rows[key] for key in ("wall-clock", "accuracy before", "tokens", "run")}
        rows["continue with"] = f"vineppo train --resume {run_dir}"
    return [title, *(f"  {key:<16} {value}" for key, value in rows.items())]


def interval_text(interval: Mapping[str, Any]) -> str:
    """Format a mean with its confidence interval in percent.

    {"mean": 0.5, "low": 0.4, "high": 0.6} becomes `50.0% [40.0, 60.0]`. If a bound is None, the interval is left out.
    If the mean is None, the result is a dash.
    """
    mean, low, high = (interval.get(key) for key in ("mean", "low", "high"))
    if mean is None:
        return "-"
    bounds = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * mean:.1f}%{bounds}"


def duration(seconds: float | None) -> str:
    """Format a number of seconds: 75.2 becomes `1 min 15 s`, and None becomes a dash."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def short_number(value: float) -> str:
    """Format a number with at most three digits and a suffix: 1234567 becomes `1.23M`, and 45600 becomes `45.6k`."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"


def _print(line: str) -> None:
    """Print a line without delay, also if standard output is a file or a pipe."""
    print(line, flush=True)
