"""Write files atomically, and compute their checksums.

A file is written atomically in three steps: a temporary file is written, forced to disk, and renamed. After a crash,
either the old file or the complete new file exists.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_file(path: Path) -> None:
    """Force the content of a file to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """Force the list of files of a directory to disk. Otherwise a power failure can undo a rename in the directory."""
    if os.name == "nt":  # os.open cannot open directories on Windows.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path to which the `with` block writes a file. When the block ends, the file replaces `path`.

    Other processes see either the old file or the complete new file. If the block raises an exception, the temporary
    file is removed and the old file stays unchanged.

    Raises:
        OSError: if the directory of `path` is not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write `text` to a file in UTF-8, atomically."""
    with written_aside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of the content of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
