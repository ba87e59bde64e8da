"""The program of the ranks that tests/training/test_ranks.py starts: one launch does many things one after another.

A process needs seconds to import PyTorch, so a launch for each thing would take most of the time of these tests. The
processes stay connected between the things, as they are in a script that connects them itself.

`torchrun ... ranks_program.py FOLDER THINGS`: THINGS is a list in JSON of the arguments of `Thing`. What rank R prints
during a thing is written to the file NAME-COUNT-R.txt in the folder.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.ranks import work
from matplotlib.figure import Figure

from tests.helpers import draw_nothing
from vineppo.cli.main import main
from vineppo.learning.sharding import joined


class Thing(NamedTuple):
    """Something that all ranks do."""

    name: str
    """Name in the names of files."""
    kind: str
    """`cases`: the updates of cases of benchmarks/ranks.py. `train`: `vineppo train`. `script`: a Python file."""
    arguments: Sequence[str]
    """Names of the cases; arguments of the command; path and arguments of the file."""


def do(thing: Thing, folder: Path, rank: int, count: int) -> None:
    """Do a thing as one of the ranks, and write what it prints."""
    path = folder / f"{thing.name}-{count}-{rank}.txt"
    with path.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if thing.kind == "cases":
            work(folder, list(thing.arguments))
        elif thing.kind == "train":
            code = main(["train", *thing.arguments])
            file.flush()
            assert code == 0, path.read_text()
        else:
            with patch.object(sys, "argv", list(thing.arguments)):
                runpy.run_path(thing.arguments[0], run_name="__main__")


def run(folder: Path, things: Sequence[Sequence[Any]]) -> None:
    """Do all things, as the ranks that a launcher started, or as one process."""
    with patch.object(Figure, "savefig", draw_nothing), joined("cpu") as ranks:
        for thing in things:
            do(Thing(*thing), folder, ranks.rank, ranks.count)


def printed(folder: Path, name: str, count: int) -> list[str]:
    """Return what each of the ranks printed during a thing."""
    return [(folder / f"{name}-{count}-{rank}.txt").read_text() for rank in range(count)]


if __name__ == "__main__":
    run(Path(sys.argv[1]), json.loads(sys.argv[2]))
