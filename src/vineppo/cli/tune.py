"""The command `vineppo tune`, which finds the best settings of several algorithms with the same effort for each."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from vineppo.cli.common import add_recipe_note, check_arm, training_recipes
from vineppo.cli.options import Command, Request, add_note, add_settings, float_option, int_option
from vineppo.run.environment import require_one_process
from vineppo.training.configure import config_class_with_all_sections
from vineppo.types import UserError

if TYPE_CHECKING:
    from vineppo.compare.tuning import TuneSpec

_SET_BY_TUNE = (
    *("algorithm", "run.dir", "run.seed", "run.iterations", "run.max_updates", "run.max_tokens", "run.max_seconds"),
    *("run.save_rollouts", "run.checkpoint_every", "eval.final_num_problems"),
)
"""Settings that the command chooses for each run. The user cannot set them, so the help does not list them."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo tune` to its parser."""
    add = parser.add_argument
    add("--algorithms", metavar="A,B", help="algorithms to tune; write module:object for a user-defined algorithm")
    add(
        "--grid",
        metavar="[A:]KEY=X,Y",
        action="append",
        help="values of a setting, for all algorithms or for the algorithm A; may be repeated. KEY+OTHER=X,Y gives two "
        "settings the same value, KEY+OTHER=W:X,Y:Z two values",
    )
    add(
        "--cells",
        metavar="N",
        help="number of combinations that are tried for each algorithm, a fixed random choice of its grid (default: "
        "all; the grids must then have the same size)",
    )
    add("--budget", metavar="tokens=N", help="generated tokens of a run on the last rung")
    add("--rungs", metavar="N", help="number of rungs (default: 3)")
    add("--eta", metavar="X", help="a rung keeps the best one of X cells, and has X times the budget (default: 2)")
    add("--target", metavar="X", help="validation accuracy by whose tokens the cells are ranked (default: 0.9)")
    add("--seeds", metavar="N|LIST", help="seeds of every cell, as for `vineppo compare` (default: 100,101)")
    add(
        "--out",
        metavar="DIR",
        help="directory of the tuning; if it contains a tuning with the same settings, that tuning is continued; "
        "algorithms and cells may be added",
    )
    add("--jobs", metavar="N", help="number of runs that train at the same time (default: 1)")
    add_note(
        parser,
        "TUNING",
        "Successive halving: all cells (combinations of the grid) train to a small budget, the best of them to a "
        "larger one, and so on. Cells that reach the target are ranked by the generated tokens to it. They come before "
        "all others, which are ranked by their accuracy. Every algorithm gets the same number of cells and the same "
        "budget. DIR/arms.yaml has the best cell of each algorithm, for `vineppo compare --arms`; DIR/tune.json has "
        "all results. Use other seeds in the comparison afterwards. Few validation problems make the ranking noisy: "
        "set --eval.num_problems to at least 256, and --eval.every so that a run is evaluated often.",
    )
    add_recipe_note(parser, "RECIPE", sft=False)
    add_settings(parser, config_class_with_all_sections(), hidden=_SET_BY_TUNE)


def _run(request: Request) -> int:
    """Tune, and return the exit code: 1 if an algorithm has no cell that finished, else 0."""
    require_one_process()
    spec = _spec_of(request)
    check_cells(spec)
    from vineppo.compare.tuning import tune

    algorithms = tune(spec)["algorithms"].values()
    return 0 if all(found["best"] for found in algorithms) else 1


def _spec_of(request: Request) -> TuneSpec:
    """Return what the command line asks for.

    Raises:
        UserError: if an option is missing or has a value that is not allowed.
    """
    from vineppo.compare.grid import cells_of, grids_of
    from vineppo.compare.spec import arms_of, parse_budget, parse_seeds
    from vineppo.compare.tuning import TuneSpec

    recipe, options = request.positional, request.options
    if recipe is None:
        raise UserError(f"no RECIPE is given; recipes: {', '.join(training_recipes())}, or the path of a YAML file")
    advice = {
        "algorithms": "give the algorithms to tune, such as --algorithms counterfactual,reinforce",
        "grid": "give values to try, such as --grid learner.lr=1e-4,2e-4,4e-4",
        "budget": "give the generated tokens of a run, such as --budget tokens=300000",
        "out": "give the directory of the tuning with --out DIR",
    }
    for name, text in advice.items():
        if options[name] is None:
            raise UserError(f"--{name} is not given; {text}")
    budget = parse_budget(options["budget"])
    if budget.kind != "tokens":
        raise UserError(f"--budget is {options['budget']!r}, but cells are ranked by tokens; write --budget tokens=N")
    algorithms = arms_of(name.strip() for name in options["algorithms"].split(","))
    names = [arm.name for arm in algorithms]
    if len(set(names)) < len(names):
        raise UserError(f"--algorithms is {options['algorithms']!r}, where an algorithm occurs twice; list each once")
    grids, count = grids_of(algorithms, options["grid"]), None
    if options["cells"] is not None and (count := int_option(request, "cells", 0)) < 1:
        raise UserError(f"--cells is {count}; it must be at least 1")
    return TuneSpec(
        recipe=recipe,
        cells={arm.name: cells_of(arm, grids[arm.name], count) for arm in algorithms},
        budget=int(budget.amount),
        out=options["out"],
        rungs=int_option(request, "rungs", 3),
        eta=float_option(request, "eta", 2.0),
        target=float_option(request, "target", 0.9),
        seeds=parse_seeds("100,101" if options["seeds"] is None else options["seeds"]),
        jobs=int_option(request, "jobs", 1),
        overrides=request.overrides,
    )


def check_cells(spec: TuneSpec) -> None:
    """Build the configuration of each cell without using it, to report wrong settings before the first run starts.

    Raises:
        UserError: for the first setting that is not allowed, or if the recipe has no evaluation during training.
    """
    for cell in spec.all_cells:
        config = check_arm(spec.recipe, spec.settings_of(cell, spec.budget), cell.algorithm, f"cell {cell.name}")
        if not config.eval.every:
            raise UserError("eval.every is 0, so there is no accuracy to rank by; set --eval.every N")


COMMAND = Command(
    purpose="Find the best settings of several algorithms, with the same effort for each, by generated tokens.",
    takes="RECIPE",
    usage="RECIPE --algorithms A,B --grid KEY=X,Y --budget tokens=N --out DIR [--KEY VALUE ...]",
    options=_options,
    run=_run,
    settings=config_class_with_all_sections,
    examples=(
        (
            "tune two algorithms over learning rates and numbers of rollouts",
            "vineppo tune wording --algorithms counterfactual,reinforce --grid learner.lr=1e-4,2e-4,4e-4 "
            "--grid rollouts.num_problems+learner.minibatch_size=32,64 --eval.every 2 --budget tokens=300000 --jobs 2 "
            "--out runs/tune",
        ),
        (
            "the same number of cells, six, from grids of different sizes",
            "vineppo tune judgement --algorithms reinforce,grpo --grid learner.lr=1e-4,2e-4,4e-4 "
            "--grid rollouts.num_problems=32,80,160 --grid grpo:rollouts.group_size=2,4 --cells 6 "
            "--budget tokens=800000 --out runs/tune-judgement",
        ),
    ),
)
