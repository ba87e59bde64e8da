"""The PyTorch sampler looks at its tokens every n tokens, with fixed tensors, and in captured steps: same results.

Captured steps are tested without a GPU: `Recorded` repeats the operations of one step on the memory of that step, as a
CUDA graph does. A number that Python computed in the step, such as a length, keeps its value, so that a step that uses
one gives other tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.sampling.test_sampler import (
    LENGTH,
    WINDOW,
    build_policy,
    flatten,
    largest_gap,
    on,
    prompts_and_states,
    tokens,
)
from vineppo.sampling.torch import graph
from vineppo.sampling.torch.attention import _attend, _attend_on_cuda, fused_on_cuda
from vineppo.sampling.torch.pace import Pace, pace_of
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.types import Completion, SampleRequest, TrainingWarning

FAMILIES = ["llama", "mistral-window", "gemma2", "gpt2"]
EVERY = Pace(1, 8, 0.7)
"""Every token is checked; rows are removed after a multiple of eight tokens."""
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::masked_select", "aten::unique_dim"}
"""Operations that wait for a GPU, so that they cannot be captured."""


def requests_of(temperature: float) -> list[SampleRequest]:
    """Requests with many budgets, with and without stop strings, and with excluded tokens."""
    requests = [
        replace(request, num_samples=1 + i % 3, max_new_tokens=max(1, LENGTH - len(request.prompt_ids) - 3 * i))
        for i, request in enumerate(prompts_and_states(temperature))
    ]
    return requests + [replace(r, stop=("a", "7"), excluded_first=(5, 6, 9), seed=r.seed + 50) for r in requests]


def sampled(
    sampler: TorchSampler, requests: Sequence[SampleRequest]
) -> tuple[list[list[Completion]], list[list[tuple[int, Completion]]]]:
    """The completions, and those that each call of `on_finished` got."""
    seen: list[list[tuple[int, Completion]]] = []
    results = sampler.sample(requests, lambda finished: seen.append(list(finished)))
    return results, [finished for finished in seen if finished]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_how_often_tokens_are_checked_changes_no_bit(family: str, temperature: float, device: torch.device) -> None:
    policy = on(device, build_policy(family))
    requests = requests_of(temperature)
    expected = sampled(TorchSampler(policy, pace=EVERY), requests)
    lengths = {len(c.token_ids) for c in flatten(expected[0])}
    assert len(lengths) > 5 and {c.finish_reason for c in flatten(expected[0])} == {"stop", "length"}
    for every in (2, 4, 8):
        assert sampled(TorchSampler(policy, pace=replace(EVERY, check_every=every)), requests) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_check_every_eight_tokens_samples_what_a_check_at_every_token_does(family: str, device: torch.device) -> None:
    """The usual pace of a CPU removes rows at other tokens, which may change the rounding of log-probabilities."""
    policy = on(device, build_policy(family))
    requests = requests_of(1.0)
    one, other = (TorchSampler(policy, pace=pace).sample(requests) for pace in (Pace(), Pace(8, 8, 0.5, 32)))
    assert tokens(one) == tokens(other)
    for a, b in zip(flatten(one), flatten(other), strict=True):
        assert a.finish_reason == b.finish_reason
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_finished_row_uses_no_position_beyond_the_context(device: torch.device) -> None:
    """The row with two new tokens ends at the last position of the model and is decoded for up to six steps more."""
    policy = on(device, build_policy("gpt2", n_positions=LENGTH))
    state = tuple(range(3, LENGTH + 1))
    requests = [SampleRequest(state[:3], 12, LENGTH - 3, seed=0), SampleRequest(state, 1, 2, seed=1)]
    expected = TorchSampler(policy, pace=EVERY).sample(requests)
    assert TorchSampler(policy, pace=replace(EVERY, check_every=8)).sample(requests) == expected
    assert max(len(c.token_ids) for c in expected[0]) == LENGTH - 3


class Recorded(TorchDispatchMode):
    """The operations of one step. `replay` repeats them on the same memory; the first time they have run already."""

    def __init__(self, step: Callable[[], None]) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.done = True
        with self:
            step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in WAITS, func
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        if self.done:
            self.done = False
            return
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Record steps in place of capturing them with CUDA."""
    captures: list[Recorded] = []

    def capture(_graphs: graph.CudaGraphs, step: Callable[[], None]) -> Recorded:
        captures.append(Recorded(step))
        return captures[-1]

    monkeypatch.setattr(graph.CudaGraphs, "capture", capture)
    yield captures


FIXED = Pace(4, 8, 0.5, 4, fixed=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_fixed_tensors_give_the_same_tokens(family: str, dtype: torch.dtype, device: torch.device) -> None:
    """Attention that reads unused tokens and hides them gives the same result, except for rounding."""
    policy = build_policy(family)
    policy.model.to(device, dtype)
    requests = requests_of(0.6)
    usual = TorchSampler(policy, pace=replace(FIXED, fixed=False)).sample(requests)
    fixed = TorchSampler(policy, pace=FIXED).sample(requests)
    assert max(len(c.token_ids) for c in flatten(fixed)) > 2 * WINDOW
    if dtype == torch.float32:
        assert tokens(fixed) == tokens(usual)
        some = slice(0, len(requests) // 2)  # those without excluded tokens
        assert largest_gap(policy, requests[some], fixed[some], 0.6) < 1e-4
        for a, b in zip(flatten(fixed), flatten(usual), strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    else:
        same = [a == b for a, b in zip(tokens(fixed), tokens(usual), strict=True)]
        assert sum(same) > len(same) / 2


# GPT-2 of transformers looks for padding in its input unless a CUDA graph is being captured.
@pytest.mark.parametrize(
    ("family", "temperature"),
    [("llama", 0.6), ("llama", 0.0), ("mistral-window", 0.6), ("gemma2", 0.6), ("gemma3", 0.6), ("gpt-neox", 0.6)],
)
def test_a_step_that_is_recorded_once_and_repeated_gives_the_same_bits(
    family: str, temperature: float, recorded: list[Recorded]
) -> None:
    policy = build_policy(family)
    requests = requests_of(temperature)
    expected = sampled(TorchSampler(policy, pace=FIXED), requests)
    sampler = TorchSampler(policy, pace=replace(FIXED, graph=True))
    assert sampled(sampler, requests) == expected
    assert sampler.steps.captures == len(recorded) > 2  # one for each number of rows of each wave
    assert sampled(sampler, requests) == expected  # nothing of the first call is used again


def test_a_recorded_step_is_replaced_when_the_branches_are_full(recorded: list[Recorded]) -> None:
    """With a budget of 60 tokens, attention reads up to 16, 32 and 60 tokens of a branch in turn."""
    policy = build_policy("llama")
    requests = [SampleRequest((5, 6, 7), 6, 60, seed, temperature=0.6) for seed in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vineppo.sampling.torch.tree._FIRST_CAPACITY", 16)
        pace = Pace(4, 4, 0.0, fixed=True)  # no row is removed
        expected = TorchSampler(policy, pace=pace).sample(requests)
        sampler = TorchSampler(policy, pace=replace(pace, graph=True))
        assert sampler.sample(requests) == expected
    assert sampler.steps.captures == len(recorded) == 3
    assert largest_gap(policy, requests, expected, 0.6) < 1e-4


def test_a_step_that_cannot_be_captured_runs_normally_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build_policy("mistral-window")
    requests = requests_of(1.0)
    expected = TorchSampler(policy, pace=FIXED).sample(requests)
    broken = 0

    def capture(_graphs: graph.CudaGraphs, step: Callable[[], None]) -> None:
        """Fail in the middle of a step, after the first layers have left their numbers for the others."""
        nonlocal broken
        broken += 1
        end = Ends(count=40)
        with end:
            step()

    monkeypatch.setattr(graph.CudaGraphs, "capture", capture)
    sampler = TorchSampler(policy, pace=replace(FIXED, graph=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sampler.sample(requests) == expected
        assert sampler.sample(requests) == expected
    found = [str(w.message) for w in caught if issubclass(w.category, TrainingWarning)]
    assert found == [
        "sampling without CUDA graphs, which takes longer, because a step of this model cannot be captured: operation "
        "not permitted when stream is capturing; sampler.graph false turns this warning off"
    ]
    assert broken == 1 and sampler.steps.captures == 0


class Ends(TorchDispatchMode):
    """Raises what CUDA raises in a capture at the operation with a number. Operations return numbers of no meaning."""

    def __init__(self, count: int):
        super().__init__()
        self.left = count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("operation not permitted when stream is capturing\nMore lines follow.")
        # A capture executes nothing: only new tensors exist, with arbitrary numbers in them.
        if func._schema.is_mutable:
            return args[0]
        out = func(*args, **(kwargs or {}))
        views = any(r.alias_info for r in func._schema.returns)
        return out if views or not isinstance(out, torch.Tensor) else torch.full_like(out, 3)


def test_the_pace_depends_on_the_device() -> None:
    assert pace_of(torch.device("cpu")) == Pace(1, 1, 0.85, 0, fixed=False, graph=False)
    assert pace_of(torch.device("cpu"), check_every=4) == Pace(4, 4)
    cuda = torch.device("cuda", 0)
    assert pace_of(cuda, graph=True) == Pace(8, 8, 0.5, 32, fixed=True, graph=True)
    assert pace_of(cuda) == Pace(8, 8, 0.85, 32)
    # The divisors of 8 remove the same rows at the same tokens, so that they give the same bits.
    assert {pace_of(cuda, n).remove_every for n in (1, 2, 4, 8)} == {8}
    assert pace_of(cuda, 12).remove_every == 24 and pace_of(cuda, 12).check_every == 12
    assert pace_of(torch.device("xpu")) == Pace(8, 8, 0.85, 32)
    with pytest.raises(AssertionError, match="multiple"):
        Pace(8, 4)


cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_graphs_give_the_results_of_steps_without_them(family: str, dtype: torch.dtype) -> None:
    policy = build_policy(family)
    policy.model.to("cuda", dtype)
    requests = requests_of(0.6)
    with_graphs = TorchSampler(policy, pace=replace(FIXED, graph=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = with_graphs.sample(requests)
    assert with_graphs.steps.captures > 2
    expected = TorchSampler(policy, pace=FIXED).sample(requests)
    assert tokens(found) == tokens(expected)
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


@cuda_only
def test_a_graph_is_captured_although_pytorch_keeps_nearly_all_memory() -> None:
    """As after an update. PyTorch keeps the memory of freed tensors, and frees none of it during a capture."""
    policy = build_policy("llama")
    policy.model.to("cuda")
    sampler = TorchSampler(policy, pace=replace(FIXED, graph=True))
    free, _ = torch.cuda.mem_get_info()
    kept = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
    del kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample([SampleRequest(tuple(range(3, 40)), 200, 40, seed=0)])
    assert sampler.steps.captures > 0


@cuda_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, 45, 300])
def test_fused_attention_on_cuda_is_that_of_plain_matrix_products(dtype: torch.dtype, k: int) -> None:
    assert fused_on_cuda(torch.device("cuda", 0), dtype, 64)
    torch.manual_seed(0)
    query, key, value = (torch.randn(6, 2, n, 64, device="cuda", dtype=dtype) for n in (7, k, k))
    fused, plain = (f(query, key, value, None, 0.125, None) for f in (_attend_on_cuda, _attend))
    for a, b in zip(fused, plain, strict=True):
        assert (a.float() - b.float()).abs().max() < (2e-5 if dtype == torch.float32 else 0.02)


def test_a_cpu_has_no_fused_attention_of_cuda() -> None:
    assert not fused_on_cuda(torch.device("cpu"), torch.float32, 64)
