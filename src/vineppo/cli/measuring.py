"""What the commands that measure credit on a model share: their argument MODEL, their progress lines, their output."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vineppo.cli.eval import settings_of_model
from vineppo.cli.options import Request, add_note, add_settings
from vineppo.config.load import COMMAND_LINE, settings_from_layers
from vineppo.config.measure import MeasureSpec
from vineppo.run.files import json_ready
from vineppo.types import UserError

Spec = TypeVar("Spec", bound=MeasureSpec)


def add_model_options(parser: argparse.ArgumentParser, spec: type[MeasureSpec]) -> None:
    """Add the note about MODEL and the settings to the parser of a command."""
    add_note(
        parser,
        "MODEL",
        "A model directory, a hub id, a model of the package such as embedded:wording, the directory of a run or of "
        "one of its checkpoints, or a recipe. Task, temperature, response budget and stop strings are then those of "
        "the run or recipe, and the defaults below apply otherwise.",
    )
    add_settings(parser, spec, hidden=("model.path",))


def spec_of(request: Request, cls: type[Spec], command: str) -> Spec:
    """Build the settings from the argument MODEL and the options.

    Raises:
        UserError: if MODEL is missing, or a setting is not allowed.
    """
    if request.positional is None:
        raise UserError("no MODEL is given; give a model directory, a hub id, embedded:wording, a run or a recipe file")
    if "model.path" in request.overrides:
        raise UserError(f"--model.path is not an option of `vineppo {command}`; give the model as the argument MODEL")
    layers = [settings_of_model(request.positional, sampling=True), (request.overrides, COMMAND_LINE)]
    spec = settings_from_layers(cls, layers)
    from vineppo.training.preflight import check_model_and_task

    check_model_and_task(spec.model, spec.task, {"split": spec.split})
    return spec


def say(line: str) -> None:
    """Print a line of progress on standard error."""
    print(line, file=sys.stderr, flush=True)


def command_of(name: str) -> str:
    """Return the command line of this process, for the reports."""
    return " ".join(["vineppo", name, *map(shlex.quote, sys.argv[2:])])


def _platform() -> str:
    """Return the system, the number of threads and the version of PyTorch, for the reports."""
    import torch

    return f"{platform.platform()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def finish(
    folder: Path,
    name: str,
    result: Mapping[str, Any],
    markdown: Callable[[Mapping[str, Any]], str],
    plots: Callable[[Mapping[str, Any], Path], Sequence[Path]],
) -> int:
    """Write the results, draw the plots, print the report, and return the exit code 0."""
    from vineppo.measure.output import write_results

    complete = json_ready({"command": command_of(name), "platform": _platform(), **result})
    text = markdown(complete)
    files = [*write_results(folder, name, complete, text), *plots(complete, folder)]
    print(text)
    print("\n".join(map(str, files)))
    return 0
