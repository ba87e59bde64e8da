"""`vineppo demo`"""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.common import DEFAULT_RECIPE, training_config
from vineppo.cli.options import Command, Request, add_settings
from vineppo.cli.train import exit_code, train_with
from vineppo.config.load import settings_of
from vineppo.config.schema import Config
from vineppo.credit import BUILT_IN

_DEMO_KEYS = ("algorithm", "run.dir", "run.seed", "run.iterations")


def _options(parser: argparse.ArgumentParser) -> None:
    add_settings(parser, Config, hidden=set(settings_of(Config)) - set(_DEMO_KEYS))


def _run(request: Request) -> int:
    folder = request.overrides.get("run.dir") or _free_directory(Path("runs/demo"))
    config = training_config(DEFAULT_RECIPE, {**request.overrides, "run.dir": str(folder)})
    print(
        "A tiny language model that ships with the package solves chains of arithmetic; each step may be written in a\n"
        "reliable or in a risky way. It now learns, by reward alone, which way to choose at which step.\n"
    )
    summary = train_with(config, DEFAULT_RECIPE)
    if not exit_code(summary):
        other = next(one.name for one in BUILT_IN.values() if one.name != config.algorithm and not one.needs_critic)
        print("\nNext:")
        print(f"  vineppo eval {folder}")
        print(f"  vineppo train {DEFAULT_RECIPE} --algorithm {other}")
    return exit_code(summary)


def _free_directory(first: Path) -> Path:
    """runs/demo, or runs/demo-2, runs/demo-3, ... where that exists."""
    number, path = 1, first
    while path.exists():
        number += 1
        path = first.with_name(f"{first.name}-{number}")
    return path


COMMAND = Command(
    purpose="Five minutes on two cores: VinePPO on the embedded model and task, then a short report.",
    takes="",
    usage="[--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=lambda: Config,
    examples=(
        ("into runs/demo, or the next free name", "vineppo demo"),
        ("another algorithm on the same problems", "vineppo demo --algorithm grpo"),
    ),
)
