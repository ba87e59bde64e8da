"""Lock the directory of a comparison or a tuning."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vineppo.types import UserError


@contextlib.contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """Lock the directory of a comparison or a tuning within the context, so that a second process cannot use it.

    The training processes inherit the lock. If the process that started them is killed, the directory stays locked
    until they end.

    Raises:
        UserError: if the directory is already locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no fcntl, so the directory is not locked
        yield
        return
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"--out {out} is in use by another process or by one of its runs; wait until it ends, or stop it"
            ) from None
        os.set_inheritable(lock.fileno(), True)
        yield
