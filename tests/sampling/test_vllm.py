"""The sampler with vLLM, run for real on the CPU (`make test-vllm`).

One engine serves most tests, because it is slow to start. Its policy is `embedded:judgement`. Some tests change the
weights of the policy slightly and send them to the engine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import small_config
from tests.training.test_ranks import SMALL
from tests.training.test_ranks import train as train_ranks
from vineppo.config.schema import GuardConfig, ModelConfig, SamplerConfig, TaskConfig, VLLMConfig
from vineppo.model.policy import Policy
from vineppo.run.directory import RunDirectory
from vineppo.sampling.build import build_sampler
from vineppo.sampling.canary import OldWeights
from vineppo.sampling.trunks import has_stop, response_tail, stop_window
from vineppo.sampling.vllm import VLLMSampler
from vineppo.tasks import build_task
from vineppo.training.loop import train
from vineppo.types import Completion, SampleRequest, UserError

pytestmark = pytest.mark.vllm
EXACT = 2e-3
"""Largest accepted difference of log-probabilities in float32, in nats."""
DRAWS = 20_000


def descendants(process: int) -> list[int]:
    """Return the numbers of the processes that a process has started, and of those that they have started."""
    found = [
        int(n) for task in Path(f"/proc/{process}/task").iterdir() for n in (task / "children").read_text().split()
    ]
    return [*found, *(n for child in found for n in descendants(child))]


def build_engine(policy: Policy, **settings: Any) -> VLLMSampler:
    return VLLMSampler(policy, VLLMConfig(enforce_eager=True, **settings), kv_memory=1 << 28)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy.load(ModelConfig(path="embedded:judgement"))


@pytest.fixture(scope="module")
def sampler(policy: Policy) -> Iterator[VLLMSampler]:
    sampler = build_engine(policy)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[tuple[int, ...]]:
    task = build_task(TaskConfig(), policy.codec.chat_prompt)
    return [policy.codec.prompt_ids(task.problem("train", index)) for index in range(8)]


def change_weights(policy: Policy, seed: int, size: float = 0.02) -> None:
    """Change all matrices of the policy at random, by `size` of their standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))


def update(sampler: VLLMSampler, policy: Policy) -> None:
    sampler.update_weights(sampler.version + 1, lambda: policy.model.state_dict().items())


@torch.no_grad()
def trainer_distributions(policy: Policy, prefix: Sequence[int], ids: Sequence[int], temperature: float) -> np.ndarray:
    """Return the distribution of each of the T tokens after a prefix, shape (T, V), float64."""
    logits = policy.model(torch.tensor([[*prefix, *ids]])).logits[0, len(prefix) - 1 : -1].double()
    return (logits / temperature).softmax(-1).numpy()


def largest_gap(policy: Policy, requests: Sequence[SampleRequest], results: Sequence[Sequence[Completion]]) -> float:
    """Return the largest difference between the log-probabilities of completions and those of the trainer."""
    gap = 0.0
    for request, completions in zip(requests, results, strict=True):
        for c in completions:
            rows = trainer_distributions(policy, request.prompt_ids, c.token_ids, request.temperature)
            rows[0, list(request.excluded_first)] = 0.0
            rows[0] /= rows[0].sum()
            expected = np.log(rows[np.arange(len(rows)), list(c.token_ids)])
            gap = max(gap, float(np.abs(expected - np.array(c.logprobs)).max()))
    return gap


def standardized_chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Return chi-square minus its expectation, in standard deviations. Rare tokens are counted together."""
    expected = probabilities * counts.sum()
    common = expected >= 5
    observed, expected = (np.append(x[common], x[~common].sum()) for x in (counts, expected))
    observed, expected = observed[expected > 1e-9], expected[expected > 1e-9]
    degrees = len(observed) - 1
    return float((((observed - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees))


def uncertain_prefix(
    policy: Policy, prompts: Sequence[tuple[int, ...]], temperature: float = 1.0, *, without_best: bool = False
) -> tuple[int, ...]:
    """Return the prefix of a response after which the next token is most uncertain.

    Args:
        temperature: temperature of the next token.
        without_best: exclude the most likely next token.
    """
    requests = [SampleRequest(ids, 1, 60, seed=index) for index, ids in enumerate(prompts)]
    best, prefix = 0.0, prompts[0]
    for request, [completion] in zip(requests, build_sampler(policy, "torch").sample(requests), strict=True):
        rows = trainer_distributions(policy, request.prompt_ids, completion.token_ids, temperature)
        if without_best:
            rows[np.arange(len(rows)), rows.argmax(1)] = 0.0
            rows /= rows.sum(1, keepdims=True)
        entropies = -(rows * np.log(rows + 1e-300)).sum(1)
        if entropies.max() > best:
            best, prefix = entropies.max(), request.prompt_ids + completion.token_ids[: int(entropies.argmax())]
    assert best > 0.5
    return prefix


def test_next_tokens_have_the_distribution_of_the_policy(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]]
) -> None:
    """Chi-square over 20,000 draws against the exact probabilities, for vLLM and for the PyTorch sampler."""
    prefix = uncertain_prefix(policy, prompts)
    requests = [SampleRequest(prefix, DRAWS, 1, seed=11), SampleRequest(prefix, 3000, 1, seed=12, temperature=0.6)]
    other = uncertain_prefix(policy, prompts, 2.0, without_best=True)
    best = int(trainer_distributions(policy, other, (0,), 1.0)[0].argmax())
    requests.append(SampleRequest(other, 3000, 1, seed=13, excluded_first=(best,), temperature=2.0))
    for engine in (sampler, build_sampler(policy, "torch")):
        for request, completions in zip(requests, engine.sample(requests), strict=True):
            exact = trainer_distributions(policy, request.prompt_ids, (0,), request.temperature)[0]
            exact[list(request.excluded_first)] = 0.0
            drawn = [c.token_ids[0] for c in completions]
            assert not set(drawn) & set(request.excluded_first)
            counts = np.bincount(drawn, minlength=len(exact))
            assert len(drawn) == request.num_samples and (counts > 0).sum() > 1
            assert standardized_chi_square(counts, exact / exact.sum()) < 4.5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_trainer(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]], temperature: float
) -> None:
    requests = [SampleRequest(ids, 3, 120, seed=20 + i, temperature=temperature) for i, ids in enumerate(prompts)]
    requests += [replace(r, seed=r.seed + 50, excluded_first=(5, 6, 7), num_samples=1) for r in requests]
    results = sampler.sample(requests)
    assert largest_gap(policy, requests, results) < EXACT
    assert sampler.canary.probe and sampler.canary.gap < 1e-4
    for c in (c for group in results for c in group):
        ended = c.token_ids[-1] in policy.codec.eos_ids
        assert c.finish_reason == ("stop" if ended else "length") and (ended or len(c.token_ids) == 120)
        assert not set(c.token_ids[:-1]) & set(policy.codec.eos_ids)


def test_seeds_are_addresses(sampler: VLLMSampler, prompts: list[tuple[int, ...]]) -> None:
    """A sample depends on its request and its index, and not on the other requests or on their order."""
    requests = [SampleRequest(ids, 4, 60, seed=40 + i) for i, ids in enumerate(prompts)]
    expected = [[c.token_ids for c in group] for group in sampler.sample(requests)]
    assert all(len(set(group)) > 1 for group in expected)
    finished: list[tuple[int, Completion]] = []
    backwards = sampler.sample(requests[::-1], finished.extend)
    assert sorted(finished, key=repr) == sorted([(i, c) for i, g in enumerate(backwards) for c in g], key=repr)
    halves = [replace(requests[0], num_samples=2), replace(requests[0], num_samples=2, first_sample=2)]
    one, two = ([c.token_ids for c in group] for group in sampler.sample(halves))
    assert [*one, *two] == expected[0]
    # Rounding depends on the batch and may rarely change a token.
    same = sum(c.token_ids == ids for g, e in zip(backwards[::-1], expected, strict=True) for c, ids in zip(g, e))
    assert same >= 30


def test_greedy_completions_are_those_of_the_native_sampler(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]]
) -> None:
    requests = [SampleRequest(ids, 1, 120, seed=i, temperature=0.0) for i, ids in enumerate(prompts)]
    requests += [replace(r, excluded_first=(sampler.sample([r])[0][0].token_ids[0],)) for r in requests[:2]]
    results, expected = sampler.sample(requests), build_sampler(policy, "torch").sample(requests)
    assert [[(c.token_ids, c.finish_reason) for c in g] for g in results] == [
        [(c.token_ids, c.finish_reason) for c in g] for g in expected
    ]
    assert {x for g in results for c in g for x in c.logprobs} == {0.0}


def test_stop_strings_also_those_that_begin_in_the_prefix(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]]
) -> None:
    """A completion with stop strings is the one without, up to the token that completes a stop string."""
    decode = policy.codec.decode
    whole = [SampleRequest(ids, 2, 120, seed=60 + i) for i, ids in enumerate(prompts)]
    first = sampler.sample(whole)[0][0].token_ids
    inside = replace(whole[0], prompt_ids=prompts[0] + first[:9], response_tokens=9, seed=99)
    requests = [replace(r, stop=("\n", "rote")) for r in whole]
    # Stop strings that consist of the last character of the prefix and of the text of the first new token.
    last = len(decode(first[:9])) - 1
    ends = {decode(first[:9] + c.token_ids[:1])[last:] for c in sampler.sample([inside])[0]}
    assert min(map(len, ends)) > 1
    requests.append(replace(inside, stop=tuple(ends)))
    whole.append(inside)
    results, plain = sampler.sample(requests), sampler.sample(whole)
    assert [len(c.token_ids) for c in results[-1]] == [1, 1]  # the stop string began before the completion
    for request, with_stop, without in zip(requests, results, plain, strict=True):
        tail = response_tail(request, stop_window(request.stop))
        for c, full in zip(with_stop, without, strict=True):
            ids = full.token_ids
            end = next((n for n in range(1, len(ids) + 1) if has_stop(decode, tail, ids[:n], request.stop)), len(ids))
            assert c.token_ids == ids[:end] and c.finish_reason == "stop"
            assert c.logprobs == pytest.approx(full.logprobs[:end], abs=EXACT)


def test_new_weights_are_used_and_the_cache_is_never_stale(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]]
) -> None:
    """The same long prefix is sampled before and after an update, so that its old keys and values are in the cache."""
    long = (prompts[0] * 20)[:350]
    request = SampleRequest(long, 4, 8, seed=70)
    sampler.sample([request])
    for seed in (1, 2):
        change_weights(policy, seed)
        assert largest_gap(policy, [request], sampler.sample([request])) > 10 * EXACT  # the engine has old weights
        update(sampler, policy)
        results = sampler.sample([replace(request, seed=71)])
        assert largest_gap(policy, [request], results) < EXACT and sampler.canary.gap < 1e-4
        assert {c.version for c in results[0]} == {sampler.version}


def test_without_the_reset_and_the_mark_the_cache_would_be_stale(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]]
) -> None:
    """vLLM itself keeps its prefix cache when the weights change: the fault that the sampler prevents."""
    long = (prompts[1] * 20)[:350]
    request = SampleRequest(long, 2, 8, seed=80)
    sampler.sample([request])
    change_weights(policy, 3)
    assert sampler._sender is not None
    own, heads = 24, sampler._heads
    from vineppo.sampling.vllm_heads import widened

    sampler._sender.send(lambda: widened(policy.model.state_dict().items(), own, heads))
    assert largest_gap(policy, [request], sampler.sample([request])) > 10 * EXACT
    update(sampler, policy)
    assert largest_gap(policy, [request], sampler.sample([request])) < EXACT


def test_the_canary_finds_an_update_that_does_not_arrive(
    policy: Policy, sampler: VLLMSampler, prompts: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is far below the bound of the gap, as one update's is."""
    sampler.sample([SampleRequest(prompts[0], 1, 20, seed=90)])
    before = sampler.canary.trainer_scores()
    change_weights(policy, 4, size=2e-4)
    change = float((sampler.canary.trainer_scores() - before).square().mean().sqrt())
    assert change < sampler.canary.max_gap
    with monkeypatch.context() as patch:
        patch.setattr(sampler._sender, "send", lambda weights: None)
        with pytest.raises(OldWeights, match="still has the weights before update"):
            update(sampler, policy)
    update(sampler, policy)
    assert sampler.canary.gap < change / 10


def test_the_processes_of_the_engine_do_not_receive_interrupts(sampler: VLLMSampler) -> None:
    """Ctrl-C goes to all processes of a terminal, but a run that it stops finishes its iteration with the engine."""
    assert sampler.llm
    statuses = [Path(f"/proc/{n}/status").read_text() for n in descendants(os.getpid())]
    masks = [int(status.split("SigBlk:")[1].split()[0], 16) for status in statuses]
    assert sum(mask >> (signal.SIGINT - 1) & 1 for mask in masks) >= 2  # the engine and its worker
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGINT}


def test_requests_that_are_empty_or_impossible(sampler: VLLMSampler, prompts: list[tuple[int, ...]]) -> None:
    requests = [SampleRequest(prompts[0], 2, 0, seed=1), SampleRequest(prompts[1], 0, 9, seed=2)]
    assert sampler.sample(requests) == [[Completion((), (), "length", sampler.version)] * 2, []]
    assert sampler.max_length == 512
    with pytest.raises(UserError, match=r"with 500 new tokens is longer than the 512 tokens"):
        sampler.sample([SampleRequest(prompts[0], 1, 500, seed=1)])
    for temperature in (0.001, 3.0):
        with pytest.raises(UserError, match=rf"temperature is {temperature:g}, but vLLM samples at 0.01 to 2"):
            sampler.sample([SampleRequest(prompts[0], 1, 5, seed=1, temperature=temperature)])


def test_an_engine_in_bfloat16_agrees_within_its_rounding(prompts: list[tuple[int, ...]]) -> None:
    policy = Policy.load(ModelConfig(path="embedded:judgement"))
    sampler = build_engine(policy, dtype="bfloat16")
    try:
        requests = [SampleRequest(ids, 2, 120, seed=20 + i) for i, ids in enumerate(prompts)]
        gap = largest_gap(policy, requests, sampler.sample(requests))
        assert 0.005 < gap < 1.0
        change_weights(policy, 1)
        update(sampler, policy)
        assert 1e-4 < sampler.canary.gap < 0.1
        assert largest_gap(policy, requests, sampler.sample(requests)) < 1.0
    finally:
        sampler.close()


def test_a_training_run_of_ten_iterations(tmp_path: Path) -> None:
    """VinePPO with reused continuations, which needs excluded tokens. The guards compare sampler and trainer."""
    config = small_config(
        tmp_path / "run",
        sampler=SamplerConfig(engine="vllm", vllm=VLLMConfig(enforce_eager=True)),
        guards=GuardConfig(probe_every=2),
    )
    config = config.model_copy(update={"run": config.run.model_copy(update={"iterations": 10, "checkpoint_every": 5})})
    summary = train(config)
    lines = [line for line in RunDirectory.open(config.run.dir).read_metrics() if line["iteration"]]
    assert summary["finish_reason"] == "iterations" and [line["iteration"] for line in lines] == list(range(1, 11))
    assert max(line["policy/sampler_logprob_gap"] for line in lines) < EXACT
    assert summary["updates"] == 20 and summary["warnings"] == []


def test_every_process_of_torchrun_has_an_engine(tmp_path: Path) -> None:
    """Without `environment_of_engine`, the engines wait for stores that torchrun does not open."""
    run, rows = tmp_path / "run", ["--rollouts.kv_memory", "0.25"]
    engine = ["--sampler.engine", "vllm", "--sampler.vllm.enforce_eager", "true"]
    output = train_ranks(
        2, *SMALL, "--algorithm", "grpo", "--run.iterations", "2", *engine, *rows, "--run.dir", str(run)
    )
    assert "2 processes" in output
    lines = [line for line in RunDirectory.open(run).read_metrics() if line["iteration"]]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert max(line["policy/sampler_logprob_gap"] for line in lines) < EXACT


# --- excluded tokens with both of vLLM's model runners ---


def test_the_logits_processor_has_the_interfaces_of_both_runners() -> None:
    """vLLM's CPU runs only the runner V1 here, so the calls of V2 are made by hand: slots 4 and 2 in rows 0 and 1."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

    name = "vineppo.sampling.vllm_worker:ExcludedFirst"
    [of_v1], [of_v2] = _load_logitsprocs_by_fqcns([name]), _load_v2_logitsprocs_by_fqcns([name])
    assert of_v1 is of_v2
    prompt_lengths = np.array([0, 0, 7, 0, 5])
    processor = of_v2(None, SimpleNamespace(prompt_len=SimpleNamespace(np=prompt_lengths)))
    excluding = SamplingParams(extra_args={"excluded_first": [1, 2]})
    assert processor.add_request(4, excluding) and processor.add_request(2, excluding)
    assert not processor.add_request(0, SamplingParams())
    slots = np.array([4, 2, 0])
    for lengths, rows in (([5, 8, 3], [0]), ([6, 7, 3], [1]), ([6, 8, 3], [])):
        context = SimpleNamespace(idx_mapping_np=slots, seq_lens_upper_bound_np=np.array(lengths))
        expected = torch.zeros(3, 4)
        for row in rows:
            expected[row, [1, 2]] = float("-inf")
        assert torch.equal(processor.apply(torch.zeros(3, 4), context), expected)
    assert not processor.add_request(4, SamplingParams())  # a new request in the slot
    context = SimpleNamespace(idx_mapping_np=slots, seq_lens_upper_bound_np=np.array([5, 8, 3]))
    assert torch.equal(processor.apply(torch.zeros(3, 4), context), torch.zeros(3, 4))


def test_the_engine_ends_when_its_trainer_is_killed() -> None:
    """A process stands for the trainer, one for the engine and one for its worker, which runs `end_with`."""
    worker = "import sys; from vineppo.sampling.vllm_worker import end_with; end_with(int(sys.argv[1]), 0.1)"
    engine = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}, sys.argv[1]])"
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    started = subprocess.Popen([sys.executable, "-c", engine, str(trainer.pid)])
    while not (workers := descendants(started.pid)):
        time.sleep(0.1)
    assert started.poll() is None
    trainer.kill()
    trainer.wait()
    assert started.wait() == -signal.SIGKILL
    while Path(f"/proc/{workers[0]}").exists():
        time.sleep(0.1)
