"""Lock a run directory, so that only one process trains in it."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vineppo.types import UserError

LOCK_FILE = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LOCKED_BYTE = 1 << 30
"""Position of the byte that is locked on Windows. It is behind the content, so that other processes can read that."""
_held: set[IO[bytes]] = set()
"""The open lock files of this process."""


def _close_in_child() -> None:
    """Close the lock files that a forked process inherited, which would keep the locks after the end of its parent."""
    for file in _held:
        with contextlib.suppress(OSError):
            file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a run directory inside the block.

    It is a lock of the operating system on the file `.lock`. It ends with the process that holds it, even if that
    process is killed, so the file that stays behind locks nothing. Processes that it forks do not hold the lock.

    Raises:
        UserError: if another process, or another run in this process, holds the lock.
    """
    try:
        # Without a buffer, a forked process has nothing to write when it closes the file.
        file = open(directory / LOCK_FILE, "ab+", buffering=0)  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"run directory {directory} cannot be written ({error.strerror})") from error
    with file:
        try:
            _lock(file)
        except OSError as error:
            if error.errno in _TAKEN:
                file.seek(0)
                holder = file.readline().decode(errors="replace").strip() or "another process"
                raise UserError(
                    f"run directory {directory} is in use by {holder}; wait until that run ends, or stop it"
                ) from None
            warnings.warn(
                f"{directory} cannot be locked ({error.strerror}); do not start a second process in it", stacklevel=3
            )
        with contextlib.suppress(OSError):  # the content is only information, and the disk may be full
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def _lock(file: IO[bytes]) -> None:
    """Lock a file without waiting. Raises OSError if it is locked already."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(_LOCKED_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
