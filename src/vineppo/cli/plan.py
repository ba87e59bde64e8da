"""`vineppo plan`"""

from __future__ import annotations

import argparse

from vineppo.cli.common import DEFAULT_RECIPE, add_recipe_note, json_target, training_config, write_json
from vineppo.cli.options import Command, Request, add_settings, count
from vineppo.training.configure import every_section
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan for accelerators such as h100 or 8xh100, from their data sheet"
    )
    parser.add_argument("--response_tokens", metavar="N", help="with --gpu: mean response length")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file as well")
    add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, every_section())


def _run(request: Request) -> int:
    config, target = training_config(request.positional or DEFAULT_RECIPE, request.overrides), json_target(request)
    from vineppo.plan.predict import plan
    from vineppo.plan.report import report

    length = count(request, "response_tokens", 0)
    if length < 0 or (length and not request.options["gpu"]):
        raise UserError(f"--response_tokens {length} is refused; it is a number above 0, and goes with --gpu")
    made = plan(config, gpu=request.options["gpu"], response_tokens=length or None)
    print("\n".join(report(made, config)))
    write_json(target, made.as_dict())
    return 0


COMMAND = Command(
    purpose="Predict tokens, time and memory of a training run before it starts, by a short calibration.",
    takes="RECIPE",
    usage="[RECIPE] [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=every_section,
    examples=(
        ("the embedded default on this machine", "vineppo plan"),
        ("a recipe of the paper on one H100", "vineppo plan paper/rho1b-math-vineppo --gpu h100"),
    ),
)
