"""Train a recipe with every combination of the values in a grid, and compare the accuracies on validation problems.

    python dev/sweep.py judgement --algorithm ppo --grid learner.lr=5e-5,1e-4 --grid ppo.value_lr=1e-4,1e-3 \
        --seeds 100,101 --updates 120 --jobs 2 --out runs/sweep

Each run is a `vineppo train`. Runs that are already finished are not repeated. Use seeds from 100 on, so that no
setting is tuned on the seeds of the published comparisons (0 to 4). The script prints for each combination `last`, the
accuracy of the last evaluation in percent, and `area`, the mean accuracy of all evaluations in percent. Both are means
over the seeds. The rest of the line has `updates:accuracy` for each evaluation with the first seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean


def main() -> None:
    """Parse the arguments, run the grid and print a line per combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--algorithm", required=True)
    parser.add_argument(
        "--grid", action="append", default=[], metavar="KEY=A,B", help="values of a setting; repeatable"
    )
    parser.add_argument("--seeds", default="100", help="seeds of every combination")
    parser.add_argument("--updates", type=int, default=120, help="updates per run")
    parser.add_argument("--jobs", type=int, default=2, help="number of runs at the same time")
    parser.add_argument("--out", default="runs/sweep")
    arguments = parser.parse_args()
    keys = [item.split("=")[0] for item in arguments.grid]
    values = [item.split("=")[1].split(",") for item in arguments.grid]
    seeds = arguments.seeds.split(",")
    points = list(itertools.product(*values))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {
            (point, seed): pool.submit(run_one, arguments, dict(zip(keys, point)), seed)
            for point in points
            for seed in seeds
        }
        for point in points:
            curves = [futures[point, seed].result() for seed in seeds]
            name = " ".join(f"{key}={value}" for key, value in zip(keys, point))
            last, area = mean(c[-1][1] for c in curves), mean(mean(a for _, a in c) for c in curves)
            first_curve = " ".join(f"{updates}:{100 * accuracy:.0f}" for updates, accuracy in curves[0])
            print(
                f"{arguments.algorithm:9} {name:40} last {100 * last:5.1f}  area {100 * area:5.1f}   {first_curve}",
                flush=True,
            )


def run_one(arguments: argparse.Namespace, settings: dict[str, str], seed: str) -> list[tuple[int, float]]:
    """Train one run, unless it is already finished, and return its training curve.

    Args:
        arguments: the parsed command line.
        settings: dotted key of each setting in the grid -> its value in this run.
        seed: seed of the run.
    Returns:
        One pair (number of updates, validation accuracy in [0, 1]) for each evaluation.
    """
    name = "-".join([arguments.recipe, arguments.algorithm, *(f"{k}={v}" for k, v in settings.items()), f"seed{seed}"])
    run = Path(arguments.out) / name.replace("/", "_")
    if not (run / "summary.json").exists():
        fixed = {"algorithm": arguments.algorithm, "run.dir": str(run), "run.seed": seed, "run.iterations": "1000000"}
        fixed |= {"run.max_updates": str(arguments.updates), "run.save_rollouts": "false", "run.checkpoint_every": "0"}
        options = [part for key, value in {**fixed, **settings}.items() for part in (f"--{key}", value)]
        command = [sys.executable, "-m", "vineppo", "train", arguments.recipe, *options]
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // arguments.jobs)), **os.environ}
        subprocess.run(command, check=True, env=threads, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["updates"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]


if __name__ == "__main__":
    main()
