"""Determine which runs of a comparison are not finished, and train runs in separate processes.

`vineppo tune` trains its runs in the same way.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console

from vineppo.compare.records import load_run, number_in
from vineppo.compare.spec import Arm, CompareSpec, settings_of_budget
from vineppo.compare.tables import format_count, format_percent
from vineppo.run.directory import RunDirectory
from vineppo.run.files import remove_tree

_STATUS_SECONDS = 2.0
"""Seconds between updates of the status line. Each update reads the metrics of all running processes."""

_INTERRUPTED = 130
"""Exit code of `vineppo train` after a signal that asks it to stop."""

RunState = Literal["absent", "finished", "resumable", "broken"]
"""State of a run: `absent` (without a directory), `finished`, `resumable` (not finished, with a complete checkpoint) or
`broken` (not finished, without a complete checkpoint)."""

Action = Literal["start", "keep", "resume", "restart"]
"""What a comparison does with a run: `start` a new run, `keep` the results of a finished run, `resume` a run from its
checkpoint, or `restart` a run, that is, delete its directory and start it again."""

_ACTIONS: dict[RunState, Action] = {
    "absent": "start",
    "finished": "keep",
    "resumable": "resume",
    "broken": "restart",
}
"""The action for each state of a run."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison, and what the comparison does with it."""

    arm: str
    """Name of the arm."""
    seed: int
    """Seed of the run."""
    directory: Path
    """Run directory."""
    log: Path
    """File that receives the output of the training process."""
    action: Action
    """What the comparison does with the run."""
    command: tuple[str, ...]
    """Command line that starts or resumes the run; empty if the action is `keep`."""
    keep_checkpoint: bool = True
    """Whether the checkpoint of the run, several times as large as its model, is kept after the run has finished."""

    @property
    def name(self) -> str:
        """Name of the run in messages, for example `vineppo seed 0`."""
        return f"{self.arm} seed {self.seed}"


def plan_runs(spec: CompareSpec) -> list[PlannedRun]:
    """Return all runs of a comparison, each with its action. This function only reads the directory of the comparison.

    The runs are ordered by seed and then by arm, so that the arms take turns. If the machine becomes slower over hours,
    all arms are affected alike.
    """
    return [_plan_run(spec, arm, seed) for seed in spec.seeds for arm in spec.arms]


def _plan_run(spec: CompareSpec, arm: Arm, seed: int) -> PlannedRun:
    """Determine the action and the command line of one run."""
    name = f"{arm.name}-seed{seed}"
    directory = Path(spec.out) / "runs" / name
    action = _ACTIONS[run_state(directory)]
    train = (sys.executable, "-m", "vineppo", "train")
    budget = tuple(text for key, amount in settings_of_budget(spec.budget).items() for text in (f"--{key}", amount))
    identity = ("--algorithm", arm.algorithm, "--run.seed", str(seed), "--run.dir", str(directory))
    commands: dict[Action, tuple[str, ...]] = {
        "keep": (),
        "resume": (*train, "--resume", str(directory)),
    }
    overrides = (f"--{key}={value}" for key, value in spec.settings_of(arm).items())
    fresh = (*train, spec.recipe, *identity, *budget, *overrides)
    log = Path(spec.out) / "logs" / f"{name}.log"
    keep_checkpoint = "run.keep_checkpoints" in spec.settings_of(arm)
    return PlannedRun(arm.name, seed, directory, log, action, commands.get(action, fresh), keep_checkpoint)


def run_state(directory: Path) -> RunState:
    """Return the state of the run in a directory."""
    if not directory.exists():
        return "absent"
    summary = read_json(directory / "summary.json")
    if summary and summary.get("finish_reason") not in (None, "interrupted"):
        return "finished"
    # A checkpoint is complete if it has a manifest and its directory has no temporary name such as `.000020.tmp`.
    manifests = directory.glob("checkpoints/*/manifest.json")
    return "resumable" if any(re.fullmatch(r"\d+(\.old)?", path.parent.name) for path in manifests) else "broken"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if the file is missing or contains no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@dataclass(frozen=True)
class _Child:
    """A training process that was started, with its plan and its open log file."""

    plan: PlannedRun
    process: subprocess.Popen[bytes]
    log: TextIO


def run_all(plans: Sequence[PlannedRun], jobs: int, console: Console) -> dict[str, str]:
    """Train all runs that have a command, at most `jobs` at the same time.

    Args:
        plans: the runs.
        jobs: largest number of runs that train at the same time.
        console: object that prints the progress.
    Returns:
        Name of each failed run -> last line of its log.
    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the training processes have saved their checkpoints.
    """
    waiting = [plan for plan in plans if plan.command]
    running: list[_Child] = []
    failures: dict[str, str] = {}
    done = len(plans) - len(waiting)
    next_status = 0.0
    for plan in plans:  # runs that finished while an earlier call was being stopped
        remove_checkpoint(plan)
    with _stop_signals(), console.status("starting", refresh_per_second=2) as status:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_start(waiting.pop(0), jobs))
                time.sleep(0.2)
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    child.log.close()
                    done += 1
                    _report(child, f"[{done}/{len(plans)}]", failures, console)
                if console.is_terminal and time.monotonic() >= next_status:
                    status.update("running " + ", ".join(_progress(child.plan) for child in running))
                    next_status = time.monotonic() + _STATUS_SECONDS
        except KeyboardInterrupt:
            status.update("stopping: waiting for the running processes to save their checkpoints")
            _stop(running)
            print_line(console, "interrupted; run the same command again to continue")
            raise
        finally:
            for child in running:
                if child.process.poll() is None:
                    child.process.kill()
                child.log.close()
    return failures


def _start(plan: PlannedRun, jobs: int) -> _Child:
    """Start a run in a separate process.

    The process gets its own process session (see setsid(2)), so that Ctrl-C in the terminal does not reach it. Instead,
    `_stop` sends the process SIGINT.

    Args:
        plan: the run.
        jobs: maximum number of runs that train at the same time. They share the cores of the CPU equally.
    """
    if plan.action == "restart":
        shutil.rmtree(plan.directory)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # the log is then written without delay
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    log = open(plan.log, "a" if plan.action == "resume" else "w", encoding="utf-8")  # noqa: SIM115 (closed by run_all)
    log.write(f"$ {' '.join(plan.command)}\n")
    log.flush()
    # With close_fds=False, the process inherits the lock of the comparison's directory.
    process = subprocess.Popen(
        plan.command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        close_fds=False,
    )
    return _Child(plan, process, log)


def _report(child: _Child, counter: str, failures: dict[str, str], console: Console) -> None:
    """Print the result of a training process that has ended. If the run failed, add it to `failures`.

    A run that was interrupted, for example by SIGTERM, has saved a checkpoint and did not fail.

    Args:
        child: the process.
        counter: text before the message, such as `[3/20]`.
        failures: name of each failed run -> last line of its log.
        console: object that prints the message.
    """
    plan, code = child.plan, child.process.returncode
    if code == 0 and run_state(plan.directory) == "finished":
        remove_checkpoint(plan)
        print_line(console, f"{counter} {plan.name}: {_result(load_run(plan.directory).summary)}")
        return
    if code == _INTERRUPTED:
        print_line(console, f"{counter} {plan.name}: interrupted; run the same command again to continue it")
        return
    lines = _last_lines(plan.log)
    failures[plan.name] = lines[-1] if lines else f"exit code {code}"
    print_line(console, f"{counter} {plan.name} FAILED with exit code {code}; last lines of {plan.log}:")
    for line in lines:
        print_line(console, f"    {line}")


def remove_checkpoint(plan: PlannedRun) -> None:
    """Remove the checkpoints of a run if it has finished and the plan does not keep them."""
    if not plan.keep_checkpoint and run_state(plan.directory) == "finished":
        remove_tree(plan.directory / "checkpoints")


def _result(summary: dict[str, Any]) -> str:
    """Describe the result of a finished run from its summary. Accuracies that were not measured are left out."""
    updates, seconds = (format_count(summary.get(key)) for key in ("updates", "seconds"))
    before, after = (number_in(summary, key, "mean") for key in ("accuracy_before", "accuracy_after"))
    measured = before is not None and after is not None
    accuracy = f"accuracy {format_percent(before)} -> {format_percent(after)}, " if measured else ""
    return f"{accuracy}{updates} updates, {seconds} s"


def outcome_of_missing(
    plan: PlannedRun, failures: dict[str, str]
) -> tuple[Literal["failed", "stopped", "skipped"], str]:
    """Return (state, reason) of a run that did not finish."""
    if plan.name in failures:
        return "failed", failures[plan.name]
    if run_state(plan.directory) == "absent":
        return "skipped", "it was not started"
    reason = (read_json(plan.directory / "summary.json") or {}).get("finish_reason")
    if reason == "interrupted":
        return "stopped", "it was interrupted; run the same command again to continue it"
    return "stopped", "its process ended before the run finished; run the same command again to continue it"


def _last_lines(log: Path, num_lines: int = 8) -> list[str]:
    """Return the last `num_lines` lines of a log, without empty lines and without the command line at its start."""
    # A progress bar writes a carriage return (\r) to overwrite its line. Split the log there too.
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("$ ")][-num_lines:]


def _progress(plan: PlannedRun) -> str:
    """Return the name of a run and the number of updates in its metrics, such as `vineppo seed 0 (16 updates)`."""
    lines = RunDirectory(plan.directory, {}).read_metrics()
    return f"{plan.name} ({lines[-1].get('updates', 0) if lines else 0} updates)"


def _stop(running: Sequence[_Child]) -> None:
    """Interrupt the training processes, and wait until they have saved their checkpoints and ended.

    A second Ctrl-C raises KeyboardInterrupt here. `run_all` then kills the processes.
    """
    for child in running:
        if child.process.poll() is None:
            child.process.send_signal(signal.SIGINT)
    for child in running:
        child.process.wait()


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """Within the context, SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does.

    Without this, the two signals would end only the process of the comparison. The training processes would continue,
    because they are in other process sessions.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signals = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    try:
        before = {number: signal.getsignal(number) for number in signals}
        for number in signals:
            if before[number] != signal.SIG_IGN:  # A program started with nohup must continue to ignore SIGHUP.
                signal.signal(number, stop)
    except ValueError:  # Python allows signal handlers only in the main thread.
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_line(console: Console, text: str) -> None:
    """Print a line as it is. Square brackets in the line are not interpreted as markup of rich."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
