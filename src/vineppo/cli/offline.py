"""The command `vineppo offline`, which trains a model with RestEM or DPO-positive."""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.common import DEFAULT_RECIPE, check_kind
from vineppo.cli.console import duration, interval_text
from vineppo.cli.options import Command, Request, add_note, add_settings
from vineppo.config.offline import OfflineConfig
from vineppo.config.recipes import is_sft_recipe, load_recipe, recipe_names, recipe_stem
from vineppo.training.configure_offline import build_offline_config, with_offline_dir


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo offline` to its parser."""
    names = [name for name in recipe_names() if not is_sft_recipe(name)]
    add_note(
        parser,
        f"RECIPE (default: {DEFAULT_RECIPE})",
        f"A recipe for `vineppo train`: the path of a YAML file, or one of: {', '.join(names)}. The model, the task, "
        "the evaluation (except eval.every), the temperature, the response budget and the stop strings are those of "
        "the recipe. The other settings are those under offline.METHOD in the recipe, or the defaults below. Write a "
        "list as a,b or [a, b].",
    )
    add_settings(parser, OfflineConfig)


def _run(request: Request) -> int:
    """Train the model and print the progress and the results. Return the exit code 0."""
    recipe = request.positional or DEFAULT_RECIPE
    check_kind(recipe, "train")
    config = build_offline_config(load_recipe(recipe), None, request.overrides, name=recipe)
    config = with_offline_dir(config, recipe_stem(recipe))
    from vineppo.training.preflight import check_offline

    check_offline(config)
    from vineppo.training.offline import run_offline
    from vineppo.training.stopping import hangup_ignored, without_console
    from vineppo.view.trained import report_finished

    def show(line: str) -> None:
        """Print a line; do nothing if the terminal is gone."""
        without_console(lambda: print(line, flush=True))

    # Like `vineppo train`, the training goes on if the terminal is closed.
    with hangup_ignored():
        summary = run_offline(config, recipe_stem(recipe), show)
        for when in ("before", "after"):
            if summary[f"accuracy_{when}"]["mean"] is not None:
                show(f"accuracy {when:<7} {interval_text(summary[f'accuracy_{when}'])}")
        tokens, seconds = summary["tokens"], duration(summary["seconds"])
        show(f"{summary['updates']:,} updates, {tokens['generated']:,} generated and {tokens['trained']:,} trained "
             f"tokens, {seconds} of training")  # fmt: skip
        show(f"run directory    {config.run.dir}")
        if (path := report_finished(Path(config.run.dir), summary)) is not None:
            show(f"report           {path}")
    return 0


COMMAND = Command(
    purpose="Train with a baseline that learns from finished responses: RestEM or DPO-positive.",
    takes="RECIPE",
    usage="[RECIPE] [--method METHOD] [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: OfflineConfig,
    examples=(
        ("five rounds of RestEM on the default recipe", "vineppo offline --method restem --restem.rounds 5"),
        (
            "DPO-positive with 16 responses to each of 512 problems",
            "vineppo offline judgement --method dpo_positive --rollouts.num_problems 512 --rollouts.group_size 16",
        ),
        (
            "RestEM with the settings of the VinePPO paper",
            "vineppo offline paper/rho1b-math-vineppo --method restem",
        ),
    ),
)
