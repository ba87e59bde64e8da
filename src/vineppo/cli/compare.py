"""The command `vineppo compare`, which trains several algorithms and compares the results."""

from __future__ import annotations

import argparse

from vineppo.cli.common import add_recipe_note, training_config, training_recipes
from vineppo.cli.options import Command, Request, add_settings, int_option
from vineppo.credit import COMPARED
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError

_SET_BY_COMPARE = ("algorithm", "run.dir", "run.seed", "run.iterations")
"""Settings that the command chooses for each run. The user cannot set them, so the help does not list them."""
_BUDGETS = ("run.max_updates", "run.max_tokens", "run.max_seconds")
"""Settings that the command derives from the option `--budget`. The help does not list them either."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo compare` to its parser."""
    add = parser.add_argument
    add(
        "--algorithms",
        metavar="A,B",
        help="algorithms to compare; write module:object for a user-defined algorithm; the first algorithm is compared "
        "with the second one and with the best of all others; the table shows when each algorithm reaches the best "
        "accuracy of the second one "
        f"(default: {','.join(COMPARED)})",
    )
    add("--seeds", metavar="N", help="number of runs per algorithm; the runs use the seeds 0 to N-1 (default: 5)")
    add("--budget", metavar="KIND=N", help="limit of each run: updates=N, tokens=N or seconds=N (default: updates=96)")
    add(
        "--out",
        metavar="DIR",
        help="directory of the comparison; if it contains an unfinished comparison, that comparison is continued",
    )
    add(
        "--jobs",
        metavar="N",
        help="number of runs that train at the same time; above 1, the measured seconds are less reliable (default: 1)",
    )
    add_recipe_note(parser, "RECIPE", sft=False)
    add_settings(parser, config_class_with_all_sections(), hidden={*_SET_BY_COMPARE, *_BUDGETS})


def _run(request: Request) -> int:
    """Run the comparison. Return the exit code: 1 if a run did not finish, else 0."""
    from vineppo.compare.spec import CompareSpec, parse_budget, settings_of_budget
    from vineppo.training.preflight import check_model_and_task, needed_splits

    recipe, options = request.positional, request.options
    if recipe is None:
        raise UserError(f"no RECIPE is given; recipes: {', '.join(training_recipes())}, or the path of a YAML file")
    if options["out"] is None:
        raise UserError("--out is not given; give the directory of the comparison with --out DIR")
    names = ",".join(COMPARED) if options["algorithms"] is None else options["algorithms"]
    algorithms = tuple(name.strip() for name in names.split(","))
    spec = CompareSpec(
        recipe=recipe,
        algorithms=algorithms,
        seeds=int_option(request, "seeds", 5),
        budget=parse_budget("updates=96" if options["budget"] is None else options["budget"]),
        out=options["out"],
        jobs=int_option(request, "jobs", 1),
        overrides=request.overrides,
    )
    # Build the configuration of each algorithm without using it, to report wrong settings before the first run starts.
    for algorithm, arm in zip(algorithms, spec.arms, strict=True):
        config = training_config(recipe, {**spec.overrides_of(arm), **settings_of_budget(spec.budget)}, algorithm)
        check_model_and_task(config.model, config.task, needed_splits(config))
    from vineppo.compare.comparison import compare

    return 1 if compare(spec)["missing"] else 0


COMMAND = Command(
    purpose="Train several algorithms with several seeds on the same problems and budget, and write tables and plots.",
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
    ),
)
