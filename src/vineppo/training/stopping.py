"""Decide when a run stops: its limits, signals, and a console that goes away."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vineppo.config.schema import RunConfig
from vineppo.training.progress import Progress
from vineppo.training.session import Reporter

_NO_CONSOLE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
"""Errors of writing to a terminal that was closed, or to a pipe that nobody reads."""


def limit_reached(limits: RunConfig, progress: Progress, updates_per_iteration: int) -> str:
    """Return the limit that the run has reached (`iterations`, `updates`, `tokens`, `seconds`), or an empty string."""
    if progress.iteration >= limits.iterations:
        return "iterations"
    # The limit applies to planned updates, which include minibatches without samples. The learning-rate schedule counts
    # in the same way.
    if limits.max_updates and progress.iteration * updates_per_iteration >= limits.max_updates:
        return "updates"
    if limits.max_tokens and progress.rollout_tokens + progress.mc_tokens >= limits.max_tokens:
        return "tokens"
    if limits.max_seconds and progress.seconds_train >= limits.max_seconds:
        return "seconds"
    return ""


@contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets, so that the loop stops after the current iteration.

    The second signal raises KeyboardInterrupt. SIGHUP, which a closed terminal sends, is ignored: the run goes on.
    Outside the main thread, Python cannot handle signals, and nothing sets the event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(signum: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with hangup_ignored():
            yield stop
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


@contextmanager
def hangup_ignored() -> Iterator[None]:
    """Ignore SIGHUP, which a closed terminal sends, inside the block. Outside the main thread, nothing is done."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGHUP"):
        yield
        return
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


class LastingReporter:
    """Wraps a reporter that prints, so that the run goes on if the terminal or the reader of a pipe goes away.

    Output that can no longer be written is discarded. Other errors of the reporter are raised. A reporter that calls
    code of a user must not be wrapped, because an error of that code may look like one of the console.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def start(self, sampler: str) -> None:
        """Start the report."""
        without_console(lambda: self._reporter.start(sampler))

    def before_iteration(self, iteration: int) -> None:
        """Report the beginning of an iteration."""
        without_console(lambda: self._reporter.before_iteration(iteration))

    def phase(self, name: str) -> None:
        """Report the beginning of a phase."""
        without_console(lambda: self._reporter.phase(name))

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Report an iteration."""
        without_console(lambda: self._reporter.iteration(metrics))

    def saved(self, iteration: int) -> None:
        """Report that a checkpoint was written."""
        without_console(lambda: self._reporter.saved(iteration))

    def wants_to_stop(self) -> bool:
        """Return whether the run should end now."""
        return self._reporter.wants_to_stop()

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Report the end of the run."""
        without_console(lambda: self._reporter.finish(summary, run_dir))


def without_console(report: Callable[[], None]) -> None:
    """Call `report`. If it cannot write to the console, discard all further output."""
    try:
        report()
    except OSError as error:
        if error.errno not in _NO_CONSOLE:
            raise
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
