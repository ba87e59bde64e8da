"""Show that a refactoring changes no result: run short trainings with two source trees and compare every bit.

```
git worktree add ../before main
python dev/same_runs.py record before.json --source ../before/src    # the tree before the change
python dev/same_runs.py record after.json                            # this tree
python dev/same_runs.py compare before.json after.json               # exit code 1 if anything differs
```

`record` trains two iterations of each of RUNS (VinePPO, PPO, GRPO, RLOO and REINFORCE, also with LoRA), runs one
`vineppo compare`, and writes a fingerprint of each run to a file. A fingerprint is a dictionary of facts: the SHA-256
of the final weights, every metric in `metrics.jsonl` except seconds, a hash of each column of the saved rollouts, and
numbers from `summary.json`. Results depend on the processor and the number of threads, so record both trees on one
machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

SHORT = (
    "--run.iterations 2 --run.checkpoint_every 1 --eval.every 1 --eval.num_problems 16 --eval.final_num_problems 16 "
    "--rollouts.num_problems 8 --rollouts.group_size 4"
)
"""Options of every run that make the run short."""
KL = "--learner.kl.coefficient 0.01"
PLAIN = "--vineppo.alternatives false"
RUNS = {
    "vineppo": "judgement",
    "vineppo-steps": f"judgement {PLAIN} --vineppo.splitter tokens:4 --learner.advantage_scaling whiten",
    "vineppo-paper": f"judgement {PLAIN} --vineppo.reuse false --vineppo.num_mc_rollouts 3 --vineppo.max_states 5",
    "vineppo-bisection": f"judgement {PLAIN} --vineppo.bisection true",
    "vineppo-stop": "judgement --rollouts.temperature 0.6 --rollouts.max_new_tokens 60 --rollouts.max_rows 64",
    "vineppo-lora": "judgement --model.lora.r 4 --model.lora.dropout 0.1",
    "ppo": "judgement --algorithm ppo",
    "ppo-kl-reward": f"habit --algorithm ppo {KL} --learner.kl.place reward --ppo.gae_lambda 0.9",
    "ppo-lora": "judgement --algorithm ppo --model.lora.r 4 --model.gradient_checkpointing true",
    "grpo": "judgement --algorithm grpo",
    "grpo-entropy": f"habit --algorithm grpo --learner.entropy_coefficient 0.01 {KL}",
    "rloo": "judgement --algorithm rloo --learner.minibatch_size 20",
    "reinforce": "judgement --algorithm reinforce --model.dtype bfloat16",
}
"""Name of a run -> its recipe and its options for `vineppo train`."""
COMPARE = (
    "compare judgement --algorithms vineppo,ppo,grpo --seeds 2 --budget updates=4 --rollouts.num_problems 8 "
    "--rollouts.group_size 4 --eval.every 1 --eval.num_problems 16 --eval.final_num_problems 16"
)


def record(source: Path, jobs: int) -> dict[str, Any]:
    """Train all RUNS and run COMPARE with one source tree.

    Args:
        source: folder that contains the package.
        jobs: number of runs at the same time.
    Returns:
        Name of each run -> its fingerprint.
    """
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}

    def vineppo(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "vineppo", *arguments], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"vineppo {' '.join(arguments)} ended with exit code {done.returncode}:\n{done.stderr}")

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)

        def train(name: str) -> tuple[str, Any]:
            recipe, *options = RUNS[name].split()
            vineppo("train", recipe, *SHORT.split(), *options, "--run.dir", str(root / name))
            print(f"  {name}", flush=True)
            return name, run_fingerprint(root / name)

        with ThreadPoolExecutor(jobs) as pool:
            found = dict(pool.map(train, RUNS))
        vineppo(*COMPARE.split(), "--jobs", str(jobs), "--out", str(root / "compare"))
        print("  compare", flush=True)
        for run in sorted((root / "compare" / "runs").iterdir()):
            found[f"compare/{run.name}"] = run_fingerprint(run)
        found["compare"] = comparison_fingerprint(root / "compare")
    return found


def run_fingerprint(run: Path) -> dict[str, Any]:
    """Return the facts in a run directory that do not depend on the clock, as name of the fact -> value."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"final": hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()}
    for line in lines:
        found |= {
            f"metrics {line['iteration']} {key}": value for key, value in line.items() if not key.startswith("seconds/")
        }
    for path in sorted((run / "rollouts").glob("*.parquet")):
        for name, column in pq.read_table(path).to_pydict().items():
            found[f"rollouts {path.stem} {name}"] = hashlib.sha256(repr(column).encode()).hexdigest()
    summary = json.loads((run / "summary.json").read_text())
    for key in ("accuracy_before", "accuracy_after", "tokens", "updates", "finish_reason"):
        found[f"summary {key}"] = summary[key]
    return found


def comparison_fingerprint(out: Path) -> dict[str, Any]:
    """Return accuracies, updates and tokens from the compare.json of a comparison, as name of the fact -> value."""
    arms = json.loads((out / "compare.json").read_text())["arms"]
    found: dict[str, Any] = {}
    for name, figures in arms.items():
        for key in ("num_runs", "final_accuracy", "accuracy_before", "updates", "tokens"):
            found[f"{name} {key}"] = figures[key]
        for key in ("updates", "tokens", "accuracy", "accuracy_low", "accuracy_high", "kl"):
            found[f"{name} curve {key}"] = figures["curve"][key]
    return found


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print the differing facts of each run.

    Args:
        before: name of each run -> its fingerprint before the change.
        after: the same after the change.
    Returns:
        The number of facts that differ or are missing in `after`. Facts that exist only in `after` do not count.
    """
    differences = 0
    for run in sorted(before.keys() | after.keys()):
        old, new = before.get(run, {}), after.get(run, {})
        differing = [key for key in old if key not in new or json.dumps(old[key]) != json.dumps(new[key])]
        added = [key for key in new if key not in old]
        differences += len(differing)
        state = "DIFFERS" if differing or not old or not new else "equal"
        differences += not old or not new
        print(f"{run:<24} {state:<8} {len(old) - len(differing)} of {len(old)} facts equal, {len(added)} new")
        for key in differing[:10]:
            print(f"    {key}: {str(old[key])[:60]} -> {str(new.get(key, 'missing'))[:60]}")
    print("all equal" if not differences else f"{differences} differences")
    return differences


def main() -> int:
    """Parse and run one of the two commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train with a source tree and write fingerprints to a file")
    recording.add_argument("file", type=Path)
    recording.add_argument("--source", type=Path, default=Path(__file__).resolve().parents[1] / "src")
    recording.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    comparing = commands.add_parser("compare", help="compare two files of fingerprints")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        given.file.write_text(json.dumps(record(given.source.resolve(), given.jobs), indent=1) + "\n")
        return 0
    return 1 if compare(json.loads(given.before.read_text()), json.loads(given.after.read_text())) else 0


if __name__ == "__main__":
    sys.exit(main())
