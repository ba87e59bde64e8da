"""Sweep settings of a recipe on validation problems: every combination of a grid, each run by `vineppo train`.

    python dev/sweep.py judgement --algorithm ppo --grid learner.lr=5e-5,1e-4 --grid ppo.value_lr=1e-4,1e-3 \
        --seeds 100,101 --updates 120 --jobs 2 --out runs/sweep

Seeds from 100 on are for sweeps, so that the published comparisons (seeds 0 to 4) are not tuned on. A finished run is
not repeated. Prints accuracy at the end and the mean over the curve (area), both on validation problems.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--algorithm", required=True)
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=A,B")
    parser.add_argument("--seeds", default="100")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=2)
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
            shown = " ".join(f"{updates}:{100 * accuracy:.0f}" for updates, accuracy in curves[0])
            print(
                f"{arguments.algorithm:9} {name:40} last {100 * last:5.1f}  area {100 * area:5.1f}   {shown}",
                flush=True,
            )


def run_one(arguments: argparse.Namespace, settings: dict[str, str], seed: str) -> list[tuple[int, float]]:
    """(updates, validation accuracy) along one run."""
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
