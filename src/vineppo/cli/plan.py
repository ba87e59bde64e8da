"""The command `vineppo plan`, which predicts the tokens, time and memory of a training run."""

from __future__ import annotations

import argparse

from vineppo.cli.common import DEFAULT_RECIPE, add_recipe_note, json_target, training_config, write_json
from vineppo.cli.options import Command, Request, add_settings, int_option
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo plan` to its parser."""
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan for another accelerator, from its data sheet; for example h100 or 8xh100"
    )
    parser.add_argument("--response_tokens", metavar="N", help="mean response length in tokens; needs --gpu")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, config_class_with_all_sections())


def _run(request: Request) -> int:
    """Print the prediction, and write it to the file given with `--json`. Return the exit code 0."""
    from vineppo.model.location import resolve_model_path
    from vineppo.training.preflight import check_model_and_task, needed_splits

    config, target = training_config(request.positional or DEFAULT_RECIPE, request.overrides), json_target(request)
    gpu, response_tokens = request.options["gpu"], None
    if request.options["response_tokens"] is not None:
        response_tokens = int_option(request, "response_tokens", 0)
        if response_tokens < 1 or not gpu:
            raise UserError(f"--response_tokens is {response_tokens}; it must be above 0 and needs --gpu")
    if gpu:  # A prediction for another machine needs neither the weights nor the data.
        resolve_model_path(config.model.path)
    else:
        check_model_and_task(config.model, config.task, needed_splits(config.eval))
    from vineppo.plan.predict import plan
    from vineppo.plan.report import report

    prediction = plan(config, gpu=gpu, response_tokens=response_tokens)
    print("\n".join(report(prediction, config)))
    write_json(target, prediction.as_dict())
    return 0


COMMAND = Command(
    purpose="Predict the tokens, time and memory of a training run from a short calibration on this machine.",
    takes="RECIPE",
    usage="[RECIPE] [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=config_class_with_all_sections,
    examples=(
        ("plan the default recipe on this machine", "vineppo plan"),
        ("plan a recipe of the VinePPO paper on one H100", "vineppo plan paper/rho1b-math-vineppo --gpu h100"),
    ),
)
