"""The command `vineppo values`, which compares estimates of the values of states with gold values."""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.eval import run_of
from vineppo.cli.measuring import add_model_options, finish, say, spec_of
from vineppo.cli.options import Command, Request
from vineppo.config.measure import ValuesSpec
from vineppo.config.settings import replace


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo values` to its parser."""
    add_model_options(parser, ValuesSpec)


def _run(request: Request) -> int:
    """Measure, print the report and write the files. Return the exit code 0."""
    spec = spec_of(request, ValuesSpec, "values")
    from vineppo.measure.critics import has_critic, lost_critic
    from vineppo.measure.output import folder_of
    from vineppo.measure.values import measure_values
    from vineppo.measure.values_report import markdown, plots

    folder, run = folder_of(spec.out, "values"), run_of(Path(str(request.positional)))
    if not spec.critic and run and has_critic(run):
        spec = replace(spec, critic=str(run))
    elif not spec.critic and run and lost_critic(run):
        say(
            f"the value network of {run} is not measured, because the run has no checkpoint (`vineppo compare` removes "
            "those of finished runs unless run.keep_checkpoints is set)"
        )
    return finish(folder, "values", measure_values(spec, say), markdown, plots)


COMMAND = Command(
    purpose="Measure whether the values are right: Monte Carlo, critic, TEMPO and group mean against gold values.",
    takes="MODEL",
    usage="MODEL [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: ValuesSpec,
    examples=(
        ("the model included in the package, in about two minutes", "vineppo values wording"),
        ("the model and the critic of a PPO run", "vineppo values runs/judgement-ppo-seed0"),
        (
            "a larger model with few continuations",
            "vineppo values runs/smollm2 --task.name reasoning_gym:chain_sum --gold 32 --num_problems 8 --choices 4",
        ),
    ),
)
