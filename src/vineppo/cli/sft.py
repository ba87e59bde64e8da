"""The command `vineppo sft`, which trains a model by supervised fine-tuning."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from typing import Any

from vineppo.cli.common import add_recipe_note, check_kind
from vineppo.cli.console import duration, interval_text
from vineppo.cli.options import Command, Request, add_settings
from vineppo.config.load import COMMAND_LINE, Layer, settings_from_layers
from vineppo.config.recipes import load_recipe
from vineppo.config.schema import SFTConfig


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo sft` to its parser."""
    add_recipe_note(parser, "RECIPE (optional)", sft=True)
    add_settings(parser, SFTConfig)


def _run(request: Request) -> int:
    """Train the model and print the results. Return the exit code 0."""
    layers: list[Layer] = [(request.overrides, COMMAND_LINE)]
    if request.positional is not None:
        check_kind(request.positional, "sft")
        recipe = {key: value for key, value in load_recipe(request.positional).items() if key != "description"}
        # Later layers override earlier layers, so the recipe comes before the options of the command line.
        layers.insert(0, (recipe, f"in recipe {request.positional}"))
    config = settings_from_layers(SFTConfig, layers)
    from vineppo.training.preflight import check_sft

    check_sft(config)
    from vineppo.training.sft import run_sft
    from vineppo.training.stopping import hangup_ignored, without_console

    # Like `vineppo train`, the training goes on if the terminal is closed.
    with hangup_ignored():
        for name, value in run_sft(config, lambda line: without_console(lambda: print(line, flush=True))).items():
            text = f"{name:<10} {_format_value(name, value)}"
            without_console(functools.partial(print, text, flush=True))
    return 0


def _format_value(name: str, value: Any) -> str:
    """Format one result of `run_sft` as text.

    Args:
        name: name of the result; `seconds` is formatted as a duration.
        value: the result; a mapping is a mean with its interval.
    """
    if isinstance(value, Mapping):
        return interval_text(value)
    if name == "seconds":
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


COMMAND = Command(
    purpose="Fine-tune a model on a task's demonstrations, or on prompts and answers from a JSON Lines file.",
    takes="RECIPE",
    usage="[RECIPE] [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: SFTConfig,
    examples=(
        ("train the included model `habit` again, from new weights", "vineppo sft sft-habit --out models/habit"),
        (
            "train on the prompts and answers in a file",
            "vineppo sft --model.path org/name --task.name dataset --task.train_path demos.jsonl --out models/mine",
        ),
    ),
)
