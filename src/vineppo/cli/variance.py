"""The command `vineppo variance`, which measures the noise of Monte-Carlo advantages and the best K."""

from __future__ import annotations

import argparse

from vineppo.cli.measuring import add_model_options, finish, say, spec_of
from vineppo.cli.options import Command, Request
from vineppo.config.measure import VarianceSpec


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo variance` to its parser."""
    add_model_options(parser, VarianceSpec)


def _run(request: Request) -> int:
    """Measure, print the report and write the files. Return the exit code 0."""
    spec = spec_of(request, VarianceSpec, "variance")
    from vineppo.measure.output import folder_of
    from vineppo.measure.variance import measure_variance
    from vineppo.measure.variance_report import markdown, plots

    folder = folder_of(spec.out, "variance")
    return finish(folder, "variance", measure_variance(spec, say), markdown, plots)


COMMAND = Command(
    purpose="Measure the variance of advantages over K, and recommend the K with the smallest error at a token budget.",
    takes="MODEL",
    usage="MODEL [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: VarianceSpec,
    examples=(
        ("the model included in the package, in about two minutes", "vineppo variance wording"),
        ("the model of a run, with larger K", "vineppo variance runs/demo --k 1,4,16 --max_tokens 5000000"),
        (
            "a larger model with few repeats",
            "vineppo variance runs/smollm2 --task.name reasoning_gym:chain_sum --num_problems 4 --gold 16 --repeats 2",
        ),
    ),
)
