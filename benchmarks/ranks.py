"""Measure how far the updates of several processes (ranks) differ from those of one process.

```
python benchmarks/ranks.py --out docs/results/scale/equal.json
```

Each case samples the training samples of an algorithm once, and makes eight or more updates with them with 1, 2 and 3
ranks (gloo, one thread each). The largest absolute difference of a weight, of a value and of a metric is written as
JSON, together with the largest change of a weight, with which the difference must be compared. The other fields of the
file are those of `benchmarks/workers.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vineppo.config.recipes import load_recipe
from vineppo.config.schema import Config
from vineppo.config.settings import replace
from vineppo.credit import find_algorithm
from vineppo.learning.sharding import ONE_RANK, Ranks, full, joined
from vineppo.model.policy import Policy
from vineppo.training.configure import build_config, with_algorithm_section
from vineppo.training.parts import build_learner, build_parts
from vineppo.training.rollouts import draw_problems

SIZE = {
    "rollouts.num_problems": "8",
    "rollouts.group_size": "4",
    "learner.minibatch_size": "8",
    "learner.micro_batch_tokens": "500",
    "learner.epochs": "1",
}
"""Settings of every case, some of which replace them. An iteration has 32 rollouts and 4 minibatches with unequal
numbers of micro-batches."""
FEW = {"rollouts.num_problems": "2", "learner.minibatch_size": "2"}
"""Settings of the cases with bfloat16, which many processors compute slowly."""
KL = {"learner.kl.coefficient": "0.01"}
LORA = {"model.lora.r": "4", "model.lora.targets": "all-linear"}
CASES: dict[str, tuple[str, dict[str, str]]] = {
    **{name: (name, {}) for name in ("vineppo", "ppo", "grpo", "rloo", "reinforce")},
    **{name: (name, {}) for name in ("counterfactual", "tree", "tempo", "grpo_lambda", "spo_chain")},
    "kl": ("grpo", KL),
    "kl in the reward, two epochs": ("grpo", {**KL, "learner.kl.place": "reward", "learner.epochs": "2"}),
    "entropy bonus": ("grpo", {"learner.entropy_coefficient": "0.01", **KL}),
    "one micro-batch": ("grpo", {"learner.micro_batch_tokens": "100000", "learner.minibatch_size": "2"}),
    "lora": ("vineppo", {**LORA, **KL}),
    "lora with dropout": ("grpo", {**LORA, "model.lora.dropout": "0.1"}),
    "lora and critic": ("ppo", {**LORA, **KL}),
    "checkpointing": ("ppo", {"model.gradient_checkpointing": "true"}),
    "bfloat16": ("ppo", {"model.dtype": "bfloat16", **FEW, **KL}),
    "lora, bfloat16": ("grpo", {**LORA, **FEW, "model.dtype": "bfloat16"}),
}
"""Name of a case -> (algorithm, settings)."""
CONTROL = "1, other micro-batches"
"""Name of the differences between two runs of one process with 500 and with 170 tokens in a micro-batch. They come from
rounding alone: float32 sums in another order, which Adam enlarges where a gradient is nearly 0."""
ROUNDED = ("bfloat16", "lora, bfloat16")
"""Cases whose weights have 16 bits, so that sums in another order differ by more."""


def config_of(case: str) -> Config:
    """Return the configuration of a case."""
    algorithm, settings = CASES[case]
    return with_algorithm_section(build_config(load_recipe("judgement"), algorithm, {**SIZE, **settings}))


def sampled(case: str) -> list[Any]:
    """Return the training samples of two iterations of a case, and its rollouts."""
    config = config_of(case)
    parts = build_parts(config)
    iterations = []
    for iteration in (1, 2):
        problems = draw_problems(parts.task, config.run.seed, iteration, config.rollouts.num_problems)
        groups, _ = parts.sample(problems, iteration)
        samples, _ = parts.credit(groups, iteration)
        iterations.append((samples, [rollout for group in groups for rollout in group.rollouts]))
    return iterations


def updated(case: str, iterations: list[Any], ranks: Ranks, micro_batch_tokens: int = 0) -> dict[str, Any]:
    """Make the updates of a case, and return its weights, metrics and values, and the largest change of a weight.

    Args:
        micro_batch_tokens: a setting of the case that is changed; 0 changes nothing.
    """
    config = config_of(case)
    if micro_batch_tokens:
        config = replace(config, learner=replace(config.learner, micro_batch_tokens=micro_batch_tokens))
    policy = Policy.load(config.model)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    learner = build_learner(config, find_algorithm(config.algorithm), policy, ranks)
    metrics, values = [], []
    for iteration, (samples, rollouts) in enumerate(iterations, start=1):
        if learner.critic is not None:
            values += learner.predict_values(rollouts)
        metrics.append(learner.update(samples, iteration, len(rollouts)))
    after = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    of_critic = {} if learner.critic is None else {n: full(t).clone() for n, t in learner.critic.state_dict().items()}
    return {
        "weights": after | {f"critic.{name}": tensor for name, tensor in of_critic.items()},
        "values": values,
        "metrics": metrics,
        "change": max(float((after[name] - tensor).abs().max()) for name, tensor in before.items()),
    }


def difference(one: dict[str, Any], many: dict[str, Any]) -> dict[str, float]:
    """Return the largest absolute differences between the results of `updated`."""
    distances = {
        name: float((t.float() - many["weights"][name].float()).abs().max()) for name, t in one["weights"].items()
    }
    weights = max(distance for name, distance in distances.items() if not name.startswith("critic."))
    critic = max((distance for name, distance in distances.items() if name.startswith("critic.")), default=0.0)
    pairs = zip(one["values"], many["values"], strict=True)
    values = max((abs(a - b) for rows in pairs for a, b in zip(*rows, strict=True)), default=0.0)
    of_metrics = zip(one["metrics"], many["metrics"], strict=True)
    metrics = max(abs(a[key] - b[key]) for a, b in of_metrics for key in a.keys() | b.keys())
    return {"weights": weights, "critic": critic, "values": values, "metrics": metrics}


def work(folder: Path, cases: list[str]) -> None:
    """Make the updates of all cases as one of the ranks that torchrun started; rank 0 writes the results.

    The samples of the cases are in the folder already (`prepare`).
    """
    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        ranks = Ranks(ranks.rank, ranks.count, ranks.mesh)  # every rank makes all calls
        for number, case in enumerate(cases):
            result = updated(case, samples_of(folder, number), ranks)
            if ranks.rank == 0:
                torch.save(result, folder / f"{number}-{ranks.count}.pt")


def torchrun(count: int, *arguments: str) -> None:
    """Run this file, or another one, with torchrun.

    Args:
        count: number of processes.
        arguments: path of the program and its arguments.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    subprocess.run([*launcher, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def prepare(folder: Path, cases: list[str]) -> None:
    """Write the training samples of all cases into a folder."""
    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        (folder / f"{number}.pkl").write_bytes(pickle.dumps(sampled(case)))


def samples_of(folder: Path, number: int) -> list[Any]:
    """Read what `sampled` returned for the case with a number."""
    iterations: list[Any] = pickle.loads((folder / f"{number}.pkl").read_bytes())
    return iterations


def compared(folder: Path, number: int, case: str, counts: tuple[int, ...], enough: float = -1.0) -> dict[str, Any]:
    """Return the differences of a case: {"change": ..., number of ranks: `difference`, CONTROL: `difference`}.

    Args:
        folder: has the samples of the case and the results of each number of ranks (`work`).
        number: number of the case in the folder.
        counts: the numbers of ranks.
        enough: the control is not computed if no weight differs by more than this.
    """
    iterations = samples_of(folder, number)
    one = updated(case, iterations, ONE_RANK)
    found: dict[str, Any] = {
        str(count): difference(one, torch.load(folder / f"{number}-{count}.pt", weights_only=False)) for count in counts
    }
    control = {}
    if max(of_weights(differences) for differences in found.values()) > enough:
        control = {CONTROL: difference(one, updated(case, iterations, ONE_RANK, 170))}
    return {"change": one["change"]} | control | found


def of_weights(differences: Mapping[str, float]) -> float:
    """Return the largest difference of a weight of the policy or of the value network."""
    return max(differences["weights"], differences["critic"])


def measure(cases: list[str], counts: tuple[int, ...] = (2, 3)) -> dict[str, Any]:
    """Return the differences of all cases: case -> `compared`."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), cases)
        for count in counts:
            torchrun(count, __file__, "--work", name, "--cases", ";".join(cases))
        return {case: compared(Path(name), number, case, counts) for number, case in enumerate(cases)}


def largest(results: dict[str, Any]) -> dict[str, float]:
    """Return the largest differences over the cases with float32, of all weights and of those of each network."""
    exact = [found for case, found in results.items() if case not in ROUNDED]

    def over(names: tuple[str, ...], counts: tuple[str, ...]) -> float:
        return max(found[count][name] for found in exact for count in counts for name in names)

    many, control = ("2", "3"), (CONTROL,)
    return {
        "ranks_max_difference": over(("weights", "critic"), many),
        "ranks_max_difference_of_policy": over(("weights",), many),
        "ranks_max_difference_of_value_network": over(("critic",), many),
        "one_process_other_micro_batches": over(("weights", "critic"), control),
    }


def write_fields(path: Path, fields: Mapping[str, Any]) -> None:
    """Write fields to a JSON file. The other fields that the file has stay."""
    present = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(fields) | {k: v for k, v in present.items() if k not in fields}, indent=2) + "\n")


def main() -> None:
    """Measure, print and write the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--cases", default=";".join(CASES), help="names of cases, separated by semicolons")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = options.cases.split(";")
    if options.work:
        work(options.work, cases)
        return
    results = measure(cases)
    for case, found in results.items():
        print(f"{case:<30} {json.dumps(found)}")
    if options.out:
        write_fields(options.out, {**largest(results), "cases": results})


if __name__ == "__main__":
    main()
