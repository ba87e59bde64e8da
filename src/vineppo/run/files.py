"""Files that are whole or absent: written aside, forced to disk, renamed into place. Imports nothing of ours."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_file(path: Path) -> None:
    """Force a file's content to disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Force a directory's entries to disk; without it a rename may not survive a power cut."""
    if os.name == "nt":  # Windows cannot open directories, and has no need to
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what was written there takes its place when the block ends well.

    A reader sees the old file or the new one, never a part. An exception leaves the old file as it was.

    Raises:
        OSError: where the directory cannot be written.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        yield aside
        fsync_file(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by `text` (UTF-8), atomically."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
