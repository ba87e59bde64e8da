"""Functions that several commands of the program `vineppo` use.

They build a configuration from a recipe (a YAML file with settings), and write results to a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vineppo.cli.options import Request, add_note
from vineppo.config.load import COMMAND_LINE
from vineppo.config.recipes import is_sft_recipe, load_recipe, recipe_names
from vineppo.config.schema import Config
from vineppo.training.configure import build_config
from vineppo.types import UserError

DEFAULT_RECIPE = "wording"
"""Name of the recipe that a command uses if the command line names no recipe."""


def add_recipe_note(parser: argparse.ArgumentParser, title: str, sft: bool) -> None:
    """Add a paragraph about the argument RECIPE to the help of a command.

    Args:
        parser: parser of the command.
        title: heading of the paragraph.
        sft: True lists the recipes of the package for `vineppo sft`; False lists those for `vineppo train`.
    """
    names = [name for name in recipe_names() if is_sft_recipe(name) is sft]
    add_note(
        parser,
        title,
        f"Path of a YAML file, or one of: {', '.join(names)}. The defaults below apply to settings that are given "
        "neither in the recipe nor on the command line. Write a list as a,b or [a, b].",
    )


def training_config(recipe: str, overrides: Mapping[str, str], algorithm: str | None = None) -> Config:
    """Build the configuration of a training run from a recipe and the command-line options.

    Args:
        recipe: name of a recipe of the package, or path of a YAML file.
        overrides: dotted key -> text, for the settings given on the command line. They override the recipe.
        algorithm: value of the setting `algorithm`. If it is None, `overrides` or the recipe determine the algorithm.
    Raises:
        UserError: if the recipe is for `vineppo sft` or cannot be loaded, or if a setting is not allowed.
    """
    check_kind(recipe, "train")
    return build_config(load_recipe(recipe), algorithm, overrides, name=recipe)


def check_arm(recipe: str, settings: Mapping[str, str], algorithm: str, name: str) -> Config:
    """Build the configuration of an arm without using it, to report wrong settings before the first run starts.

    Args:
        name: what the error message begins with, such as `arm grpo32`; empty for nothing.
    Raises:
        UserError: for the first setting that is not allowed, or if the model or the task cannot be used.
    """
    from vineppo.training.preflight import check_model_and_task, needed_splits

    try:
        config = training_config(recipe, settings, algorithm)
    except UserError as error:
        if not name:
            raise
        # Settings of an arm also come from --arm, --arms or --sweep, and are merged with those of the command line.
        raise UserError(f"{name}: {str(error).replace(f' {COMMAND_LINE}', '')}") from None
    check_model_and_task(config.model, config.task, needed_splits(config.eval))
    return config


def check_kind(recipe: str, command: str) -> None:
    """Check that a recipe of the package is meant for a command. Recipes outside the package are not checked.

    Args:
        recipe: name or path of the recipe.
        command: `train` or `sft`.
    Raises:
        UserError: if the recipe is meant for the other command.
    """
    names = recipe_names()
    required = "sft" if is_sft_recipe(recipe) else "train"
    if recipe in names and required != command:
        allowed = ", ".join(name for name in names if is_sft_recipe(name) is (command == "sft")) or "none"
        raise UserError(f"{recipe} is a recipe for `vineppo {required}`; recipes for `vineppo {command}`: {allowed}")


def json_target(request: Request) -> Path | None:
    """Return the path given with `--json`, or None if the option is not given.

    Commands call this function before their computation, so that a wrong path is reported at once.

    Raises:
        UserError: if the path is a directory, or is in a directory that does not exist.
    """
    target = request.options["json"] and Path(request.options["json"])
    if target and (os.path.isdir(target) or not os.path.isdir(target.absolute().parent)):
        raise UserError(f"--json {target} cannot be written; give a file in an existing directory")
    return target or None


def write_json(target: Path | None, figures: Mapping[str, Any]) -> None:
    """Write results to a JSON file, and print the path of the file.

    Args:
        target: path of the file; None writes nothing.
        figures: the results, with values that can be written as JSON.
    Raises:
        UserError: if the file cannot be written.
    """
    if target is None:
        return
    from vineppo.run.files import write_text

    try:
        write_text(target, json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {target} cannot be written ({error.strerror})") from None
    print(f"written to {target}")


def training_recipes() -> list[str]:
    """Return the names of the recipes for `vineppo train` that are included in the package."""
    return [name for name in recipe_names() if not is_sft_recipe(name)]
