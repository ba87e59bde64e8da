"""Write and read the checkpoints of a run.

A checkpoint is a directory. It is written under a temporary name, forced to disk and then renamed, so that a crash
cannot leave an incomplete checkpoint behind under the final name. It is verified before it is loaded. It has these
files:

```
checkpoints/000020/state.pt       progress of the run (here after 20 iterations)
checkpoints/000020/learner.pt     weights and optimizer states, written by the learner
checkpoints/000020/learner/       the same, written by several processes, in place of learner.pt (see shards.py)
checkpoints/000020/manifest.json  format, version of the package, and size and SHA-256 of every other file
```

A checkpoint can be a symbolic link to a directory. When it is no longer needed, only the link is removed.

PyTorch is imported inside the functions, so that a command can look for checkpoints without importing PyTorch.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vineppo.run.environment import package_version
from vineppo.run.files import disk_error, fsync_directory, fsync_file, remove_tree, sha256
from vineppo.types import UserError

STATE_FILE = "state.pt"
"""Name of the file with the progress of the run."""
FORMAT = 1
"""Number of the format of a checkpoint. A change that earlier versions of the package cannot read increases it."""
_NAME = re.compile(r"(\d+)(\.old)?")
"""Names of checkpoints: the number of iterations, with the suffix `.old` while the checkpoint is being replaced."""
_SCALARS = (bool, int, float, str, bytes, type(None))
"""Types of the values in a state that are neither tensors nor containers."""


class OtherFormat(UserError):
    """A checkpoint was written by a version of the package that uses another format."""


def save_checkpoint(
    directory: str | Path,
    iteration: int,
    state: Mapping[str, Any],
    keep: int = 1,
    writers: Sequence[Callable[[Path], None]] = (),
    best: int | None = None,
) -> Path:
    """Write a checkpoint, and then remove older checkpoints.

    No checkpoint is removed before the new one is complete. Checkpoints of later iterations are removed too. They exist
    only if they were damaged and the run was therefore resumed from an earlier checkpoint.

    Args:
        directory: the directory that contains the checkpoints of the run.
        iteration: number of completed iterations. It is also the name of the checkpoint.
        state: the progress of the run, as nested dicts, lists and tuples of tensors and of values of type bool, int,
            float, str, bytes or None.
        keep: number of checkpoints to keep, including the new one; at least 1.
        writers: functions that write more files of the checkpoint, such as `Learner.save`. Each function is called with
            the path of the directory into which it writes.
        best: an earlier iteration whose checkpoint is kept too, if there is one.
    Returns:
        The path of the new checkpoint.
    Raises:
        TypeError: if the state contains a value that cannot be loaded again.
        UserError: if the disk is full or cannot be written. The earlier checkpoints are kept, and no temporary
            directory is left.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob(".*.tmp"):  # from a run that was killed while writing
        remove_tree(leftover)
    temporary = directory / f".{iteration:06d}.tmp"
    try:
        temporary.mkdir()
        write_state(temporary / STATE_FILE, state)
        for write in writers:
            write(temporary)
        _write_manifest(temporary, iteration)
    except BaseException as error:
        remove_tree(temporary)
        if isinstance(error, Exception) and (reason := disk_error(error)):
            raise UserError(
                f"the checkpoint of iteration {iteration} cannot be written to {directory}: {reason}; the earlier "
                f"checkpoints are intact; free some space, then continue with --resume {directory.parent}"
            ) from error
        raise

    path = _put_in_place(temporary, directory / f"{iteration:06d}")
    earlier = [other for number, other in _newest_first(directory) if number < iteration]
    kept = {path, *earlier[: keep - 1], *(directory / f"{number:06d}" for number in (best,) if number is not None)}
    for _, other in _newest_first(directory):
        if other not in kept:
            remove_tree(other)
    return path


def _put_in_place(temporary: Path, path: Path) -> Path:
    """Rename a complete checkpoint to its final path, where an earlier one of the same iteration may be."""
    old = path.with_name(f"{path.name}.old")
    # os.rename cannot replace a directory. If the process is killed here, latest_checkpoint finds `.old`.
    if path.exists() or path.is_symlink():
        remove_tree(old)
        os.rename(path, old)
    os.rename(temporary, path)
    fsync_directory(path.parent)
    return path


def remove_later_checkpoints(directory: Path, iteration: int) -> None:
    """Remove the checkpoints of all iterations after `iteration`."""
    for number, path in _newest_first(directory):
        if number > iteration:
            remove_tree(path)


def verify_checkpoint(path: str | Path) -> None:
    """Check that every file of a checkpoint has the size and the checksum that manifest.json records.

    Raises:
        OtherFormat: if another version of the package wrote the checkpoint, in another format.
        UserError: if a file is missing or damaged. The message names the first such file.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = dict(manifest["files"])
        expected = {name: (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
    except OSError:
        raise UserError(f"checkpoint {path} is damaged: manifest.json is missing or unreadable") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {path} is damaged: manifest.json is not a valid manifest") from None
    if manifest.get("format", FORMAT) != FORMAT:
        writer = f"vineppo {manifest.get('vineppo', '(unknown version)')}"
        raise OtherFormat(
            f"checkpoint {path} has format {manifest['format']} of {writer}; this is vineppo {package_version()}, "
            f"which reads format {FORMAT}; continue with {writer}, or start a new run"
        )
    if STATE_FILE not in expected:
        raise UserError(f"checkpoint {path} is damaged: manifest.json does not list {STATE_FILE}")
    for name, (size, digest) in expected.items():
        try:
            real_size = (path / name).stat().st_size
            is_same = real_size == size and sha256(path / name) == digest
        except OSError:
            raise UserError(f"checkpoint {path} is damaged: {name} is missing or unreadable") from None
        if not is_same:
            what = "content differs from its checksum" if real_size == size else f"{real_size} of {size} bytes"
            raise UserError(f"checkpoint {path} is damaged: {name} ({what})")


def has_checkpoint(directory: str | Path) -> bool:
    """Return whether a directory contains a checkpoint that was written completely. It may have been damaged later."""
    return bool(_newest_first(Path(directory)))


def latest_checkpoint(directory: str | Path, warn: Callable[[str], None] | None = None) -> Path:
    """Return the path of the newest undamaged checkpoint.

    Args:
        directory: the directory that contains the checkpoints of the run.
        warn: function that is called with a message for each damaged checkpoint. By default, the message is printed to
            standard error.
    Raises:
        UserError: if there is no undamaged checkpoint, or another version of the package wrote the newest one.
    """
    directory = Path(directory)
    candidates = _newest_first(directory)
    for _, path in candidates:
        try:
            verify_checkpoint(path)
        except OtherFormat:
            raise
        except UserError as error:
            (warn or _warn)(f"{error}; this checkpoint is skipped")
        else:
            return path
    what = f"all checkpoints in {directory} are damaged ({len(candidates)})" if candidates else None
    raise UserError(f"{what or f'no checkpoint in {directory}'}; start a new run with another run.dir")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Verify a checkpoint and load the state that `save_checkpoint` was given. All tensors are on the CPU.

    Raises:
        UserError: if a file is missing or damaged, or if PyTorch cannot read the state.
    """
    verify_checkpoint(path)
    return read_state(Path(path) / STATE_FILE)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state to a file with `torch.save`. `save_checkpoint` lists the types that a state may contain.

    Raises:
        TypeError: if the state contains a value that cannot be loaded again.
    """
    import torch

    with open(path, "wb") as file:  # for a file object, the error of a full disk keeps its number
        torch.save(_plain(state, path.stem), file)


def read_state(path: Path) -> dict[str, Any]:
    """Load a state from a file that `write_state` wrote. All tensors are on the CPU.

    Raises:
        UserError: if the file is missing or cannot be read.
    """
    import torch

    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(
            f"checkpoint {path.parent} has no {path.name}: another version of vineppo ({_writer(path.parent)}) wrote "
            "it; resume with that version, or start a new run"
        ) from None
    except (RuntimeError, pickle.UnpicklingError, EOFError):
        raise UserError(
            f"checkpoint {path.parent}: {path.name} cannot be read by PyTorch {torch.__version__}"
        ) from None
    return state


def _write_manifest(directory: Path, iteration: int) -> None:
    """Force all files of a checkpoint to disk, and write their sizes and checksums to manifest.json."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        fsync_file(path)
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {"format": FORMAT, "vineppo": package_version(), "iteration": iteration, "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    fsync_file(directory / "manifest.json")
    for folder in [*(path for path in directory.rglob("*") if path.is_dir()), directory]:
        fsync_directory(folder)


def _writer(checkpoint: Path) -> str:
    """Return the version of the package that wrote a checkpoint, or a description if it is not recorded."""
    try:
        return str(json.loads((checkpoint / "manifest.json").read_bytes())["vineppo"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a version that did not record its number"


def _plain(value: Any, where: str) -> Any:
    """Convert a state to types that `torch.load(weights_only=True)` accepts. Tensors are detached and moved to the CPU.

    Other types are rejected here, before they are saved. Without this check, a NumPy scalar, for example, could be
    saved, and the error would come only when it is loaded.

    Args:
        value: the state, or a value in it.
        where: name of the value in error messages, such as `state['progress']`.
    Raises:
        TypeError: if a value has another type.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(inner, f"{where}[{key!r}]") for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if type(value) not in _SCALARS:
        raise TypeError(
            f"{where} is a {type(value).__name__}; allowed: tensors, dict, list, tuple, bool, int, float, str, bytes "
            "and None"
        )
    return value


def _newest_first(directory: Path) -> list[tuple[int, Path]]:
    """Return (iteration, path) of all checkpoints, newest first.

    For the same iteration, a checkpoint with the suffix `.old` comes after the checkpoint that replaces it.
    """
    paths = directory.iterdir() if directory.is_dir() else ()
    matches = [(match, path) for path in paths if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    matches.sort(key=lambda pair: (int(pair[0][1]), pair[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in matches]


def _warn(message: str) -> None:
    """Print a warning to standard error."""
    print(f"warning: {message}", file=sys.stderr, flush=True)
