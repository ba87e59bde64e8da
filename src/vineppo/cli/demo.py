"""The command `vineppo demo`, which trains the small model that is included in the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.common import DEFAULT_RECIPE, training_config
from vineppo.cli.options import Command, Request, add_settings
from vineppo.cli.train import exit_code, train_with
from vineppo.config.load import settings_of
from vineppo.config.schema import Config
from vineppo.credit import BUILT_IN
from vineppo.run.environment import require_one_process
from vineppo.types import UserError

_DEMO_KEYS = ("algorithm", "run.dir", "run.seed", "run.iterations")
"""Settings that the help of the command lists. The command accepts all other settings too."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo demo` to its parser."""
    add_settings(parser, Config, hidden=set(settings_of(Config)) - set(_DEMO_KEYS))


def _run(request: Request) -> int:
    """Explain the demo, train, and propose further commands. Return the exit code of the run."""
    require_one_process()
    folder = request.overrides.get("run.dir") or _free_directory(Path("runs/demo"))
    config = training_config(DEFAULT_RECIPE, {**request.overrides, "run.dir": str(folder)})
    print(
        "This demo trains a small language model, which is included in the package, to solve chains of arithmetic\n"
        "steps. The model can write each step in two ways. At some steps, one of the two ways always gives a fixed\n"
        "wrong number. From the reward alone, the model learns which way to use at each step. It gets credit for each\n"
        "choice: another token takes its place, and the change of the reward is the credit.\n"
    )
    summary = train_with(config, DEFAULT_RECIPE)
    if not exit_code(summary):
        _show_before_and_after(config)
        # Propose the first built-in algorithm that trains no value network and is not the algorithm of this run.
        others = (arm.name for arm in BUILT_IN.values() if arm.name != config.algorithm and not arm.needs_critic)
        print("\nCommands to try next:")
        print(f"  vineppo show {folder}")
        print(f"  vineppo view {folder}")
        print(f"  vineppo eval {folder}")
        print(f"  vineppo train {DEFAULT_RECIPE} --algorithm {next(others)}")
    return exit_code(summary)


def _show_before_and_after(config: Config) -> None:
    """Print a response of the starting model and one of the trained model to the same problem, with values."""
    from rich.console import Console

    from vineppo.view.before_after import NUM_MC_ROLLOUTS, NUM_PROBLEMS, before_and_after
    from vineppo.view.terminal import show_response

    try:
        pair = before_and_after(config, Path(config.run.dir) / "final")
    except UserError as error:
        print(f"\nno response before and after training can be shown: {error}")
        return
    if pair is None:
        print(f"\nTraining improved the response to none of {NUM_PROBLEMS} validation problems.")
        return
    print(
        f"\nThe first of {NUM_PROBLEMS} validation problems that the starting model gets wrong and the trained model "
        f"right.\nThe value before each step is the mean reward of {NUM_MC_ROLLOUTS} continuations that the same model "
        "samples from there.\n"
    )
    for response, label in zip(pair, ("Before training", "After training"), strict=True):
        show_response(Console(highlight=False), response, label=label)
        print()


def _free_directory(first: Path) -> Path:
    """Return a path that does not exist yet: `first` itself, or `first` with the suffix -2, -3 and so on.

    For example, the result is runs/demo-2 if `first` is runs/demo and exists.
    """
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


COMMAND = Command(
    purpose="Train the small model included in the package with counterfactual credit (under two minutes on two "
    "CPU cores) and print a short report.",
    takes="",
    usage="[--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: Config,
    examples=(
        ("write the run to runs/demo (or runs/demo-2 if runs/demo exists)", "vineppo demo"),
        ("train with another algorithm on the same problems", "vineppo demo --algorithm grpo"),
    ),
)
