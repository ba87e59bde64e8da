"""The command `vineppo plan`, which predicts the tokens, time and memory of a training run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.common import DEFAULT_RECIPE, add_recipe_note, json_target, training_config, write_json
from vineppo.cli.options import Command, Request, add_settings, int_option
from vineppo.config.schema import Config
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo plan` to its parser."""
    parser.add_argument(
        "--gpu", metavar="NAME", help="plan for another accelerator, from its data sheet; for example h100 or 8xh100"
    )
    parser.add_argument(
        "--cluster",
        metavar="NODESxGPUSxKIND",
        help="plan for several GPUs that share the training: memory of a GPU, seconds of every part, and the "
        "assumptions; for example 1x8xh100-80gb or 8x8xh100-80gb",
    )
    parser.add_argument(
        "--links",
        metavar="LINK=SPEED,...",
        help="speeds of the links of the cluster: nvlink in GB/s of a GPU (both directions together), network in "
        "Gbit/s of a node; for example nvlink=900,network=3200gbit (default: those of NVIDIA's DGX, or PCIe and "
        "25 Gbit/s)",
    )
    parser.add_argument(
        "--tensor_parallel",
        metavar="N",
        help="number of GPUs of the cluster over which a sampler splits its weights, which training cannot do yet "
        "(default: 1, whole weights)",
    )
    parser.add_argument(
        "--response_tokens", metavar="N", help="mean response length in tokens; needs --gpu or --cluster"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, config_class_with_all_sections())


def _run(request: Request) -> int:
    """Print the prediction, and write it to the file given with `--json`. Return the exit code 0."""
    from vineppo.model.location import resolve_model_path
    from vineppo.training.preflight import check_model_and_task, needed_splits

    config, target = training_config(request.positional or DEFAULT_RECIPE, request.overrides), json_target(request)
    gpu, response_tokens = request.options["gpu"], _response_tokens(request)
    if request.options["cluster"]:
        resolve_model_path(config.model.path)
        return _run_cluster(request, config, response_tokens, target)
    for name in ("links", "tensor_parallel"):
        if request.options[name] is not None:
            raise UserError(f"--{name} is {request.options[name]}; it needs --cluster, for example 1x8xh100-80gb")
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


def _response_tokens(request: Request) -> int | None:
    """Return the value of the option `--response_tokens`, or None if it is not given.

    Raises:
        UserError: if it is below 1, or given without `--gpu` and `--cluster`, or if both of these are given.
    """
    if request.options["gpu"] and request.options["cluster"]:
        raise UserError("--gpu and --cluster are both given; give one of them (--cluster counts communication)")
    if request.options["response_tokens"] is None:
        return None
    tokens = int_option(request, "response_tokens", 0)
    if tokens < 1 or not (request.options["gpu"] or request.options["cluster"]):
        raise UserError(f"--response_tokens is {tokens}; it must be above 0 and needs --gpu or --cluster")
    return tokens


def _run_cluster(request: Request, config: Config, response_tokens: int | None, target: Path | None) -> int:
    """Print the prediction for a cluster, and write it to the file given with `--json`. Return the exit code 0."""
    from vineppo.plan.cluster import cluster_plan
    from vineppo.plan.machines import cluster_of
    from vineppo.plan.report import cluster_report

    tensor_parallel = int_option(request, "tensor_parallel", 1)
    if tensor_parallel < 1:
        raise UserError(f"--tensor_parallel is {tensor_parallel}; it must be at least 1")
    prediction = cluster_plan(
        config,
        cluster_of(request.options["cluster"], request.options["links"]),
        tensor_parallel=tensor_parallel,
        response_tokens=response_tokens,
    )
    print("\n".join(cluster_report(prediction, config)))
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
        ("plan a 7B model on eight H100", "vineppo plan gpu/qwen7b-gsm8k --cluster 1x8xh100-80gb"),
    ),
)
