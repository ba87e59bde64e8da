"""The command `vineppo scaling`, which measures the cost of credit over the length of a chain."""

from __future__ import annotations

import argparse

from vineppo.cli.measuring import finish, say
from vineppo.cli.options import Command, Request, add_settings
from vineppo.config.load import COMMAND_LINE, settings_from_layers
from vineppo.config.measure import ScalingSpec


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo scaling` to its parser."""
    add_settings(parser, ScalingSpec)


def _run(request: Request) -> int:
    """Measure, print the report and write the files. Return the exit code 0."""
    spec = settings_from_layers(ScalingSpec, [(request.overrides, COMMAND_LINE)])
    from vineppo.measure.output import folder_of
    from vineppo.measure.scaling import measure_scaling
    from vineppo.measure.scaling_report import markdown, plots

    folder = folder_of(spec.out, "scaling")
    return finish(folder, "scaling", measure_scaling(spec, say), markdown, plots)


COMMAND = Command(
    purpose="Measure what credit costs over the length of a chain, by continuations and by a value network.",
    takes="",
    usage="[--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: ScalingSpec,
    examples=(
        ("chains of 10 to 500 steps on this machine, in some minutes", "vineppo scaling"),
        ("short chains with K = 3, in a minute", "vineppo scaling --steps 10,20,40,80 --held_out 40 --k 3"),
    ),
)
