"""The command `vineppo eval`, which measures the accuracy of a model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from vineppo.cli.common import json_target, training_config, write_json
from vineppo.cli.console import duration, interval_text
from vineppo.cli.options import Command, Request, add_note, add_settings
from vineppo.config.load import COMMAND_LINE, Layer, config_to_dict, settings_from_layers
from vineppo.config.recipes import recipe_names
from vineppo.config.schema import Config, EvalSpec, ModelConfig, RolloutConfig, TaskConfig
from vineppo.config.settings import Settings
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo eval` to its parser."""
    add_note(
        parser,
        "MODEL",
        "A model directory, a model id on the Hugging Face Hub, or one of the models included in the package: "
        "embedded:judgement, embedded:wording or embedded:habit. MODEL can also be the directory of a run, to measure "
        "its final model (or the model in its newest checkpoint, if the run did not finish), the directory of one of "
        "its checkpoints, or a recipe (the path of a YAML file, or a name such as judgement), to measure its starting "
        "model. Task, response budget and stop strings are then those of the run or recipe. Accuracy with greedy "
        "decoding is always measured.",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    add_settings(parser, EvalSpec, hidden=("model.path",))


def _run(request: Request) -> int:
    """Measure the accuracy, print it, and write it to the file given with `--json`. Return the exit code 0."""
    if request.positional is None:
        raise UserError(
            "no MODEL is given; give a model directory, a hub id, embedded:judgement, a run directory or a recipe file"
        )
    target = json_target(request)
    if "model.path" in request.overrides:
        raise UserError("--model.path is not an option of `vineppo eval`; give the model as the argument MODEL")
    layers = [settings_of_model(request.positional), (request.overrides, COMMAND_LINE)]
    spec = settings_from_layers(EvalSpec, layers)
    from vineppo.training.preflight import check_model_and_task

    check_model_and_task(spec.model, spec.task, {"split": spec.split})
    from vineppo.training.evaluate import evaluate_model

    result = evaluate_model(spec)
    _print_evaluation(request.positional, result)
    write_json(target, {"model": request.positional, **result})
    return 0


def run_of(path: Path) -> Path | None:
    """Return the run directory that `path` refers to, or None.

    `path` refers to a run directory if it is the directory itself, or the folder `final` or a checkpoint in it. A
    directory is a run directory if it contains config.yaml.
    """
    run_dir = path.parent if path.name == "final" else path
    run_dir = path.parents[1] if path.parent.name == "checkpoints" else run_dir
    return run_dir if os.path.isfile(run_dir / "config.yaml") else None


def settings_of_model(model: str, sampling: bool = False) -> Layer:
    """Return the settings that the argument MODEL determines.

    They always include the path of the model. If MODEL is a run directory or a recipe, they also include the other
    settings of the model, the task, the maximum length of a response and the stop strings.

    Args:
        model: the argument MODEL.
        sampling: include the sampling temperature of the rollouts.
    Returns:
        A pair (keys of EvalSpec -> values, source of the settings in error messages).
    """
    run_dir = run_of(Path(model))
    if run_dir:
        path = _path_of_model(Path(model), run_dir)
        recorded = _settings_of_run(run_dir)
        settings = _evaluation_of(recorded, path) | _temperature(recorded, sampling)
        has_adapters = recorded.model.lora.r and Path(path).parent.name == "checkpoints"
        if has_adapters or (Path(path) / "adapter").is_dir():
            # Adapters are merged in float32; 16 bits would lose small adapters.
            settings["model"] = settings["model"] | {"dtype": "float32", "lora": {}}
        return settings, f"in {run_dir}/config.yaml"
    if Path(model).suffix in (".yaml", ".yml") or (model in recipe_names() and not os.path.isdir(model)):
        recipe = training_config(model, {})
        return _evaluation_of(recipe, recipe.model.path) | _temperature(recipe, sampling), f"in recipe {model}"
    return {"model.path": model}, COMMAND_LINE


def _temperature(config: Config | _EvaluationSettings, sampling: bool) -> dict[str, float]:
    """Return the sampling temperature of the rollouts as a setting, or nothing if `sampling` is false."""
    return {"temperature": config.rollouts.temperature} if sampling else {}


class _EvaluationSettings(Settings):
    """The sections of a run's config.yaml that an evaluation needs.

    The section of the algorithm is left out, so that a run with a user-defined algorithm can be evaluated without the
    code of the algorithm.
    """

    model: ModelConfig = Field(default_factory=ModelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    rollouts: RolloutConfig = Field(default_factory=RolloutConfig)


def _path_of_model(path: Path, run_dir: Path) -> str:
    """Return the model directory or checkpoint of a run. Say which one it is, unless the run is finished."""
    from vineppo.model.of_run import model_of_run

    found = model_of_run(run_dir) if path == run_dir else path
    if path == run_dir and found.name != "final":
        print(f"{run_dir} has not finished; this is the model after iteration {int(found.name.partition('.')[0])}")
    return str(found)


def _settings_of_run(run_dir: Path) -> _EvaluationSettings:
    from vineppo.run.directory import RunDirectory

    run = RunDirectory.open(run_dir, writable=False)
    sections = {name: run.config[name] for name in _EvaluationSettings.model_fields if name in run.config}
    return settings_from_layers(_EvaluationSettings, [(sections, run.source)])


def _evaluation_of(config: Config | _EvaluationSettings, model: str) -> dict[str, Any]:
    """Return the settings of an evaluation that follow from the settings of a training run.

    Args:
        config: settings of the training run.
        model: path of the model to evaluate. It replaces the path of the starting model in `config`.
    Returns:
        Keys of EvalSpec -> values.
    """
    settings = config_to_dict(config)
    return {
        "model": settings["model"] | {"path": model},
        "task": settings["task"],
        "max_new_tokens": config.rollouts.max_new_tokens,
        "stop": config.rollouts.stop,
    }


def _print_evaluation(model: str, result: Mapping[str, Any]) -> None:
    """Print a table of accuracies and the cost of the evaluation.

    Args:
        model: the argument MODEL.
        result: the dictionary that `evaluate_model` returned.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['num_problems']} {result.get('split', '')} problems")
    table.add_column("measure")
    table.add_column("accuracy [95%]", justify="right")
    for name, value in result.items():
        if isinstance(value, Mapping):
            table.add_row(name, interval_text(value).replace("[", r"\["))
    print(f"{model}")
    Console().print(table)
    cost = f"{result['tokens']:,} tokens in {duration(result['seconds'])}"
    cut = f"{100 * result['truncated_share']:.1f}% of responses were cut off at the token budget"
    print(f"{result['num_samples']} samples per problem; {cut}; {cost}")
    if result.get("grader/error_share"):
        errors, timeouts = (f"{100 * result[f'grader/{kind}_share']:.1f}%" for kind in ("error", "timeout"))
        print(f"{errors} of responses could not be graded ({timeouts} timed out) and count as wrong")
    if share := result.get("grader/not_applicable_share"):
        print(f"{100 * share:.1f}% of responses have no reward, because no reward function applies; they are left out")


COMMAND = Command(
    purpose="Measure the accuracy of a model (greedy, mean pass@1 and pass@k) with 95% bootstrap intervals.",
    takes="MODEL",
    usage="MODEL [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: EvalSpec,
    examples=(
        ("measure the small model included in the package on its task", "vineppo eval embedded:judgement"),
        ("measure the model of a run on 512 test problems", "vineppo eval runs/demo --num_problems 512"),
        ("measure the starting model of a recipe on validation problems", "vineppo eval my.yaml --split validation"),
        (
            "measure pass@1 and pass@4, and also write them as JSON",
            "vineppo eval runs/demo --num_samples 8 --k 1,4 --json figures.json",
        ),
    ),
)
