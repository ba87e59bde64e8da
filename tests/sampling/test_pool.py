"""A pool of samplers in this process: the same bits for any number of workers, also when workers die or are slow."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.sampling.test_sampler import build_policy, prompts_and_states
from vineppo.config.schema import LoraConfig, ModelConfig, SamplerConfig
from vineppo.model.policy import Policy
from vineppo.sampling import pool as pool_module
from vineppo.sampling.pool import Pool, WorkerDied, _queues
from vineppo.sampling.ray import RaySampler
from vineppo.sampling.torch.pace import Pace, pace_of
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.units import Unit, cut
from vineppo.sampling.version import StaleWeights
from vineppo.sampling.worker import Arrays, Outline, SamplingWorker, WorkerSettings, packed
from vineppo.types import Completion, SampleRequest, TrainingWarning, UserError

MAX_ROWS = 4
KV_MEMORY = 1 << 24
SETTINGS = WorkerSettings("torch", MAX_ROWS, KV_MEMORY)


class Threads:
    """A crew whose workers are `SamplingWorker`s of this process, each in a thread.

    Args:
        before: called in the thread with (number of the worker, requests) before a unit is sampled.
    """

    def __init__(self, policy: Policy, size: int, before: Callable[[int, Sequence[SampleRequest]], None]):
        self.size, self.before = size, before
        self.outline, self.arrays = Outline.of(policy, ModelConfig()), packed(policy.model.state_dict().items())
        self.workers: list[SamplingWorker] = []
        self.replaced: list[int] = []
        for _ in range(size):
            self.workers.append(self.new_worker(self.arrays))
        self.threads = ThreadPoolExecutor(8)

    def new_worker(self, arrays: Arrays) -> SamplingWorker:
        worker = SamplingWorker(self.outline, SETTINGS)
        worker.load(0, arrays).get()
        return worker

    def start(self, worker: int, version: int, requests: Sequence[SampleRequest]) -> Any:
        def run(sampler: SamplingWorker) -> list[list[Completion]]:
            self.before(worker, requests)
            groups: list[list[Completion]] = sampler.sample(version, requests).get()
            return groups

        return self.threads.submit(run, self.workers[worker])

    def wait(self, handles: Sequence[Any], seconds: float | None) -> list[Any]:
        return list(wait(handles, seconds, FIRST_COMPLETED).done)

    def result(self, handle: Future[list[list[Completion]]]) -> list[list[Completion]]:
        return handle.result()

    def replace(self, worker: int) -> None:
        self.replaced.append(worker)
        self.workers[worker] = self.new_worker(self.arrays)


@pytest.fixture(scope="module")
def llama() -> Policy:
    return build_policy()


@pytest.fixture(scope="module")
def requests() -> list[SampleRequest]:
    return prompts_and_states()


@pytest.fixture(scope="module")
def units(requests: list[SampleRequest]) -> list[Unit]:
    units = cut(requests, MAX_ROWS, 10_000, "m")
    assert len(units) == 6  # 21 samples; the trunk with 12 has three units
    return units


@pytest.fixture(scope="module")
def expected(llama: Policy, requests: list[SampleRequest], units: list[Unit]) -> list[list[Completion]]:
    """The units sampled one after another, with the policy itself."""
    sampler = TorchSampler(llama, max_rows=MAX_ROWS, kv_memory=KV_MEMORY)
    results: list[dict[int, Completion]] = [{} for _ in requests]
    for unit in units:
        for part, group in zip(unit.parts, sampler.sample(unit.requests), strict=True):
            results[part.index] |= {part.first + j: completion for j, completion in enumerate(group)}
    return [[by_sample[j] for j in sorted(by_sample)] for by_sample in results]


def nothing(worker: int, requests: Sequence[SampleRequest]) -> None:
    """Do nothing before a unit."""


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_bits_do_not_depend_on_the_number_of_workers(
    size: int, llama: Policy, requests: list[SampleRequest], units: list[Unit], expected: list[list[Completion]]
) -> None:
    pool, finished = Pool(Threads(llama, size, nothing)), list[tuple[int, Completion]]()
    assert pool.sample(requests, units, 0, finished.extend) == expected
    assert sorted((i, c.token_ids, c.logprobs) for i, c in finished) == sorted(
        (i, c.token_ids, c.logprobs) for i, group in enumerate(expected) for c in group
    )
    assert pool.last.by.keys() == set(range(6)) and set(pool.last.by.values()) <= set(range(size))


def test_a_family_stays_on_one_worker_and_the_most_expensive_one_is_first() -> None:
    def unit(family: int, cost: int) -> Unit:
        return Unit((), family, cost)

    units = [unit(0, 3), unit(1, 5), unit(0, 4), unit(2, 6), unit(3, 1), unit(1, 1)]
    # Costs of the families: 7, 6, 6, 1. After 7 and 6, the next 6 goes to worker 1 (12 in all), and 1 to worker 0 (8).
    assert _queues(units, 2) == [deque([2, 0, 4]), deque([1, 5, 3])]


def test_only_the_unit_of_a_worker_that_died_is_sampled_again(
    llama: Policy, requests: list[SampleRequest], units: list[Unit], expected: list[list[Completion]]
) -> None:
    counts, lock = [0, 0], threading.Lock()

    def die_in_the_second_unit(worker: int, unit: Sequence[SampleRequest]) -> None:
        with lock:
            counts[worker] += 1
            if worker == 0 and counts[0] == 2:
                raise WorkerDied("killed")

    crew = Threads(llama, 2, die_in_the_second_unit)
    pool, finished = Pool(crew), list[tuple[int, Completion]]()
    assert pool.sample(requests, units, 0, finished.extend) == expected
    assert len(finished) == sum(map(len, expected))
    assert crew.replaced == [0] and pool.last.died == ["killed"] and len(pool.last.lost) == 1
    assert pool.last.started == {unit: 2 if unit in pool.last.lost else 1 for unit in range(6)}


def test_a_unit_whose_workers_die_is_given_up(llama: Policy, requests: list[SampleRequest], units: list[Unit]) -> None:
    def die_of_one_unit(worker: int, unit: Sequence[SampleRequest]) -> None:
        if unit == units[3].requests:
            raise WorkerDied("out of memory")

    crew = Threads(llama, 2, die_of_one_unit)
    pool = Pool(crew)
    with pytest.raises(UserError, match=r"^3 workers died while they sampled the same unit; the last one: out of mem"):
        pool.sample(requests, units, 0)
    assert pool.last.lost == [3, 3, 3] and len(crew.replaced) == 3


def test_a_slow_worker_does_not_hold_the_others(
    llama: Policy,
    requests: list[SampleRequest],
    units: list[Unit],
    expected: list[list[Completion]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Worker 0 ends its unit only when the test lets it: after two calls."""
    monkeypatch.setattr(pool_module, "_PATIENCE_SECONDS", 0.0)
    go_on = threading.Event()

    def block(worker: int, unit: Sequence[SampleRequest]) -> None:
        if worker == 0:
            assert go_on.wait(60)

    pool, finished = Pool(Threads(llama, 2, block)), list[tuple[int, Completion]]()
    assert pool.sample(requests, units, 0, finished.extend) == expected
    assert set(pool.last.by.values()) == {1} and list(pool.late.values()) == [0]
    assert len(finished) == sum(map(len, expected))
    # Exactly one unit was copied: the one that worker 0 holds.
    assert sorted(pool.last.started.values()) == [1, 1, 1, 1, 1, 2]
    assert pool.sample(requests, units, 0) == expected
    assert set(pool.last.started.values()) == {1} and set(pool.last.by.values()) == {1}
    go_on.set()
    while pool.late:
        wait(list(pool.late))
        assert pool.sample(requests, units, 0) == expected


def test_a_late_worker_that_dies_is_replaced(
    llama: Policy, requests: list[SampleRequest], units: list[Unit], expected: list[list[Completion]]
) -> None:
    pool = Pool(crew := Threads(llama, 1, nothing))
    died: Future[Any] = Future()
    died.set_exception(WorkerDied("killed"))
    pool.late[died] = 0
    assert pool.sample(requests, units, 0) == expected
    assert crew.replaced == [0] and pool.last.died == ["killed"] and not pool.last.lost


def test_the_errors_of_a_sampler_are_raised_and_the_pool_stays_usable(
    llama: Policy, requests: list[SampleRequest], units: list[Unit], expected: list[list[Completion]]
) -> None:
    fail = [True]

    def refuse(worker: int, unit: Sequence[SampleRequest]) -> None:
        if fail[0] and unit == units[2].requests:
            raise UserError("no")

    pool = Pool(Threads(llama, 3, refuse))
    with pytest.raises(UserError, match=r"^no$"):
        pool.sample(requests, units, 0)
    fail[0] = False
    assert pool.sample(requests, units, 0) == expected


def test_a_worker_with_other_weights_refuses(llama: Policy, requests: list[SampleRequest], units: list[Unit]) -> None:
    pool = Pool(Threads(llama, 2, nothing))
    with pytest.raises(StaleWeights, match=r"has the weights of update 0, and samples with those of update 1 were"):
        pool.sample(requests, units, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "llama-tied-multi-query", "qwen2", "gemma2", "gemma3", "gpt2"])
def test_a_worker_has_the_bits_of_the_policy(family: str, dtype: torch.dtype, requests: list[SampleRequest]) -> None:
    policy = build_policy(family)
    policy.model.to(dtype)  # This also rounds buffers that are not among the weights.
    worker = SamplingWorker(Outline.of(policy, ModelConfig()), SETTINGS)
    worker.load(7, packed(policy.model.state_dict().items())).get()
    sampler = TorchSampler(policy, max_rows=MAX_ROWS, kv_memory=KV_MEMORY)
    sampler.update_weights(7, lambda: policy.model.state_dict().items())
    assert worker.sample(7, requests).get() == sampler.sample(requests)


def test_a_worker_looks_at_its_tokens_as_often_as_the_settings_say(
    llama: Policy, requests: list[SampleRequest]
) -> None:
    settings = replace(SETTINGS, check_every=8, graph=True)
    worker = SamplingWorker(Outline.of(llama, ModelConfig()), settings)
    worker.load(0, packed(llama.model.state_dict().items())).get()
    assert isinstance(worker.sampler, TorchSampler)
    assert worker.sampler.pace == pace_of(torch.device("cpu"), 8) != pace_of(torch.device("cpu"))
    alone = TorchSampler(llama, max_rows=MAX_ROWS, kv_memory=KV_MEMORY, pace=Pace(8, 8))
    assert worker.sample(0, requests).get() == alone.sample(requests)


def test_a_failed_load_is_the_error_of_the_next_call(llama: Policy, requests: list[SampleRequest]) -> None:
    worker = SamplingWorker(Outline.of(llama, ModelConfig()), SETTINGS)
    arrays = dict(packed(llama.model.state_dict().items()))
    name = next(iter(arrays))
    worker.load(1, {other: array for other, array in arrays.items() if other != name})
    with pytest.raises(UserError, match=f"the weights do not fit the model of the sampling worker, .* {name}"):
        worker.sample(1, requests).get()
    worker.load(1, arrays)
    assert len(worker.sample(1, requests).get()) == len(requests)


def test_warnings_of_a_worker_reach_the_caller() -> None:
    """The output of a worker process is not shown to the user."""
    worker = SamplingWorker(Outline.of(build_policy("gpt-neo"), ModelConfig()), SETTINGS)
    with pytest.warns(TrainingWarning, match="^sampling worker: .* sampling recomputes the whole sequence"):
        line = worker.ready().get()
    assert line.startswith("sampling with PyTorch")


def test_tied_weights_that_differ_are_untied_in_a_worker() -> None:
    policy = build_policy("llama-tied-multi-query")
    arrays = packed(policy.model.state_dict().items())
    assert arrays["lm_head.weight"][0] is arrays["model.embed_tokens.weight"][0]  # stored once
    tensors = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    tensors["lm_head.weight"] += 1
    worker = SamplingWorker(Outline.of(policy, ModelConfig()), SETTINGS)
    worker.load(1, packed(tensors.items())).get()
    assert all(torch.equal(t, tensors[name]) for name, t in worker.policy.model.state_dict().items())


def test_weights_of_another_model_are_refused() -> None:
    policy = build_policy()
    worker = SamplingWorker(Outline.of(policy, ModelConfig()), SETTINGS)
    outcome = worker.load(1, packed([("other", torch.zeros(1))]))
    with pytest.raises(UserError, match="do not fit the model of the sampling worker"):
        outcome.get()
    with pytest.raises(UserError, match="do not fit the model of the sampling worker"):
        worker.sample(1, []).get()


def test_without_ray_one_line_says_how_to_install_it(llama: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # import raises ModuleNotFoundError
    with pytest.raises(
        UserError, match=r"^sampler.pool is ray, but Ray is not installed; pip install 'vineppo\[ray\]'$"
    ):
        RaySampler(llama, ModelConfig(), SamplerConfig(pool="ray"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "",
            r"^sampler.pool is ray, but Ray could not start a cluster on this machine: The node timed out\.; try again",
        ),
        (
            "10.0.0.1:6379",
            r"^sampler.address: Ray could not connect to 10.0.0.1:6379: The node timed out\.; start a cl",
        ),
    ],
)
def test_a_cluster_that_does_not_start_gets_one_line(
    address: str, message: str, llama: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine, `ray.init` raised the class Exception itself."""

    def init(**_: Any) -> None:
        raise Exception("The node timed out.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(UserError, match=message):
        RaySampler(llama, ModelConfig(), SamplerConfig(pool="ray", workers=1, address=address))


def test_adapters_on_16_bit_weights_are_refused() -> None:
    pytest.importorskip("peft")
    policy = Policy.load(ModelConfig(dtype="bfloat16", lora=LoraConfig(r=2)))
    with pytest.raises(UserError, match=r"^sampler.pool is ray, and model.dtype is bfloat16: adapters are merged"):
        RaySampler(policy, ModelConfig(), SamplerConfig(pool="ray"))
