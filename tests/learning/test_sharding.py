"""Test how work is divided over several processes, without starting them."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vineppo.learning.optim import Optimizer
from vineppo.learning.sharding import ONE_RANK, Ranks, join_ranks
from vineppo.run import peers
from vineppo.run.peers import launched_ranks, may_report, require_launcher
from vineppo.run.shards import has_shards, names_of_shards, read_networks, read_shards, write_shards
from vineppo.sampling.ranks import cut
from vineppo.types import SampleRequest, UserError


def test_every_rank_makes_as_many_passes_and_every_micro_batch_counts_once() -> None:
    shares = [Ranks(rank, 3).share(["a", "b", "c", "d"]) for rank in range(3)]
    assert shares == [[("a", True), ("d", True)], [("b", True), ("a", False)], [("c", True), ("a", False)]]
    assert [Ranks(rank, 3).share(["a"]) for rank in range(3)] == [[("a", True)], [("a", False)], [("a", False)]]
    assert Ranks(1, 3).share([]) == []
    assert ONE_RANK.share(["a", "b"]) == [("a", True), ("b", True)]


def test_micro_batches_are_smaller_if_a_rank_would_have_none() -> None:
    assert Ranks(0, 4).max_tokens(1000, 4096) == 250
    assert Ranks(0, 4).max_tokens(1001, 4096) == 251
    assert Ranks(0, 4).max_tokens(100_000, 4096) == 4096
    assert ONE_RANK.max_tokens(1000, 4096) == 4096


def request(samples: int, first: int = 0, seed: int = 7) -> SampleRequest:
    return SampleRequest((1, 2), samples, 10, seed, first_sample=first)


def test_requests_are_cut_into_equal_numbers_of_samples() -> None:
    requests = [request(3), request(1, seed=8), request(5, first=2, seed=9)]
    assert cut(requests, 0, 3) == [(0, request(3))]
    assert cut(requests, 1, 3) == [(1, request(1, seed=8)), (2, request(2, first=2, seed=9))]
    assert cut(requests, 2, 3) == [(2, request(3, first=4, seed=9))]
    assert cut(requests, 0, 1) == list(enumerate(requests))
    assert [cut([request(1)], rank, 2) for rank in range(2)] == [[], [(0, request(1))]]


def test_a_launcher_must_say_how_the_processes_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched_ranks() == (0, 1)
    require_launcher()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_ranks() == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert launched_ranks() == (3, 4)
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT of the environment is not set"):
        require_launcher()
    assert may_report()  # nobody else can be asked


def test_the_end_of_a_run_is_not_noted_for_the_next_run_of_the_same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the other ranks would not notice that this rank dies in the next run."""
    noted: list[str] = []

    def connect_late() -> SimpleNamespace:
        monkeypatch.setattr(peers, "_runs", peers._runs + 1)  # the next run has begun
        return SimpleNamespace(add=lambda key, number: noted.append(key))

    monkeypatch.setattr(peers, "_runs", 4)
    monkeypatch.setattr(peers, "_connected", connect_late)
    finished = threading.Event()
    finished.set()
    peers._watch(finished)
    assert noted == ["vineppo/0/ended/4/0"]


def test_a_process_without_a_device_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    messages = {
        "cuda:1": "8 processes were started, which need a device each; set model.device to cuda",
        "mps": "8 processes were started, which train on cuda or cpu only; start one process without a launcher",
    }
    for device, message in messages.items():
        with pytest.raises(UserError, match=message):
            join_ranks(device)
    for present, mend in ((4, "at most 4 processes on this machine"), (0, "the processes with model.device cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda present=present: present)
        with pytest.raises(UserError, match=f"process 5 of this machine .* has no GPU: {present} are .*; start {mend}"):
            join_ranks("cuda")


def test_shards_are_read_by_one_process(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(3, 2)
    state = {"policy/a": weight, "policy/b": weight[0] * 10, "critic/c": weight * 2, "updates": torch.tensor(5)}
    write_shards(tmp_path, state)
    assert has_shards(tmp_path) and names_of_shards(tmp_path) == set(state)
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    read_shards(tmp_path, found)
    assert all(torch.equal(found[name], state[name]) for name in state)
    networks = read_networks(tmp_path)
    assert set(networks["policy"]) == {"a", "b"} and torch.equal(networks["policy"]["b"], weight[0] * 10)
    assert torch.equal(networks["critic"]["c"], weight * 2)
    with pytest.raises(ValueError, match=r"policy/a has the shape \(3, 2\), and the model \(2, 2\)"):
        read_shards(tmp_path, {**found, "policy/a": torch.zeros(2, 2)})
    with pytest.raises(KeyError, match="policy/b"):
        read_shards(tmp_path, {name: tensor for name, tensor in found.items() if name != "policy/b"})


def test_the_state_of_an_optimizer_is_restored_by_name() -> None:
    """Two steps of AdamW on 16-bit weights, once without a break and once with a new optimizer after the first."""

    def parameter() -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))

    def step(optimizer: Optimizer, gradient: list[float]) -> None:
        optimizer.parameters[0].grad = torch.tensor(gradient, dtype=torch.bfloat16)
        optimizer.step(0.1, 0.0)

    whole, first, second = (Optimizer([parameter()], (0.9, 0.99), 0.01) for _ in range(3))
    for optimizer in (whole, first):
        step(optimizer, [0.5, 0.25])
    saved = {name: tensor.clone() for name, tensor in first.tensors(["w"]).items()}
    assert set(saved) == {"w/master", "w/step", "w/exp_avg", "w/exp_avg_sq"}
    assert set(second.tensors(["w"])) == {"w/master"}
    for name, tensor in second.tensors(["w"], lambda name: name in saved).items():
        tensor.copy_(saved[name])
    for optimizer in (whole, second):
        step(optimizer, [-0.5, 1.0])
    assert torch.equal(whole.masters[0], second.masters[0])
    assert whole.adamw.state[whole.masters[0]]["step"] == second.adamw.state[second.masters[0]]["step"] == 2
