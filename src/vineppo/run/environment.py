"""Determine the versions of installed packages, and check and prepare the process of a run."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from vineppo.types import UserError


def package_version() -> str:
    """Return the version of vineppo, or 0.1.0 if it runs from a source tree without being installed."""
    return version_of("vineppo") or "0.1.0"


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def require_one_process() -> None:
    """Raise UserError if a launcher for distributed training, such as torchrun, started this process with others.

    Without this check, every process would do the whole work and write the same files.
    """
    world_size = os.environ.get("WORLD_SIZE", "1").strip()
    if world_size.isdecimal() and int(world_size) > 1:
        raise UserError(
            f"WORLD_SIZE is {world_size}: a launcher (torchrun, accelerate launch) started {world_size} processes, but "
            "only `vineppo train` and VinePPOTrainer work with several; start one process without a launcher, or unset "
            "WORLD_SIZE"
        )


@contextlib.contextmanager
def objects_before_excluded_from_collection() -> Iterator[None]:
    """Exclude the objects that exist now from the collections of Python's garbage collector within a `with` block.

    These are mostly the modules of the libraries, some hundred thousand objects that live as long as the process. Each
    full collection reads all of them, which takes a quarter of a second. Objects that are made in the block are
    collected as usual. Nothing is done if objects are excluded already: the program that calls the package decided it.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
