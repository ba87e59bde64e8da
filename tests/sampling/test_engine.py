"""The compiled engine: the logits of each family, and the promises of a sampler, for every instruction set."""

from __future__ import annotations

import gc
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.sampling.test_sampler import (
    ALTERNATING,
    EOS,
    LLAMA,
    TOKENIZER,
    build_policy,
    flatten,
    largest_gap,
    prompts_and_states,
    random_ids,
    stopped,
    tokens,
)
from vineppo.model.policy import Policy
from vineppo.sampling import build as sampling_build
from vineppo.sampling.build import build_sampler, sampler_line
from vineppo.sampling.engine import build as engine_build
from vineppo.sampling.engine import library
from vineppo.sampling.engine.families import EngineModel, unsupported
from vineppo.sampling.engine.library import BF16_INSTRUCTIONS, INSTRUCTIONS, EngineError, Library, load
from vineppo.sampling.engine.sampler import EngineSampler
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.trunks import trunks_of
from vineppo.types import Completion, SampleRequest, UserError

pytestmark = pytest.mark.skipif(load() is None, reason="the engine is not built; it needs a C++ compiler")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-multi-query": ("llama-tied-multi-query", {}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    "linear-rope-and-biases": ("llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral-window", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, **ALTERNATING}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "yarn-rope": ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 16}}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3", {"tie_word_embeddings": True}),
    "odd-sizes": ("llama", {"hidden_size": 44, "intermediate_size": 50, "head_dim": 22, "num_key_value_heads": 4}),
}


def usable(instructions: str) -> Library:
    found = load(instructions)
    if found is None:
        pytest.skip(f"this processor cannot run {instructions}")
    return found


def with_random_parameters(policy: Policy) -> Policy:
    """Biases and norms are constant in a new model, so a mistake in them would not be seen."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def engine(policy: Policy, instructions: str | None = None, **options: Any) -> EngineSampler:
    found = usable(instructions) if instructions else load()
    assert found is not None
    return EngineSampler(policy, found, **options)


@pytest.fixture(scope="module")
def llama() -> Policy:
    return with_random_parameters(build_policy())


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_are_those_of_the_model(name: str, instructions: str) -> None:
    family, changes = FAMILIES[name]
    policy = with_random_parameters(build_policy(family, **changes))
    assert unsupported(policy.model) == ""
    model = EngineModel(usable(instructions), policy.model)
    ids = random_ids(60, 3)
    model.refresh(len(ids), 0)
    with torch.no_grad():
        expected = policy.model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(model.compiled.logits(ids) - expected).max() < 1e-4
    assert np.abs(expected).max() > 1


def rounded_to_bf16(policy: Policy) -> Policy:
    """Round the weights of a policy to bfloat16 numbers, which stay in float32."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.copy_(parameter.bfloat16())
    return policy


@pytest.mark.parametrize("instructions", BF16_INSTRUCTIONS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_in_bf16_are_as_exact_as_those_of_pytorch(name: str, instructions: str) -> None:
    """The errors against a forward pass of the same weights in float32."""
    family, changes = FAMILIES[name]
    policy = rounded_to_bf16(with_random_parameters(build_policy(family, **changes)))
    ids = torch.tensor([random_ids(60, 3)])
    with torch.no_grad():
        exact = policy.model(ids).logits[0].numpy()
        policy.model.bfloat16()
        of_pytorch = policy.model(ids).logits[0].float().numpy()
    model = EngineModel(usable(instructions), policy.model)
    model.refresh(ids.shape[1], 0)
    error, allowed = (
        np.sqrt(np.square(x - exact).mean()) for x in (model.compiled.logits(ids[0].tolist()), of_pytorch)
    )
    assert 0 < error < allowed


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_completions_are_those_of_the_pytorch_sampler(name: str, temperature: float) -> None:
    """Trunks, branches, windows and soft caps: the same random numbers give the same tokens."""
    family, changes = FAMILIES[name]
    policy = with_random_parameters(build_policy(family, **changes))
    requests = prompts_and_states(temperature)
    results = engine(policy).sample(requests)
    assert tokens(results) == tokens(TorchSampler(policy).sample(requests))
    assert largest_gap(policy, requests, results, temperature) < 1e-4


@pytest.mark.parametrize("instructions", [*INSTRUCTIONS, *BF16_INSTRUCTIONS])
def test_a_completion_has_the_same_bits_in_every_batch(llama: Policy, instructions: str) -> None:
    """For every number of threads and rows, order, memory and set of other requests."""
    requests = prompts_and_states()
    together = engine(llama, instructions).sample(requests)
    others = [SampleRequest(random_ids(n, 50 + n), 5, 25, seed=n) for n in range(1, 12)]
    assert engine(llama, instructions).sample(others + requests)[len(others) :] == together
    assert engine(llama, instructions).sample(requests[::-1])[::-1] == together
    for options in ({"threads": 1}, {"threads": 3}, {"max_rows": 1}, {"max_rows": 5, "threads": 2}):
        sampler = engine(llama, instructions, **options)
        assert sampler.sample(requests) == together
        assert [sampler.sample([request])[0] for request in requests] == together


def test_little_memory_changes_nothing(llama: Policy) -> None:
    requests = [SampleRequest(random_ids(n, n), 5, 20, seed=n) for n in range(3, 20)]
    expected = engine(llama).sample(requests)
    kv_bytes = engine(llama)._model.compiled.kv_bytes
    smallest = kv_bytes(19) + kv_bytes(20)
    for memory in (smallest, 2 * smallest, 7 * smallest):
        assert engine(llama, kv_memory=memory, threads=3).sample(requests) == expected
    with pytest.raises(UserError, match=r"raise rollouts\.kv_memory or lower"):
        engine(llama, kv_memory=smallest - 1).sample(requests)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_stop_strings_excluded_tokens_budgets_and_temperatures(llama: Policy, temperature: float) -> None:
    """Requests of all kinds in one call are answered as by the PyTorch sampler."""
    requests = []
    for i, request in enumerate(prompts_and_states(temperature)):
        free = tokens(engine(llama).sample([replace(request, num_samples=1)]))[0][0]
        stop = "".join(llama.codec.token_texts(free[1:3])) or "a"
        requests += [
            replace(request, stop=("a", "7"), max_new_tokens=24),
            replace(request, stop=(stop,), response_tokens=2, seed=i),
            replace(request, excluded_first=(free[0], EOS), first_sample=2),
            replace(request, max_new_tokens=i),
        ]
    results = engine(llama, threads=3).sample(requests)
    expected = TorchSampler(llama).sample(requests)
    assert tokens(results) == tokens(expected)
    assert [c.finish_reason for c in flatten(results)] == [c.finish_reason for c in flatten(expected)]
    assert {c.finish_reason for c in flatten(results)} == {"stop", "length"}
    for request, completions in zip(requests, results, strict=True):
        assert all(c.token_ids[0] not in request.excluded_first for c in completions if c.token_ids)


def test_a_stop_string_may_begin_in_the_prefix(llama: Policy) -> None:
    prompt = llama.codec.encode_prompt("ab####\nab")
    request = SampleRequest(prompt, 40, 24, seed=2)
    free = tokens(engine(llama).sample([request]))[0]
    outside = engine(llama).sample([replace(request, stop=("ab", "#"))])[0]
    assert [c.token_ids for c in outside] == [stopped(ids, ("ab", "#"), llama.codec.decode) for ids in free]
    text = llama.codec.token_texts(free[0])[0]
    inside = engine(llama).sample([replace(request, stop=("b" + text,), response_tokens=len(prompt))])[0]
    assert len(inside[0].token_ids) == 1 and inside[0].finish_reason == "stop"


def test_greedy_decoding_equals_generate(llama: Policy) -> None:
    prompt = random_ids(5, 1)
    ids = engine(llama).sample([SampleRequest(prompt, 1, 24, seed=0, temperature=0.0)])[0][0].token_ids
    expected = llama.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
    assert list(ids) == expected[0, len(prompt) :].tolist()


def test_finished_completions_are_passed_on_once_and_an_error_ends_the_call(llama: Policy) -> None:
    requests = [*prompts_and_states(), SampleRequest((5,), 2, 0, 0)]
    seen: list[tuple[int, Completion]] = []
    results = engine(llama).sample(requests, seen.extend)
    expected = [(i, c) for i, completions in enumerate(results[:-1]) for c in completions]
    assert sorted(seen, key=repr) == sorted(expected, key=repr)

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    sampler = engine(llama)
    many = [replace(r, num_samples=500) for r in requests]
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(many, interrupt)
    assert sampler.sample(requests) == results


def test_new_weights_are_used_at_once() -> None:
    """After a change in place, and after a change that PyTorch does not count and `update_weights` announces."""
    policy = build_policy()
    requests = prompts_and_states()
    sampler = engine(policy)
    results = [tokens(sampler.sample(requests))]
    for version, change in enumerate((lambda p: p.add_(0.05), lambda p: p.data.sub_(0.1)), 1):
        with torch.no_grad():
            for parameter in policy.model.parameters():
                change(parameter)
        sampler.update_weights(version, lambda: iter(()))
        after = sampler.sample(requests)
        results.append(tokens(after))
        assert {c.version for c in flatten(after)} == {version}
        assert largest_gap(policy, requests, after, 1.0) < 1e-4
    assert results[0] != results[1] != results[2]


def test_adapters_are_added_in_float32() -> None:
    peft = pytest.importorskip("peft")
    policy = with_random_parameters(build_policy())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_alpha=8)
    adapted = Policy(peft.get_peft_model(policy.model, config), policy.codec)
    sampler, requests = engine(adapted), prompts_and_states()
    without = tokens(sampler.sample(requests))
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    results = sampler.sample(requests)
    assert tokens(results) != without
    assert largest_gap(adapted, requests, results, 1.0) < 1e-4
    dora = peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    other = peft.get_peft_model(build_policy().model, dora)
    assert unsupported(other) == "the engine does not know adapters of the kind in self_attn.q_proj"


def test_weights_in_bfloat16_are_computed_in_float32() -> None:
    policy = with_random_parameters(build_policy())
    policy.model.to(torch.bfloat16)
    exact = build_policy()
    exact.model.load_state_dict({name: tensor.float() for name, tensor in policy.model.state_dict().items()})
    for buffer, rounded in zip(exact.model.buffers(), policy.model.buffers(), strict=True):
        buffer.copy_(rounded)  # the angles of the positions
    requests = prompts_and_states()
    assert tokens(engine(policy).sample(requests)) == tokens(engine(exact).sample(requests))


def test_what_the_engine_does_not_know_is_sampled_with_pytorch() -> None:
    for family, reason in {
        "gpt2": "the engine does not know models of type gpt2",
        "gpt-neo": "the engine does not know models of type gpt_neo",
    }.items():
        assert unsupported(build_policy(family).model) == reason
    dynamic = build_policy("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert unsupported(dynamic.model) == "the engine does not know rotary positions of type dynamic"
    relu = build_policy("llama", hidden_act="relu")
    assert isinstance(build_sampler(relu), TorchSampler)
    assert sampler_line(relu, "auto") == "sampling with PyTorch: the engine does not know the activation relu"
    with pytest.raises(UserError, match="is engine, but the engine does not know the activation relu"):
        build_sampler(relu, "engine")
    assert isinstance(build_sampler(build_policy(), "torch"), TorchSampler)
    assert isinstance(build_sampler(build_policy()), EngineSampler)


def test_failures_are_python_errors(llama: Policy) -> None:
    sampler = engine(llama)
    for bad in ((len(TOKENIZER) + 5,), (-1,)):
        with pytest.raises(EngineError, match="a token id is not in the vocabulary"):
            sampler.sample([SampleRequest(bad, 1, 4, 0)])
    with pytest.raises(EngineError, match="an excluded token is not in the vocabulary"):
        sampler.sample([SampleRequest((5,), 1, 4, 0, excluded_first=(1000,))])
    broken = build_policy()
    with torch.no_grad():
        broken.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="the logits of the model are not finite"):
        engine(broken).sample(prompts_and_states())


def test_a_thousand_calls_leave_no_memory_behind(llama: Policy) -> None:
    sampler = engine(llama)
    request = SampleRequest(random_ids(5, 1), 2, 4, seed=0)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    for _ in range(200):
        sampler.sample([request])
    growth = []
    for _ in range(3):  # memory that is lost in every call is lost in every round
        before = resident()
        for _ in range(1000):
            sampler.sample([request])
        growth.append(resident() - before)
        if growth[-1] < 1 << 20:
            return
    raise AssertionError(f"1,000 calls took {growth} bytes")


def test_without_a_compiler_nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    libraries, reason = engine_build.build(tmp_path / "libraries")
    assert libraries == [] and reason.startswith("no C++ compiler was found")
    monkeypatch.setenv("VINEPPO_ENGINE", "0")
    assert engine_build.build(tmp_path / "libraries") == ([], "VINEPPO_ENGINE is 0")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.delenv("VINEPPO_ENGINE")
    libraries, reason = engine_build.build(tmp_path / "libraries")
    assert libraries == [] and reason.endswith("failed: x.cpp:1: error: no such thing")
    assert not list((tmp_path / "libraries").iterdir())


TILE_CONFIGURATION = """
#include <sys/syscall.h>
#include <unistd.h>
#include "tiles.h"

__attribute__((noinline)) void configure(int rows) { vineppo::configure_tiles(rows); }

int main() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 2;
  for (int rows = 1; rows <= vineppo::TILE; rows++) {
    configure(rows);
    uint8_t found[64];
    asm volatile("sttilecfg %0" : "=m"(found));
    for (int i = 0; i < 8; i++)
      if (found[16 + 2 * i] != 64 || found[48 + i] != (i < 6 ? rows : 16)) return 1;
  }
  return 0;
}
"""


@pytest.mark.parametrize("optimisation", ["-O1", "-O2", "-O3"])
def test_the_compiler_leaves_out_no_part_of_the_tile_configuration(tmp_path: Path, optimisation: str) -> None:
    """GCC's `_tile_loadconfig` names only 8 of the 64 bytes that it reads (GCC bug 114098)."""
    usable("amx_bf16")
    if not (command := engine_build.compiler()):
        pytest.skip("no C++ compiler was found")
    source, program = tmp_path / "tiles.cpp", tmp_path / "tiles"
    source.write_text(TILE_CONFIGURATION)
    flags = ["-std=c++17", optimisation, *engine_build._INSTRUCTIONS["amx_bf16"]]
    native = str(engine_build.FOLDER / "native")
    subprocess.run([*command, *flags, "-I", native, str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)]).returncode == 0


def test_windows_longer_than_the_prefix_and_trunks_outside_of_the_window() -> None:
    """Rows whose window does not reach the trunk any more, beside rows on the same trunk whose window does."""
    policy = with_random_parameters(build_policy("mistral-window", **{**LLAMA, "sliding_window": 3}))
    ids = random_ids(20, 0)
    requests = [SampleRequest(ids[:n], 3, 30, seed=n) for n in (2, 3, 9, 20)]
    results = engine(policy).sample(requests)
    assert tokens(results) == tokens(TorchSampler(policy).sample(requests))
    assert largest_gap(policy, requests, results, 1.0) < 1e-4


def test_16_bits_are_sampled_with_pytorch_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build_policy()
    policy.model.half()  # there is no library for float16
    for fast, kind in ((True, TorchSampler), (False, EngineSampler)):
        monkeypatch.setattr(sampling_build, "cpu_multiplies", lambda dtype, fast=fast: fast)
        assert isinstance(build_sampler(policy), kind)
        assert isinstance(build_sampler(policy, "engine"), EngineSampler)
        assert ("multiplies float16 faster" in sampler_line(policy, "auto")) == fast


@pytest.mark.parametrize("kind", ["norms", "tokens", "embedding", "head", "hook", "forward", "subclass"])
def test_wrapped_and_changed_modules_are_sampled_with_pytorch(kind: str) -> None:
    """The engine would read their weights and miss what they add."""
    peft = pytest.importorskip("peft")
    policy = build_policy()
    model = policy.model
    assert unsupported(model) == ""
    if kind == "norms":
        model = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]))
    elif kind == "tokens":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]))
    elif kind in ("embedding", "head"):
        name = {"embedding": "embed_tokens", "head": "lm_head"}[kind]
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", name]))
    elif kind == "hook":
        model.model.layers[0].register_forward_hook(lambda *_: None)
    elif kind == "forward":
        model.model.norm.forward = lambda x: x
    else:
        model.__class__ = type("Mine", (type(model),), {})
    assert unsupported(model).startswith(("the engine does not know", "a "))
    assert isinstance(build_sampler(Policy(model, policy.codec)), TorchSampler)


def test_replaced_weights_are_used_at_once() -> None:
    policy = with_random_parameters(build_policy())
    other = with_random_parameters(build_policy("llama", tie_word_embeddings=True))
    sampler, requests = engine(policy), prompts_and_states()
    for version, change in enumerate(
        [
            lambda: policy.model.load_state_dict(build_policy().model.state_dict(), assign=True),
            lambda: policy.model.requires_grad_(False).model.norm.weight.data.mul_(2),
            lambda: setattr(policy.model.lm_head, "weight", policy.model.model.embed_tokens.weight),
            lambda: setattr(policy.model.lm_head, "weight", other.model.lm_head.weight),
        ]
    ):
        before = tokens(sampler.sample(requests))
        change()
        sampler.update_weights(version + 1, lambda: iter(()))
        after = sampler.sample(requests)
        assert tokens(after) != before
        assert largest_gap(policy, requests, after, 1.0) < 1e-4
    policy.model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="the model has changed since its sampler was built: a LlamaRMSNorm has a hook"):
        sampler.sample(requests)


def test_adapters_that_are_switched_off_or_scaled_are_noticed() -> None:
    peft = pytest.importorskip("peft")
    policy = with_random_parameters(build_policy())
    model = peft.get_peft_model(policy.model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    adapted = Policy(model, policy.codec)
    sampler, requests = engine(adapted), prompts_and_states()
    before = tokens(sampler.sample(requests))
    for layer in model.modules():
        if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
            layer.scaling["default"] *= -2
    after = sampler.sample(requests)
    assert tokens(after) != before
    assert largest_gap(adapted, requests, after, 1.0) < 1e-4
    with model.disable_adapter(), pytest.raises(UserError, match="the model has changed"):
        sampler.sample(requests)


def test_long_prefixes_with_a_window_have_the_same_bits_in_every_batch() -> None:
    policy = with_random_parameters(build_policy("mistral-window", sliding_window=400, max_position_embeddings=1200))
    ids = random_ids(900, 0)
    requests = [SampleRequest(ids[:n], 2, 12, seed=n) for n in (300, 777, 900)]
    together = engine(policy).sample(requests)
    assert [engine(policy).sample([request])[0] for request in requests] == together
    assert largest_gap(policy, requests, together, 1.0) < 1e-4


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.norm"])
def test_weights_that_are_not_finite_are_an_error(name: str) -> None:
    policy = build_policy()
    with torch.no_grad():
        policy.model.get_submodule(name).weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="the logits of the model are not finite"):
        engine(policy).sample(prompts_and_states())


def test_a_library_that_cannot_be_loaded_leaves_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    for opened, reason in ((False, "is not built"), (True, "cannot be loaded")):
        library.load.cache_clear()
        library._open.cache_clear()
        if opened:
            for name in INSTRUCTIONS:
                (tmp_path / engine_build.library_name(name)).write_bytes(b"no library")
        assert library.load() is None and reason in library.why_not_loaded()
        assert isinstance(build_sampler(build_policy()), TorchSampler)
        with pytest.raises(UserError, match=reason):
            build_sampler(build_policy(), "engine")
    monkeypatch.undo()
    library.load.cache_clear()
    library._open.cache_clear()
    assert library.load() is not None


@pytest.mark.parametrize("instructions", BF16_INSTRUCTIONS)
def test_long_windows_and_trunks_in_bf16(instructions: str) -> None:
    """The log-probabilities of completions are those of one pass over prefix and completion, within bfloat16."""
    policy = build_policy("mistral-window", sliding_window=400, max_position_embeddings=1200)
    rounded_to_bf16(with_random_parameters(policy))
    ids = random_ids(900, 0)
    requests = [SampleRequest(ids[:n], 20, 45, seed=n) for n in (1, 31, 33, 300, 777, 900)]
    together = engine(policy, instructions).sample(requests)
    assert [engine(policy, instructions).sample([request])[0] for request in requests] == together
    assert 1e-3 < largest_gap(policy, requests, together, 1.0) < 0.15


def test_the_library_follows_the_dtype_of_the_model() -> None:
    """Weights in bfloat16 are sampled in bfloat16, where the processor multiplies it; weights with adapters are not."""
    found = load(bf16=True)
    if found is None:
        pytest.skip("this processor does not multiply bfloat16")
    policy = build_policy(head_dim=64)
    sampler = build_sampler(policy)
    assert isinstance(sampler, EngineSampler) and not sampler._model.library.bf16
    wide = sampler._model.compiled.kv_bytes(64)
    policy.model.bfloat16()
    sampler = build_sampler(policy)
    assert isinstance(sampler, EngineSampler) and sampler._model.library is found
    assert sampler_line(policy, "auto") == f"sampling with the compiled engine ({found.instructions})"
    assert wide == 2 * sampler._model.compiled.kv_bytes(64)
    policy.adapters = object()
    assert sampler_line(policy, "engine") == f"sampling with the compiled engine ({load().instructions})"  # type: ignore[union-attr]


def test_calls_within_a_call_and_in_other_threads(llama: Policy) -> None:
    requests, seen = prompts_and_states(), []
    sampler = engine(llama, threads=64)  # more threads than rows
    expected = sampler.sample(requests)
    assert sampler.sample(requests, lambda _: seen.append(sampler.sample(requests))) == expected
    assert seen and all(result == expected for result in seen)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(sampler.sample, [requests] * 8)) == [expected] * 8

    def change(_: Any) -> None:
        sampler.update_weights(1, lambda: iter(()))
        sampler.sample(requests)

    with pytest.raises(UserError, match="changed while samples were drawn"):
        sampler.sample(requests, change)
    trunks = trunks_of(requests, range(len(requests)))
    job = sampler._start(requests, trunks, [row for trunk in trunks for row in trunk.rows])
    threads = len(os.listdir("/proc/self/task")) if Path("/proc/self/task").exists() else 0
    del job
    gc.collect()
    assert not threads or len(os.listdir("/proc/self/task")) < threads
