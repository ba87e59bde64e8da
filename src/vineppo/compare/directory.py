"""Open and lock the directory of a comparison or a tuning."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vineppo.compare.runs import read_json
from vineppo.compare.spec import check_same
from vineppo.run.files import write_text
from vineppo.types import UserError


def open_directory(out: Path, record: str, identity: dict[str, Any], what: str) -> None:
    """Create the directory of a comparison or tuning, or check that an existing one belongs to the same.

    Args:
        out: the directory.
        record: name of the file in it for the settings that must stay the same when it is continued.
        identity: these settings.
        what: `comparison` or `tuning`, for the messages.
    Raises:
        UserError: if the directory cannot be written, contains other files, or contains another comparison or tuning.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a directory")
    try:
        if out.is_dir() and any(out.iterdir()) and not (out / record).exists():
            raise UserError(f"--out {out} is not empty and contains no {what}; choose a new directory")
        content = check_same(read_json(out / record), identity, out, what)
        for folder in (out / "runs", out / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(out / record, json.dumps(content, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose a writable directory") from None


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
