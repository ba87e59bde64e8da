"""Measure whether 1, 2 and 3 samplers of a pool give the same bits, also if one of them is killed.

```
python benchmarks/workers.py --out docs/results/scale/equal.json
```

The samplers are Ray actors (`pip install 'vineppo[ray]'`). The requests are those of the rollouts and of continuations
of the embedded model. A completion is equal if its token ids and the bits of its log-probabilities are those of the
units sampled one after another in this process. The result is written to the fields `workers_bits_equal` and `workers`
of the JSON file, whose other fields (`benchmarks/ranks.py`) stay.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folder `benchmarks` importable.

from benchmarks.ranks import write_fields

from vineppo.config.schema import ModelConfig, SamplerConfig, TaskConfig
from vineppo.model.policy import Policy
from vineppo.sampling.build import Engine, build_sampler
from vineppo.sampling.ray import RaySampler
from vineppo.sampling.units import cut
from vineppo.seeds import derive_seed
from vineppo.tasks import build_task
from vineppo.types import Completion, SampleRequest

ENGINES: tuple[Engine, ...] = ("engine", "torch")
"""The compiled engine, whose bits do not depend on the batch, and the PyTorch sampler, for which the units are cut."""
WORKERS = (1, 2, 3)
"""Numbers of samplers."""
UNIT_ROWS = 8
"""Maximum number of sequences of a unit."""
PROBLEMS, RESPONSES, CONTINUATIONS, BUDGET = 16, 2, 3, 64
"""Numbers of problems, of responses to each, of continuations of each response, and the limit of new tokens."""


def requests_of(policy: Policy) -> list[SampleRequest]:
    """Return the requests for responses, and for continuations of the first halves of greedy responses."""
    task = build_task(TaskConfig(), policy.codec.chat_prompt)
    prompts = [policy.codec.prompt_ids(task.problem("train", index)) for index in range(PROBLEMS)]
    greedy = [SampleRequest(prompt, 1, BUDGET, 0, temperature=0.0) for prompt in prompts]
    found = []
    for number, (prompt, [completion]) in enumerate(zip(prompts, build_sampler(policy).sample(greedy), strict=True)):
        found.append(SampleRequest(prompt, RESPONSES, BUDGET, derive_seed(0, number, "responses")))
        state = prompt + completion.token_ids[: len(completion.token_ids) // 2]
        found.append(SampleRequest(state, CONTINUATIONS, BUDGET, derive_seed(0, number, "continuations")))
    return found


def in_this_process(
    policy: Policy, engine: Engine, requests: Sequence[SampleRequest], rows: int
) -> list[list[Completion]]:
    """Return the completions of the units with at most `rows` sequences, which are sampled one after another."""
    sampler = build_sampler(policy, engine, max_rows=rows)
    results: list[dict[int, Completion]] = [{} for _ in requests]
    for unit in cut(requests, rows, 1 << 40, "sampler.unit_memory"):
        for part, group in zip(unit.parts, sampler.sample(unit.requests), strict=True):
            results[part.index] |= {part.first + j: completion for j, completion in enumerate(group)}
    return [[by_sample[j] for j in sorted(by_sample)] for by_sample in results]


def with_a_kill(sampler: RaySampler, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
    """Sample, and kill the process of an actor as soon as another one has ended its first unit."""
    ray, actors = sampler.crew.ray, list(sampler.crew.actors)
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in actors])
    killed: list[int] = []

    def kill(_: Sequence[tuple[int, Completion]]) -> None:
        if not killed:
            first = next(iter(sampler.pool.last.by.values()))
            killed.append(pids[(first + 1) % len(pids)])
            os.kill(killed[0], signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning says that an actor died
        return sampler.sample(requests, kill)


def equal(found: Sequence[Sequence[Completion]], expected: Sequence[Sequence[Completion]]) -> int:
    """Return how many completions have the same token ids and log-probabilities, bit for bit."""
    pairs = [pair for groups in zip(found, expected, strict=True) for pair in zip(*groups, strict=True)]
    return sum(a.token_ids == b.token_ids and a.logprobs == b.logprobs for a, b in pairs)


def measure(engine: Engine) -> dict[str, Any]:
    """Return the numbers of completions, tokens and units, and how many completions are equal in each case."""
    policy = Policy.load(ModelConfig())
    requests = requests_of(policy)
    expected = in_this_process(policy, engine, requests, UNIT_ROWS)
    settings = SamplerConfig(pool="ray", workers=max(WORKERS), engine=engine, unit_rows=UNIT_ROWS)
    sampler, same = RaySampler(policy, ModelConfig(), settings), dict[str, int]()
    for workers in WORKERS:
        sampler.crew.size = workers  # The first actors get all units.
        same[str(workers)] = equal(sampler.sample(requests), expected)
    same[f"{max(WORKERS)}, one killed"] = equal(with_a_kill(sampler, requests), expected)
    died, units = len(sampler.pool.last.died), len(sampler.pool.last.by)
    sampler.close()
    completions = [completion for group in expected for completion in group]
    return {
        "completions": len(completions),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "units": units,
        "killed": died,
        "equal completions": same,
    }


def fields_of(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fields for the JSON file. `workers_bits_equal` is whether all completions are equal in all cases."""
    all_equal = all(
        count == found["completions"] for found in results.values() for count in found["equal completions"].values()
    )
    return {"workers_bits_equal": all_equal and all(found["killed"] for found in results.values()), "workers": results}


def main() -> None:
    """Measure, print and write the numbers of equal completions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to which the fields are written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    fields = fields_of({engine: measure(engine) for engine in ENGINES})
    for engine, found in fields["workers"].items():
        print(f"{engine:<8} {found}")
    print(f"workers_bits_equal: {fields['workers_bits_equal']}")
    if options.out:
        write_fields(options.out, fields)


if __name__ == "__main__":
    main()
