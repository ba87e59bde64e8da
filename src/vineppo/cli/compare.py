"""The command `vineppo compare`, which trains several algorithms or settings and compares the results."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vineppo.cli.common import add_recipe_note, check_arm, training_recipes
from vineppo.cli.options import Command, Request, add_settings, int_option
from vineppo.credit import BASELINES, COMPARED
from vineppo.run.environment import require_one_process
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError

if TYPE_CHECKING:
    from vineppo.compare.spec import Arm, CompareSpec

_SET_BY_COMPARE = ("algorithm", "run.dir", "run.seed", "run.iterations")
"""Settings that the command chooses for each run. The user cannot set them, so the help does not list them."""
_BUDGETS = ("run.max_updates", "run.max_tokens", "run.max_seconds")
"""Settings that the command derives from the option `--budget`. The help does not list them either."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo compare` to its parser."""
    add = parser.add_argument
    add_arms(parser)
    add(
        "--sweep",
        metavar="KEY=A,B,C",
        action="append",
        help="replace every arm to which the setting KEY applies by one arm per value; may be repeated",
    )
    add(
        "--baselines",
        metavar="A,B",
        help="names of the arms that are baselines; the best one is compared with the best other arm "
        f"(default: the arms of {', '.join(BASELINES)})",
    )
    add(
        "--seeds",
        metavar="N|LIST",
        help="number of runs per arm, with the seeds 0 to N-1; or a list of seeds and ranges: 3,7,9 or 100-104 "
        "(default: 5)",
    )
    add("--budget", metavar="KIND=N", help="limit of each run: updates=N, tokens=N or seconds=N (default: updates=96)")
    add(
        "--out",
        metavar="DIR",
        help="directory of the comparison; if it contains a comparison with the same settings, that comparison is "
        "continued; arms and seeds may be added",
    )
    add(
        "--jobs",
        metavar="N",
        help="number of runs that train at the same time; above 1, the measured seconds are less reliable (default: 1)",
    )
    add_recipe_note(parser, "RECIPE", sft=False)
    add_settings(parser, config_class_with_all_sections(), hidden={*_SET_BY_COMPARE, *_BUDGETS})


def add_arms(parser: argparse.ArgumentParser) -> None:
    """Add the options that name arms. All of them append to the option `arms`, so that their order is kept."""

    def add(option: str, metavar: str, text: str) -> None:
        parser.add_argument(
            option, dest="arms", metavar=metavar, action="append", type=lambda value: (option, value), help=text
        )

    add(
        "--algorithms",
        "A,B",
        "algorithms to compare, each as an arm with its own name; write module:object for a user-defined algorithm; "
        "the first arm is compared with the second one and with the best of all others; the table shows when each arm "
        f"reaches the best accuracy of the second one (default, without other arms: {','.join(COMPARED)})",
    )
    add(
        "--arm",
        "NAME=algorithm=A,KEY=VALUE,...",
        "an arm: a name, an algorithm and settings, which win over the options below; may be repeated, also with the "
        "same algorithm",
    )
    add(
        "--arms",
        "FILE",
        "YAML file with arms: a mapping from names to settings, with `algorithm` and optionally `cells`, the number of "
        "combinations among which the settings were chosen",
    )


def _arms(given: list[tuple[str, str]]) -> tuple[Arm, ...]:
    """Return the arms of the options --algorithms, --arm and --arms, in their order."""
    from vineppo.compare.arms import load_arms, parse_arm
    from vineppo.compare.spec import arms_of

    arms: list[Arm] = []
    for option, text in given:
        if option == "--algorithms":
            arms += arms_of(name.strip() for name in text.split(","))
        else:
            arms += [parse_arm(text)] if option == "--arm" else load_arms(text)
    return tuple(arms)


def _run(request: Request) -> int:
    """Run the comparison. Return the exit code: 1 if a run did not finish, else 0."""
    require_one_process()
    from vineppo.compare.arms import swept
    from vineppo.compare.spec import CompareSpec, parse_budget, parse_seeds

    recipe, options = request.positional, request.options
    if recipe is None:
        raise UserError(f"no RECIPE is given; recipes: {', '.join(training_recipes())}, or the path of a YAML file")
    if options["out"] is None:
        raise UserError("--out is not given; give the directory of the comparison with --out DIR")
    arms = _arms(options["arms"] or [("--algorithms", ",".join(COMPARED))])
    spec = CompareSpec(
        recipe=recipe,
        arms=swept(arms, options["sweep"] or ()),
        seeds=parse_seeds("5" if options["seeds"] is None else options["seeds"]),
        budget=parse_budget("updates=96" if options["budget"] is None else options["budget"]),
        out=options["out"],
        jobs=int_option(request, "jobs", 1),
        overrides=request.overrides,
        baselines=tuple(name.strip() for name in options["baselines"].split(",")) if options["baselines"] else (),
    )
    check_arms(spec)
    from vineppo.compare.comparison import compare

    return 1 if compare(spec)["missing"] else 0


def check_arms(spec: CompareSpec) -> None:
    """Build the configuration of each arm without using it, to report wrong settings before the first run starts.

    Raises:
        UserError: for the first setting that is not allowed. The message names the arm if it has settings of its own.
    """
    from vineppo.compare.spec import settings_of_budget

    for arm in spec.arms:
        settings = {**spec.settings_of(arm), **settings_of_budget(spec.budget)}
        check_arm(spec.recipe, settings, arm.algorithm, f"arm {arm.name}" if arm.overrides else "")


COMMAND = Command(
    purpose="Train several algorithms or settings with several seeds at one budget, and write tables and plots.",
    takes="RECIPE",
    usage="RECIPE --out DIR [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=config_class_with_all_sections,
    examples=(
        (
            "train the four default algorithms with five seeds each, for 96 updates per run",
            "vineppo compare judgement --seeds 5 --budget updates=96 --out runs/compare",
        ),
        (
            "limit each run by its generated tokens, and train two runs at the same time",
            "vineppo compare habit --algorithms vineppo,grpo --budget tokens=2000000 --jobs 2 --out runs/tokens",
        ),
        (
            "compare VinePPO with GRPO in two batch shapes, at equal generated tokens",
            "vineppo compare judgement --algorithms vineppo --arm grpo32=algorithm=grpo,rollouts.num_problems=8,"
            "rollouts.group_size=4 --arm grpo320=algorithm=grpo,rollouts.num_problems=80,rollouts.group_size=4,"
            "learner.lr=4e-4 --budget tokens=1000000 --out runs/shapes",
        ),
        (
            "compare numbers of MC rollouts per state with three fresh seeds",
            "vineppo compare judgement --algorithms vineppo --sweep vineppo.num_mc_rollouts=1,3,9 --seeds 20-22 "
            "--out runs/k",
        ),
    ),
)
