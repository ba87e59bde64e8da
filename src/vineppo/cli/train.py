"""The command `vineppo train`, which trains a model by reinforcement learning."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vineppo.cli.common import DEFAULT_RECIPE, add_recipe_note, training_config
from vineppo.cli.console import ConsoleReporter
from vineppo.cli.options import Command, Request, add_settings
from vineppo.config.load import COMMAND_LINE
from vineppo.config.recipes import recipe_stem
from vineppo.config.schema import Config
from vineppo.config.settings import replace
from vineppo.run.peers import launched_ranks
from vineppo.training.configure import config_class_with_all_sections, config_from_layers, with_run_dir
from vineppo.types import UserError

if TYPE_CHECKING:
    from vineppo.training.session import Reporter


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo train` to its parser."""
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in the directory RUN from its newest complete checkpoint, with its recorded settings; "
        "options change settings that later iterations alone depend on, such as --learner.lr or --run.iterations",
    )
    parser.add_argument(
        "--from",
        metavar="WHICH",
        help="with --resume: the checkpoint to continue from: newest, best (highest validation accuracy) or the number "
        "of an iteration; later checkpoints are removed (default: newest)",
    )
    add_recipe_note(parser, f"RECIPE (default: {DEFAULT_RECIPE})", sft=False)
    add_settings(parser, config_class_with_all_sections())


def _run(request: Request) -> int:
    """Start a new run, or resume a run if `--resume` is given. Return the exit code."""
    if request.options["resume"] is not None:
        return _resume(request)
    if request.options["from"] is not None:
        raise UserError("--from is only for --resume; give --resume RUN, or remove --from")
    recipe = request.positional or DEFAULT_RECIPE
    config = with_run_dir(training_config(recipe, request.overrides), recipe_stem(recipe))
    return exit_code(train_with(config, recipe_stem(recipe)))


def train_with(config: Config, recipe: str) -> dict[str, Any]:
    """Train in a new run directory and print the progress.

    Args:
        config: configuration of the run.
        recipe: name of the recipe, which is written to summary.json.
    Returns:
        The content of summary.json.
    """
    from vineppo.training.preflight import check_new_run

    check_new_run(config)
    from vineppo.training.loop import train

    with _reporter(config) as reporter:
        summary = train(config, recipe=recipe, reporter=reporter)
    _report(config, summary)
    return summary


def _report(config: Config, summary: Mapping[str, Any]) -> None:
    """Write the report of a run that has ended and was not interrupted, and print its path."""
    from vineppo.training.stopping import without_console
    from vineppo.view.trained import report_finished

    path = report_finished(Path(config.run.dir), summary)
    if path is not None:
        without_console(lambda: print(f"  {'report':<16} {path}", flush=True))


def _resume(request: Request) -> int:
    """Continue the run that `--resume` names, with its recorded settings. Return the exit code.

    Raises:
        UserError: if a recipe or another directory is given, if an option would change a recorded setting, or if the
            run cannot be resumed.
    """
    from vineppo.run.directory import RunDirectory

    if request.positional is not None:
        raise UserError(
            f"--resume uses the recorded settings of the run, so no recipe can be given; remove {request.positional}"
        )
    folder = request.options["resume"]
    given = request.overrides.get("run.dir")
    if given is not None and Path(given).resolve() != Path(folder).resolve():
        raise UserError(
            f"--run.dir is {given!r}, but --resume continues the run in its own directory {folder}; remove --run.dir "
            "(to keep the run as it is, copy its directory and resume the copy)"
        )
    run = RunDirectory.open(folder, writable=False)
    layers = [(run.config, run.source), (request.overrides, COMMAND_LINE)]
    config = config_from_layers(layers)
    # The recorded run.dir is wrong if the directory was moved after the run started. Use the path given by the user.
    config = replace(config, run=replace(config.run, dir=str(folder)))
    checkpoint = request.options["from"] or "newest"
    from vineppo.training.preflight import check_resume

    check_resume(config, checkpoint)
    from vineppo.training.loop import resume

    with _reporter(config) as reporter:
        summary = resume(config, reporter=reporter, checkpoint=checkpoint)
    _report(config, summary)
    return exit_code(summary)


@contextlib.contextmanager
def _reporter(config: Config) -> Iterator[Reporter | None]:
    """Yield a reporter that lets the run go on if the terminal is closed; None on all ranks but the first.

    At the end, also after an error, the progress bar of the reporter is stopped.
    """
    from vineppo.training.stopping import LastingReporter, without_console

    if launched_ranks()[0]:  # Rank 0 reports.
        yield None
        return
    reporter = ConsoleReporter(config)
    try:
        yield LastingReporter(reporter)
    finally:
        without_console(reporter.close)


def exit_code(summary: Mapping[str, Any]) -> int:
    """Return the exit code of a run: 130 if the run was interrupted, else 0."""
    return 130 if summary.get("finish_reason") == "interrupted" else 0


COMMAND = Command(
    purpose="Train a language model by reinforcement learning, with settings from a recipe and from options.",
    takes="RECIPE",
    usage="[RECIPE] [--KEY VALUE ...]  |  --resume RUN",
    options=_options,
    run=_run,
    settings=config_class_with_all_sections,
    examples=(
        ("train with the default recipe, PPO and another seed", "vineppo train --algorithm ppo --run.seed 1"),
        (
            "train another model on problems from a file",
            "vineppo train mine.yaml --model.path org/name --task.name dataset --task.train_path train.jsonl",
        ),
        ("continue a run that was stopped", "vineppo train --resume runs/judgement-vineppo-seed0"),
        (
            "continue a run from its best checkpoint with a lower learning rate",
            "vineppo train --resume runs/judgement-vineppo-seed0 --from best --learner.lr 1e-5",
        ),
    ),
)
