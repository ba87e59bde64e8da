"""Write files and directories atomically, compute checksums of files, and prepare values for JSON.

A file is written atomically in three steps: a temporary file is written, forced to disk, and renamed. After a crash,
either the old file or the complete new file exists.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vineppo.types import UserError

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO})
"""Errors of a disk that is full, read-only or defective."""


def disk_error(error: BaseException) -> str | None:
    """Return the reason, such as `No space left on device`, if `error` comes from a disk that cannot be written.

    PyTorch raises a RuntimeError while it handles the OSError. safetensors writes the number of the error into its
    message.
    """
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if match := re.search(r"\(os error (\d+)\)", str(cause)):
            number = int(match[1])
        if number in _DISK_ERRORS:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    return None


@contextmanager
def disk_errors_in_one_line(run_dir: Path) -> Iterator[None]:
    """Convert an error of the disk, raised inside the block, to a message of one line.

    Raises:
        UserError: if the disk is full, read-only or defective.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (reason := disk_error(error)):
            raise
        raise UserError(
            f"{run_dir} cannot be written: {reason}; the run stopped and its checkpoints are intact; free some space, "
            f"then continue with --resume {run_dir}"
        ) from error


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


@contextmanager
def directory_written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a directory. When the block ends, the temporary directory replaces `path`.

    If the process is killed, there is either a complete directory `path` or none. If the block raises, the temporary
    directory is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    remove_tree(temporary)
    try:
        yield temporary
        fsync_tree(temporary)
        remove_tree(path)
        os.rename(temporary, path)
    except BaseException:
        remove_tree(temporary)
        raise
    fsync_directory(path.parent)


def fsync_tree(directory: Path) -> None:
    """Force all files and directories below a directory to disk, and the directory itself."""
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            fsync_directory(path)
        else:
            fsync_file(path)
    fsync_directory(directory)


def remove_tree(path: Path) -> None:
    """Remove a directory, a file or nothing. Of a symbolic link only the link is removed, not its target."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


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


def check_writable(directory: Path) -> None:
    """Check that files can be written to a directory, which need not exist yet. Nothing is left behind.

    Raises:
        OSError: if the directory or, if it does not exist, the nearest existing one above it cannot be written.
    """
    existing = next(folder for folder in (directory, *directory.absolute().parents) if os.path.lexists(folder))
    tempfile.TemporaryFile(dir=existing).close()


def json_ready(value: Any) -> Any:
    """Convert a value to types that JSON can represent.

    NaN and infinity become None. NumPy and PyTorch numbers become Python numbers.
    """
    if isinstance(value, Mapping):
        return {str(key): json_ready(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
