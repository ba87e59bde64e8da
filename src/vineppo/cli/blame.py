"""The command `vineppo blame`, which resamples blamed steps and compares the change of success with a control."""

from __future__ import annotations

import argparse

from vineppo.cli.measuring import add_model_options, finish, say, spec_of
from vineppo.cli.options import Command, Request
from vineppo.config.measure import BlameSpec


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo blame` to its parser."""
    add_model_options(parser, BlameSpec)


def _run(request: Request) -> int:
    """Measure, print the report and write the files. Return the exit code 0."""
    spec = spec_of(request, BlameSpec, "blame")
    from vineppo.measure.blame import measure_blame
    from vineppo.measure.blame_report import markdown, plots
    from vineppo.measure.output import folder_of

    folder = folder_of(spec.out, "blame")
    return finish(folder, "blame", measure_blame(spec, say), markdown, plots)


COMMAND = Command(
    purpose="Resample the blamed step of failed responses, and compare the change of success with a random step's.",
    takes="MODEL",
    usage="MODEL [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: BlameSpec,
    examples=(
        ("the model included in the package, in about a minute", "vineppo blame wording"),
        ("the model of a run, with all responses instead of the failed ones", "vineppo blame runs/demo --which all"),
        (
            "a larger model with fewer continuations",
            "vineppo blame runs/smollm2 --task.name reasoning_gym:chain_sum --num_problems 12 --k 4 --score 16",
        ),
    ),
)
