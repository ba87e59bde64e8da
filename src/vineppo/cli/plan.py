"""The command `vineppo plan`: predict tokens, time and memory of a run."""

from __future__ import annotations

import argparse

from vineppo.cli.common import DEFAULT_RECIPE, add_recipe_note, json_target, training_config, write_json
from vineppo.cli.options import Command, Request, add_settings, int_option
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan from the data sheet of an accelerator, for example h100 or 8xh100"
    )
    parser.add_argument("--response_tokens", metavar="N", help="mean response length, only with --gpu")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, config_class_with_all_sections())


def _run(request: Request) -> int:
    config, target = training_config(request.positional or DEFAULT_RECIPE, request.overrides), json_target(request)
    from vineppo.plan.predict import plan
    from vineppo.plan.report import report

    length = int_option(request, "response_tokens", 0)
    if length < 0 or (length and not request.options["gpu"]):
        raise UserError(f"--response_tokens is {length}; it must be above 0 and needs --gpu")
    prediction = plan(config, gpu=request.options["gpu"], response_tokens=length or None)
    print("\n".join(report(prediction, config)))
    write_json(target, prediction.as_dict())
    return 0


COMMAND = Command(
    purpose="Predict tokens, time and memory of a training run before it starts, from a short calibration.",
    takes="RECIPE",
    usage="[RECIPE] [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=config_class_with_all_sections,
    examples=(
        ("the default recipe on this machine", "vineppo plan"),
        ("a recipe of the paper on one H100", "vineppo plan paper/rho1b-math-vineppo --gpu h100"),
    ),
)
