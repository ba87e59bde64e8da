"""Measure whether 1, 2 and 3 samplers of a pool give the same bits, also if one of them is killed.

```
python benchmarks/workers.py --out docs/results/scale/equal.json
```

The samplers are processes behind the pool of `sampler.pool ray`, but without Ray, so that the measurement needs only
Linux; `make test-ray` does the same with Ray's actors. The requests are those of rollouts and of continuations of the
embedded model. A completion is equal if its token ids and the bits of its log-probabilities are those of the units
sampled one after another in this process. The result is written to the fields `workers_bits_equal` and `workers` of the
JSON file, whose other fields (`benchmarks/ranks.py`) stay.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # This makes the folder `benchmarks` importable.

from benchmarks.ranks import write_fields

from vineppo.config.schema import ModelConfig, TaskConfig
from vineppo.model.policy import Policy
from vineppo.sampling.build import Engine, build_sampler
from vineppo.sampling.pool import Pool, WorkerDied
from vineppo.sampling.units import Unit, cut
from vineppo.sampling.worker import Arrays, Outcome, Outline, SamplingWorker, WorkerSettings, packed
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


class Processes:
    """Processes that sample units; implements `pool.Crew`. They are forked, so that they need not import PyTorch.

    Args:
        policy: the policy that they sample with.
        size: number of processes.
        engine: the sampler of every process.
    """

    def __init__(self, policy: Policy, size: int, engine: Engine):
        self.size, self.engine = size, engine
        self.outline, self.arrays = Outline.of(policy, ModelConfig()), packed(policy.model.state_dict().items())
        self.context, self.numbers = multiprocessing.get_context("fork"), itertools.count()
        self.channels: dict[int, connection.Connection] = {}
        """Number of a unit that was started -> the channel to its process."""
        self.workers = [self._new() for _ in range(size)]

    def _new(self) -> tuple[Any, connection.Connection]:
        """Start a process, and return (process, channel to it)."""
        here, there = self.context.Pipe()
        process = self.context.Process(target=serve, args=(there, self.outline, self.arrays, self.engine), daemon=True)
        process.start()
        there.close()  # Otherwise the end of the process would not close the channel.
        return process, here

    def start(self, worker: int, version: int, requests: Sequence[SampleRequest]) -> int:
        """Let a process sample requests. Return the number of the unit, counted over all calls."""
        number = next(self.numbers)
        self.channels[number] = self.workers[worker][1]
        with contextlib.suppress(OSError):  # The process may have ended, which `wait` and `result` find.
            self.channels[number].send((version, list(requests)))
        return number

    def wait(self, handles: Sequence[int], seconds: float | None) -> list[int]:
        """Return the units whose processes have sent their results or have ended."""
        ready = connection.wait([self.channels[number] for number in handles], seconds)
        return [number for number in handles if self.channels[number] in ready]

    def result(self, handle: int) -> list[list[Completion]]:
        """Return the completions of a unit. Raise WorkerDied if its process has ended."""
        try:
            outcome: Outcome = self.channels.pop(handle).recv()
        except (EOFError, OSError) as error:
            raise WorkerDied("killed") from error
        completions: list[list[Completion]] = outcome.get()
        return completions

    def replace(self, worker: int) -> None:
        """Start a new process in the place of one that died."""
        self.workers[worker] = self._new()

    def close(self) -> None:
        """End all processes."""
        for process, _ in self.workers:
            process.kill()
            process.join()


def serve(channel: connection.Connection, outline: Outline, arrays: Arrays, engine: Engine) -> None:
    """Sample units as a process of `Processes` until the channel is closed."""
    worker = SamplingWorker(outline, WorkerSettings(engine, UNIT_ROWS, 4 << 30, threads=1))
    worker.load(0, arrays).get()
    while True:
        try:
            version, requests = channel.recv()
        except EOFError:
            return
        channel.send(worker.sample(version, requests))


def with_a_kill(pool: Pool, crew: Processes, requests: Sequence[SampleRequest], units: Sequence[Unit]) -> Any:
    """Sample, and kill a process as soon as another one has ended its first unit."""
    killed: list[int] = []

    def kill(_: Sequence[tuple[int, Completion]]) -> None:
        if not killed:
            first = next(iter(pool.last.by.values()))
            killed.append(crew.workers[(first + 1) % crew.size][0].pid)
            os.kill(killed[0], signal.SIGKILL)

    return pool.sample(requests, units, 0, kill)


def equal(found: Sequence[Sequence[Completion]], expected: Sequence[Sequence[Completion]]) -> int:
    """Return how many completions have the same token ids and log-probabilities, bit for bit."""
    pairs = [pair for groups in zip(found, expected, strict=True) for pair in zip(*groups, strict=True)]
    return sum(a.token_ids == b.token_ids and a.logprobs == b.logprobs for a, b in pairs)


def measure(engine: Engine) -> dict[str, Any]:
    """Return the numbers of completions, tokens and units, and how many completions are equal in each case."""
    policy = Policy.load(ModelConfig())
    crew = Processes(policy, max(WORKERS), engine)  # before this process samples, so that it has no threads yet
    pool, requests = Pool(crew), requests_of(policy)
    units = cut(requests, UNIT_ROWS, 1 << 40, "sampler.unit_memory")
    expected, same = in_this_process(policy, engine, requests, UNIT_ROWS), dict[str, int]()
    for workers in WORKERS:
        crew.size = workers  # The first processes get all units.
        same[str(workers)] = equal(pool.sample(requests, units, 0), expected)
    same[f"{max(WORKERS)}, one killed"] = equal(with_a_kill(pool, crew, requests, units), expected)
    crew.close()
    completions = [completion for group in expected for completion in group]
    return {
        "completions": len(completions),
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "units": len(units),
        "processes that died": len(pool.last.died),
        "units that were sampled again": len(set(pool.last.lost)),
        "equal completions": same,
    }


def fields_of(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fields for the JSON file. `workers_bits_equal` is whether all completions are equal in all cases."""
    all_equal = all(
        count == found["completions"] for found in results.values() for count in found["equal completions"].values()
    )
    return {
        "workers_bits_equal": all_equal and all(found["processes that died"] == 1 for found in results.values()),
        "workers": results,
    }


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
