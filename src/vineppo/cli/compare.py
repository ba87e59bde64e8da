"""`vineppo compare`"""

from __future__ import annotations

import argparse

from vineppo.cli.common import add_recipe_note, training_config, training_recipes
from vineppo.cli.options import Command, Request, add_settings, count
from vineppo.config.schema import Config
from vineppo.types import UserError

_SET_BY_COMPARE = ("algorithm", "run.dir", "run.seed", "run.iterations")


_BUDGETS = ("run.max_updates", "run.max_tokens", "run.max_seconds")


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--algorithms", metavar="A,B", help="compared algorithms (default: vineppo,ppo,grpo,rloo)")
    add("--seeds", metavar="N", help="runs per algorithm, with seeds 0 to N-1 (default: 5)")
    add("--budget", metavar="KIND=N", help="of each run: updates=N, tokens=N or seconds=N (default: updates=96)")
    add("--out", metavar="DIR", help="directory of the comparison; one that stopped half-way goes on from there")
    add("--jobs", metavar="N", help="runs at the same time; more than 1 makes seconds less meaningful (default: 1)")
    add_recipe_note(parser, "RECIPE", sft=False)
    add_settings(parser, Config, hidden={*_SET_BY_COMPARE, *_BUDGETS})


def _run(request: Request) -> int:
    from vineppo.compare.comparison import compare
    from vineppo.compare.spec import CompareSpec, parse_budget, settings_of_budget

    recipe, options = request.positional, request.options
    if recipe is None:
        raise UserError(f"no RECIPE is given; recipes: {', '.join(training_recipes())}, or the path of a YAML file")
    if options["out"] is None:
        raise UserError("--out is not given; name the directory of the comparison")
    algorithms = tuple(name.strip() for name in (options["algorithms"] or "vineppo,ppo,grpo,rloo").split(","))
    spec = CompareSpec(
        recipe=recipe,
        algorithms=algorithms,
        seeds=count(request, "seeds", 5),
        budget=parse_budget(options["budget"] or "updates=96"),
        out=options["out"],
        jobs=count(request, "jobs", 1),
        overrides=tuple(f"--{key}={value}" for key, value in request.overrides.items()),
    )
    for algorithm in algorithms:  # a mistake is told now, not by the first run that meets it
        training_config(recipe, {**request.overrides, **settings_of_budget(spec.budget)}, algorithm)
    return 1 if compare(spec)["missing"] else 0


COMMAND = Command(
    purpose="Train several algorithms with several seeds on the same problems and budget; table, CSV, JSON, plots.",
    takes="RECIPE",
    usage="RECIPE --out DIR [--KEY VALUE ...]",
    options=_options,
    run=_run,
    config=Config,
    examples=(
        (
            "five seeds of four algorithms, 96 updates each",
            "vineppo compare judgement --seeds 5 --budget updates=96 --out runs/compare",
        ),
        (
            "equal generated tokens instead, two runs at a time",
            "vineppo compare habit --algorithms vineppo,grpo --budget tokens=2000000 --jobs 2 --out runs/tokens",
        ),
    ),
)
