"""Find out which of the processes of a run have ended, and let only one of them report an error.

A launcher (torchrun, accelerate launch) starts the processes of a run, the *ranks*. They share a store of PyTorch,
which is a table of numbers. A thread in every rank counts up a number there every second. If the number of another rank
stands still for `SILENCE` seconds, or another rank has reported an error, this rank ends.

PyTorch is imported inside the functions, so that an import of this module does not import PyTorch.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from vineppo.types import UserError

SILENCE = 20.0
"""Seconds without a sign of life after which a rank counts as ended."""
GRACE = 10.0
"""Seconds that a rank has to end by itself after another rank has reported an error."""
_CONNECT = 10.0
"""Seconds to wait for the store."""
_LOST = ("connection closed", "connection reset", "connection refused", "socket", "gloo", "nccl", "broken pipe")
"""Words of which one is in the errors of PyTorch about a lost rank."""
_runs = 0
"""Number of runs that this process has joined."""
_reports = False
"""Whether this process reports the error that ends the run."""


class PeerEnded(UserError):
    """Another rank has ended the run and reports why, so this rank is silent."""


def launched_ranks() -> tuple[int, int]:
    """Return (number of this process, number of processes) as the launcher has set them; (0, 1) without a launcher."""
    rank, count = (os.environ.get(name, default).strip() for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and count.isdecimal()) or int(count) < 2:
        return 0, 1
    return int(rank), int(count)


def require_launcher() -> None:
    """Raise UserError if there should be several processes, but nothing says how they connect."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if launched_ranks()[1] > 1 and missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} of the environment is not set, so the "
            "processes of the run cannot connect; start them with torchrun or accelerate launch, or unset WORLD_SIZE"
        )


def may_report() -> bool:
    """Return whether this process reports an error that ends the run: the first of the ranks that asks.

    It is also true without other ranks, and if the store cannot be reached.
    """
    global _reports
    if launched_ranks()[1] > 1 and not _reports:
        try:
            _reports = _connected().add(_key("reported"), 1) == 1
        except (RuntimeError, ValueError, KeyError, OSError):
            _reports = True
        return _reports
    return True


@contextlib.contextmanager
def ended_together() -> Iterator[Callable[[], None]]:
    """Context manager in which an error of one rank ends all ranks, and only one rank reports it.

    It yields a function that starts the thread of this rank; it is called when the ranks are connected.

    Raises:
        PeerEnded: if another rank has reported an error.
        UserError: if another rank has ended without a report, or this rank raised the error.
    """
    global _runs
    if launched_ranks()[1] == 1:
        yield lambda: None
        return
    _runs += 1
    finished = threading.Event()
    try:
        yield threading.Thread(target=_watch, args=(finished,), daemon=True).start
    except PeerEnded:
        raise
    except BaseException as error:
        lost = _is_lost(error)
        if lost:
            _without_signals()
        if not may_report():
            raise PeerEnded("another process has ended the run") from None
        if lost:
            raise UserError(_message("a process of the run has ended or lost its connection")) from None
        raise
    finally:
        finished.set()


def _without_signals() -> None:
    """Ignore SIGTERM, with which torchrun ends the other ranks, until this rank has reported why it ends."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_lost(error: BaseException) -> bool:
    """Return whether an error of PyTorch says that another rank is gone."""
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in text for word in _LOST)
    )


def _message(what: str) -> str:
    return f"{what}; all processes of the run end; continue it from its last checkpoint with --resume RUN"


def _watch(finished: threading.Event) -> None:
    """Give a sign of life every second, and end this process if another rank has ended.

    Args:
        finished: is set when the run of this process has ended.
    """
    (rank, count), run = launched_ranks(), _runs
    try:
        store = _connected()
        seen = dict.fromkeys(range(count), (0, time.monotonic()))
        while not finished.wait(1.0):
            store.add(_key(f"alive/{run}/{rank}"), 1)
            now = time.monotonic()
            for other in range(count):
                signs = store.add(_key(f"alive/{run}/{other}"), 0)
                if signs != seen[other][0]:
                    seen[other] = (signs, now)
            silent = [other for other, (signs, when) in seen.items() if signs and now - when > SILENCE]
            silent = [other for other in silent if not store.add(_key(f"ended/{run}/{other}"), 0)]
            if silent and not finished.is_set():
                _end(finished, _message(f"rank {silent[0]} has given no sign of life for {SILENCE:.0f} seconds"))
            if store.add(_key("reported"), 0):
                _end(finished, "")
        store.add(_key(f"ended/{run}/{rank}"), 1)
    except (RuntimeError, ValueError, OSError):
        # The store ended with the process that holds it, which is the launcher or rank 0.
        _end(finished, _message("the launcher or rank 0 has ended"), wait_first=True)


def _end(finished: threading.Event, message: str, wait_first: bool = False) -> None:
    """Report a message, and end this process if its main thread does not end within `GRACE` seconds.

    Args:
        message: the message; empty if another rank has reported.
        wait_first: whether the message is reported only after these seconds.
    """
    if wait_first and finished.wait(GRACE):
        return
    if message and may_report():
        print(f"error: {message}", file=sys.stderr, flush=True)
    if not finished.wait(GRACE):
        os._exit(2)


def _connected() -> Any:
    """Return a new connection to the store of the launcher or of rank 0."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=_CONNECT), wait_for_workers=False)


def _key(name: str) -> str:
    """Return the name of a number in the store. A launcher that starts the ranks again keeps its store."""
    return f"vineppo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
