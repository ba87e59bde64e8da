"""The PyTorch sampler: its log-probabilities are those of the trainer, and a sample depends only on its request."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vineppo.model.batch import pad
from vineppo.model.codec import Codec
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.model.tiny import build_tokenizer
from vineppo.sampling.torch.attention import _decode_attention
from vineppo.sampling.torch.draw import draw
from vineppo.sampling.torch.sampler import TorchSampler, kv_bytes_per_token
from vineppo.sampling.torch.tree import KVTree
from vineppo.types import Completion, SampleRequest, UserError

TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id
SPECIAL = 3
"""Number of special tokens, which have the first ids; prompts are made of the other tokens."""
WINDOW = 7
LENGTH = 30
"""Number of tokens of prefix and budget together, about four windows."""

LLAMA: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
GPT: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {**LLAMA, **ALTERNATING, "query_pre_attn_scalar": 8}

# Models with tree support: name -> (model type, configuration).
TREE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-multi-query": ("llama", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": WINDOW}),
    "qwen2": ("qwen2", LLAMA),
    "qwen3": ("qwen3", LLAMA),
    "gemma": ("gemma", LLAMA),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA),
    "gpt2": ("gpt2", GPT),
    "gpt-neox": ("gpt_neox", LLAMA),
}
# Models without tree support: no attention interface, sinks, convolutions, chunks, a window that is only in the mask.
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": len(TOKENIZER),
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        },
    ),
    "gpt-oss-sinks": ("gpt_oss", {**LLAMA, **ALTERNATING, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "lfm2-convolution": ("lfm2", {**LLAMA, "layer_types": ["conv", "full_attention"]}),
    "llama4-chunks": (
        "llama4_text",
        {
            **LLAMA,
            "attention_chunk_size": 12,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
        },
    ),
    "phimoe-window-in-mask": ("phimoe", {**LLAMA, "sliding_window": WINDOW, "num_local_experts": 2}),
}


def build_policy(family: str = "llama", **changes: Any) -> Policy:
    """A small random model of a family, with the tokenizer of the chain task."""
    model_type, options = {**TREE, **PLAIN}[family]
    ends = {"pad_token_id": TOKENIZER.pad_token_id, "bos_token_id": None, "eos_token_id": EOS}
    config = AutoConfig.for_model(model_type, **{**options, **ends, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
    return Policy(model, Codec.for_model(model, TOKENIZER))


@pytest.fixture(scope="module")
def llama() -> Policy:
    return build_policy()


@pytest.fixture(scope="module")
def llama_on_device(device: torch.device) -> Policy:
    """The same on every device of this machine."""
    return on(device, build_policy())


def on(device: torch.device, policy: Policy) -> Policy:
    """The policy, after its model has moved to a device."""
    policy.model.to(device)
    return policy


def random_ids(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(SPECIAL, len(TOKENIZER), length).tolist())


def prompts_and_states(temperature: float = 1.0) -> list[SampleRequest]:
    """A prompt, and states of two responses to another problem, some of which are prefixes of each other."""
    first, second, other = random_ids(20, 0), random_ids(20, 1), random_ids(5, 2)
    prefixes = [first[:n] for n in (4, 9, 14, 20)] + [first[:4] + second[:n] for n in (3, 12)] + [other]
    return [
        SampleRequest(ids, 3, LENGTH - len(ids), 100 + i, temperature=temperature) for i, ids in enumerate(prefixes)
    ]


def trainer_logprobs(policy: Policy, prompt_ids: Sequence[int], completion: Completion, T: float) -> torch.Tensor:
    """Log-probabilities of a completion's tokens as computed by the trainer, shape (T,)."""
    token_ids = torch.tensor([[*prompt_ids, *completion.token_ids]], device=policy.device)
    mask = torch.arange(token_ids.shape[1], device=policy.device)[None] >= len(prompt_ids)
    with torch.no_grad():
        return token_logprobs(policy.model, token_ids, mask, T)[0].cpu()


def largest_gap(policy: Policy, requests: Sequence[SampleRequest], results: list[list[Completion]], T: float) -> float:
    gaps = [
        (trainer_logprobs(policy, request.prompt_ids, completion, T) - torch.tensor(completion.logprobs)).abs().max()
        for request, completions in zip(requests, results, strict=True)
        for completion in completions
    ]
    return float(max(gaps))


def tokens(results: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in completions] for completions in results]


def flatten(results: list[list[Completion]]) -> list[Completion]:
    return [completion for completions in results for completion in completions]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("family", list(TREE))
def test_sampler_logprobs_are_the_trainers(family: str, temperature: float, device: torch.device) -> None:
    policy = on(device, build_policy(family))
    requests = prompts_and_states(temperature)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = TorchSampler(policy)
    assert sampler.tree_attention
    results = sampler.sample(requests)
    assert max(len(c.token_ids) for c in flatten(results)) > 2 * WINDOW
    assert largest_gap(policy, requests, results, temperature) < 1e-4
    # The comparison above would fail with the other temperature.
    assert largest_gap(policy, requests, results, 1.6 - temperature) > 0.1


ORIGINAL = 12
"""Original context of the models with scaled rotary position embeddings."""
SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "rope_theta": 10000.0}
BANDS = {"long_factor": [4.0, 3.0, 2.0, 5.0], "short_factor": [1.0, 1.5, 1.2, 1.1]}
ROPE: dict[str, tuple[str, dict[str, Any], int]] = {
    # name -> (model type, configuration, largest length)
    "default": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, 64),
    "linear": ("llama", {**LLAMA, "rope_parameters": {**SCALED, "rope_type": "linear"}}, 64),
    "yarn": ("llama", {**LLAMA, "rope_parameters": {**SCALED, "rope_type": "yarn"}}, 64),
    "llama3": (
        "llama",
        {**LLAMA, "rope_parameters": {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4}},
        64,
    ),
    # The frequencies change beyond max_position_embeddings (dynamic) or beyond the original context (longrope).
    "dynamic": (
        "llama",
        {
            **LLAMA,
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
        },
        ORIGINAL,
    ),
    "longrope": ("llama", {**LLAMA, "rope_parameters": {**SCALED, **BANDS, "rope_type": "longrope"}}, ORIGINAL),
    "phi3-longrope": (
        "phi3",
        {
            **LLAMA,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": {**SCALED, **BANDS, "rope_type": "longrope"},
        },
        ORIGINAL,
    ),
    "gemma3-two-kinds": (
        "gemma3_text",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {**SCALED, **BANDS, "rope_type": "longrope"},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        ORIGINAL,
    ),
}


@pytest.mark.parametrize("name", list(ROPE))
def test_sampler_and_trainer_agree_at_every_length_that_the_codec_allows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 13: frequencies that change with the length of the sequence would make the two differ."""
    model_type, options, length = ROPE[name]
    monkeypatch.setitem(TREE, name, (model_type, options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        policy = build_policy(name)
    limited = [str(w.message) for w in caught if "rotary" in str(w.message)]
    assert policy.codec.max_length == length
    assert limited == (
        [
            f"sequences are limited to {ORIGINAL} tokens, although the model allows 64: in longer sequences its rotary "
            "position embedding (dynamic or longrope) changes with the length, so that the probability of a token "
            "would depend on later tokens"
        ]
        if "longrope" in name or "two-kinds" in name
        else []
    )
    requests = [
        SampleRequest(random_ids(n, n), 4, length - n, 7 + n) for n in (4, ORIGINAL - 1, ORIGINAL, 20) if n < length
    ]
    results = TorchSampler(policy).sample(requests)
    assert max(len(r.prompt_ids) + len(c.token_ids) for r, cs in zip(requests, results, strict=True) for c in cs) == (
        length
    )
    assert largest_gap(policy, requests, results, 1.0) < 1e-4
    # The same with all sequences in one padded batch, whose longest sequence has the largest length.
    texts = [(r.prompt_ids, c) for r, cs in zip(requests, results, strict=True) for c in cs]
    token_ids = pad([(*prompt, *c.token_ids) for prompt, c in texts], torch.int64)
    rows = [[0] * len(prompt) + [1] * len(c.token_ids) for prompt, c in texts]
    with torch.no_grad():
        batched = token_logprobs(policy.model, token_ids, pad(rows, torch.bool), 1.0)[0]
    assert (batched - torch.tensor([x for _, c in texts for x in c.logprobs])).abs().max() < 1e-4


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (5.0, None), (None, 80), (5.0, 80)])
@pytest.mark.parametrize("trunk_length", [1, 50])
def test_attention_has_float32_scores_in_bfloat16(softcap: float | None, window: int | None, trunk_length: int) -> None:
    """With float32 scores, the error is 0.23% to 0.28% of the output; with rounded scores, 0.34% to 0.42%."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    B, Hkv, k, d, L = 50, 3, 64, 64, trunk_length
    tree = KVTree(torch.zeros(B, dtype=torch.int64), torch.full((B,), L), L)
    tree.trunk_keys[0], tree.trunk_values[0] = random(1, Hkv, L, d), random(1, Hkv, L, d)
    tree.length = k - 1
    query, keys, values = 2 * random(B, Hkv * 3, 1, d), random(B, Hkv, k, d), random(B, Hkv, k, d)
    out = _decode_attention(tree, 0, query, keys, values, d**-0.5, softcap, window).double()
    trunk = (tree.trunk_keys[0].expand(B, -1, -1, -1), tree.trunk_values[0].expand(B, -1, -1, -1))
    key, value = (
        torch.cat([a, b], 2)[:, :, -(window or 0) :].double().repeat_interleave(3, 1)
        for a, b in zip(trunk, (keys, values), strict=True)
    )
    scores = query.double() @ key.transpose(-1, -2) * d**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    exact = scores.softmax(-1) @ value
    assert (out - exact).norm() / exact.norm() < 0.003


@pytest.mark.parametrize("family", list(PLAIN))
def test_models_without_tree_support_fall_back_with_one_warning(family: str) -> None:
    policy = build_policy(family)
    requests = prompts_and_states(0.6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = TorchSampler(policy)
        results = sampler.sample(requests)
    messages = [str(w.message) for w in caught if "sampling recomputes" in str(w.message)]
    assert len(messages) == 1
    assert type(policy.model).__name__ in messages[0]
    assert not sampler.tree_attention
    assert largest_gap(policy, requests, results, 0.6) < 1e-4


def test_logprobs_in_bfloat16_differ_by_rounding_only(device: torch.device) -> None:
    policy = on(device, build_policy())
    policy.model.to(torch.bfloat16)
    sampler = TorchSampler(policy)
    assert sampler.tree_attention
    requests = prompts_and_states()
    assert largest_gap(policy, requests, sampler.sample(requests), 1.0) < 0.15


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2", "gpt-neo"])
@pytest.mark.filterwarnings("ignore:.*sampling recomputes")
def test_greedy_decoding_equals_generate(family: str) -> None:
    policy = build_policy(family)
    requests = [SampleRequest(random_ids(n, n), 1, 20, seed=n, temperature=0) for n in (3, 8, 15)]
    sampler = TorchSampler(policy)
    # Make the fifth token of the first completion an end-of-sequence token, so that it ends early.
    policy.codec = replace(policy.codec, eos_ids=(EOS, sampler.sample(requests)[0][0].token_ids[4]))
    for request, (completion,) in zip(requests, sampler.sample(requests), strict=True):
        prompt = torch.tensor([request.prompt_ids])
        generated = policy.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=list(policy.codec.eos_ids),
            pad_token_id=TOKENIZER.pad_token_id,
        )
        assert completion.token_ids == tuple(generated[0, prompt.shape[1] :].tolist())
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] in policy.codec.eos_ids else "length")
    assert len(sampler.sample(requests)[0][0].token_ids) <= 5


def test_a_sample_depends_only_on_its_request(llama: Policy) -> None:
    requests = prompts_and_states()
    sampler = TorchSampler(llama)
    together = tokens(sampler.sample(requests))
    assert [tokens(sampler.sample([request]))[0] for request in requests] == together
    assert tokens(sampler.sample(requests[::-1]))[::-1] == together
    others = [SampleRequest(random_ids(n, 50 + n), 2, 25, seed=n) for n in range(1, 12)]
    assert tokens(sampler.sample(others + requests))[len(others) :] == together
    for max_rows in (1, 5):
        assert tokens(TorchSampler(llama, max_rows=max_rows).sample(requests)) == together
    per_token = kv_bytes_per_token(llama.model)
    assert per_token == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, dimensions, bytes
    for kv_tokens in (70, 200):
        small = TorchSampler(llama, kv_memory=kv_tokens * per_token)
        assert tokens(small.sample(requests)) == together
    six_samples = sampler.sample([replace(request, num_samples=6) for request in requests])
    assert [completions[:3] for completions in tokens(six_samples)] == together


def test_keys_and_values_of_a_wave_stay_within_kv_memory(llama: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured as the size of the tensors, at every token of every wave."""
    sizes: list[int] = []
    append = KVTree.append

    def counting(tree: KVTree, *arguments: Any) -> Any:
        result = append(tree, *arguments)
        stores = (tree.trunk_keys, tree.trunk_values, tree.branch_keys, tree.branch_values)
        sizes.append(sum(tensor.nbytes for store in stores for tensor in store.values()))
        return result

    monkeypatch.setattr(KVTree, "append", counting)
    requests = [SampleRequest(random_ids(n, n), 3, 12, seed=n) for n in range(3, 20, 2)]
    per_token = kv_bytes_per_token(llama.model)
    for kv_tokens in (32, 80, 200, 10_000):
        sampler = TorchSampler(llama, kv_memory=kv_tokens * per_token)
        sizes.clear()  # the constructor has tried out the tree attention of the model
        sampler.sample(requests)
        assert 0.5 < max(sizes) / (min(kv_tokens, 9 * 19 + 27 * 12) * per_token) <= 1


def test_a_sequence_that_does_not_fit_into_kv_memory_is_refused(llama: Policy) -> None:
    requests = [SampleRequest(random_ids(9, 0), 1, 20, seed=0), SampleRequest(random_ids(11, 1), 1, 20, seed=1)]
    small = TorchSampler(llama, kv_memory=30 * kv_bytes_per_token(llama.model))
    assert len(small.sample(requests[:1])) == 1
    with pytest.raises(UserError, match=r"needs keys and values of 31 tokens, but rollouts.kv_memory holds 30"):
        small.sample(requests)


def test_samples_of_one_request_and_of_other_seeds_differ(llama: Policy) -> None:
    request = SampleRequest(random_ids(6, 0), 50, 24, seed=3)
    sampler = TorchSampler(llama)
    first_seed, second_seed = tokens(sampler.sample([request, replace(request, seed=4)]))
    assert len(set(first_seed)) > 45
    assert len({ids[0] for ids in first_seed}) > 10
    # At most a few short samples are equal by chance.
    assert len(set(first_seed) & set(second_seed)) < 5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_have_the_distribution_of_the_softmax(llama_on_device: Policy, temperature: float) -> None:
    llama = llama_on_device
    request = SampleRequest(random_ids(6, 0), 20_000, 1, seed=0, temperature=temperature)
    (completions,) = TorchSampler(llama).sample([request])
    counts = np.bincount([c.token_ids[0] for c in completions], minlength=len(TOKENIZER))
    with torch.no_grad():
        logits = llama.model(torch.tensor([request.prompt_ids], device=llama.device)).logits[0, -1].double().cpu()
    assert chi_square(counts, (logits / temperature).softmax(-1).numpy()) < chi_square_limit(len(counts) - 1)
    assert chi_square(counts, (logits / (1.6 - temperature)).softmax(-1).numpy()) > 10 * len(counts)
    expected = (logits / temperature).log_softmax(-1)
    assert all(abs(c.logprobs[0] - expected[c.token_ids[0]]) < 1e-5 for c in completions[:500])


def test_later_tokens_are_drawn_independently_of_the_first(llama: Policy) -> None:
    request = SampleRequest(random_ids(6, 0), 20_000, 3, seed=1)
    ids = tokens(TorchSampler(llama).sample([request]))[0]
    likely = np.bincount([row[0] for row in ids]).argmax()
    seconds = [row[1] for row in ids if row[0] == likely]
    thirds = [row[2] for row in ids if len(row) == 3]
    with torch.no_grad():
        logits = llama.model(torch.tensor([[*request.prompt_ids, likely]])).logits[0, -1].double()
    assert len(seconds) > 1000
    counts = np.bincount(seconds, minlength=len(TOKENIZER))
    assert chi_square(counts, logits.softmax(-1).numpy()) < chi_square_limit(len(counts) - 1)
    assert len(set(thirds)) > 40


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Pearson's statistic; cells with expected counts below five are combined into one."""
    expected = counts.sum() * probabilities
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    return float(((observed - expected) ** 2 / expected).sum())


def chi_square_limit(degrees: int) -> float:
    """The 99.9% quantile of chi-square, by the approximation of Wilson and Hilferty."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * spread**0.5) ** 3


def test_draw_never_returns_a_token_of_probability_zero() -> None:
    rng = np.random.default_rng(0)
    uniforms = np.array([0.0, 2.0**-53, 0.5, 1 - 2.0**-24, 1 - 2.0**-30, 1 - 2.0**-53])
    for size in (2, 5, 50, 2000):
        for _ in range(20):
            row = rng.normal(size=size) * 3
            row[rng.random(size) < 0.6] = -np.inf
            row[[0, -1]] = -np.inf
            row[rng.integers(size)] = 1.0
            logits = torch.from_numpy(np.tile(row, (len(uniforms), 1))).float()
            drawn, logprobs = (x.numpy() for x in draw(logits, 0.7, torch.from_numpy(uniforms)))
            possible = np.flatnonzero(np.isfinite(row))
            assert set(drawn) <= set(possible)
            assert np.isfinite(logprobs).all()
            assert drawn[0] == possible[0]
            assert (np.diff(drawn) >= 0).all()


def test_draw_inverts_the_cumulative_distribution(device: torch.device) -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]], device=device).log().expand(8, 4)
    uniforms = np.array([0.0, 0.0999, 0.1001, 0.2999, 0.3001, 0.5999, 0.6001, 0.9999])
    drawn, logprobs = (x.cpu() for x in draw(logits, 1.0, torch.from_numpy(uniforms).to(device)))
    assert drawn.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert np.exp(logprobs) == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4])
    # At temperature 1/2 probabilities are squared: 1, 4, 9 and 16 thirtieths.
    drawn, logprobs = (x.cpu() for x in draw(logits, 0.5, torch.from_numpy(uniforms).to(device)))
    assert drawn.tolist() == [0, 1, 1, 2, 2, 3, 3, 3]
    assert np.exp(logprobs) == pytest.approx(np.array([1, 4, 4, 9, 9, 16, 16, 16]) / 30)


def test_draw_at_temperature_zero_selects_the_most_likely_token() -> None:
    drawn, logprobs = draw(torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]]), 0, torch.tensor([0.99, 0.0]))
    assert drawn.tolist() == [1, 0]
    assert logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("tree_attention", [True, False])
def test_completions_include_eos_if_and_only_if_it_was_sampled(llama_on_device: Policy, tree_attention: bool) -> None:
    sampler = TorchSampler(llama_on_device)
    sampler.tree_attention = tree_attention
    completions = sampler.sample([SampleRequest(random_ids(5, 3), 60, 24, seed=1)])[0]
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    for completion in completions:
        ended = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if ended else "length")
        assert EOS not in completion.token_ids[:-1]
        assert ended or len(completion.token_ids) == 24
        assert len(completion.logprobs) == len(completion.token_ids)


def test_each_request_has_its_own_budget(llama: Policy) -> None:
    prompt = random_ids(5, 4)
    budgets = [0, 1, 2, 13, 0, 24]
    results = TorchSampler(llama).sample([SampleRequest(prompt, 4, n, seed=8) for n in budgets])
    longest = tokens(results)[-1]
    for budget, completions in zip(budgets, results, strict=True):
        assert [c.token_ids for c in completions] == [ids[:budget] for ids in longest]
        assert all(c.finish_reason == "stop" for c in completions if len(c.token_ids) < budget)
    assert results[0] == [Completion((), (), "length")] * 4


def test_empty_requests_return_empty_results(llama: Policy) -> None:
    sampler = TorchSampler(llama)
    assert sampler.sample([]) == []
    assert sampler.sample([SampleRequest((5,), 0, 4, 0)]) == [[]]
    assert sampler.sample([SampleRequest((5,), 1, 0, 0)]) == [[Completion((), (), "length")]]


def stopped(ids: tuple[int, ...], stop: Sequence[str], decode: Callable[[Sequence[int]], str]) -> tuple[int, ...]:
    """The ids up to the first token with which the text contains a stop string, by decoding every prefix."""
    for end in range(1, len(ids) + 1):
        if any(text in decode(ids[:end]) for text in stop):
            return ids[:end]
    return ids


def test_stop_strings_end_a_completion_and_stay_in_it(llama_on_device: Policy) -> None:
    llama = llama_on_device
    request = SampleRequest(random_ids(5, 5), 60, 24, seed=2)
    free = tokens(TorchSampler(llama).sample([request]))[0]
    full_length = [llama.codec.token_texts(ids) for ids in free if len(ids) == 24]
    across_three = "".join(full_length[0][4:7])
    inside_two = "".join(full_length[1][9:11])[1:-1] or full_length[1][9]
    for stop in [("a",), (across_three,), (inside_two,), (across_three, inside_two, "7"), ("\n",)]:
        completions = TorchSampler(llama).sample([replace(request, stop=stop)])[0]
        expected = [stopped(ids, stop, llama.codec.decode) for ids in free]
        assert [c.token_ids for c in completions] == expected
        assert expected != free
        for completion in completions:
            ended = any(text in llama.codec.decode(completion.token_ids) for text in stop)
            assert completion.finish_reason == ("stop" if ended or completion.token_ids[-1] == EOS else "length")


def test_a_stop_string_in_the_prompt_has_no_effect(llama: Policy) -> None:
    prompt = llama.codec.encode_prompt("ab####\nab")
    request = SampleRequest(prompt, 40, 24, seed=2)
    free = tokens(TorchSampler(llama).sample([request]))[0]
    completions = TorchSampler(llama).sample([replace(request, stop=("ab", "#"))])[0]
    assert [c.token_ids for c in completions] == [stopped(ids, ("ab", "#"), llama.codec.decode) for ids in free]
    assert max(len(c.token_ids) for c in completions) > 10


def test_new_weights_are_used_at_once(device: torch.device) -> None:
    """On a GPU, a captured step of the first call would have old copies of merged weights."""
    policy = on(device, build_policy())
    requests = prompts_and_states()
    sampler = TorchSampler(policy)
    before = tokens(sampler.sample(requests))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    after = sampler.sample(requests)
    assert tokens(after) != before
    assert tokens(after) == tokens(TorchSampler(policy).sample(requests))
    assert largest_gap(policy, requests, after, 1.0) < 1e-4


def test_completions_have_the_version_of_the_sampler(llama: Policy) -> None:
    """The sampler shares the policy's memory, so `update_weights` stores the version and does not read the tensors."""

    def unread_weights() -> Iterator[tuple[str, Any]]:
        raise AssertionError("the tensors were read")
        yield

    requests = [*prompts_and_states(), SampleRequest((5,), 2, 0, 0)]
    sampler = TorchSampler(llama)
    assert sampler.version == 0
    before = flatten(sampler.sample(requests))
    sampler.update_weights(3, unread_weights)
    after = flatten(sampler.sample(requests))
    assert sampler.version == 3
    assert {c.version for c in before} == {0} and {c.version for c in after} == {3}
    assert [replace(c, version=0) for c in after] == before


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_samples_depend_on_their_index(llama: Policy, temperature: float) -> None:
    """Requests for samples 0 to 3 and 4 to 7 of a seed in one call give bit-identically the samples of one request."""
    sampler = TorchSampler(llama)
    whole = SampleRequest(random_ids(6, 0), 8, 24, seed=3, temperature=temperature)
    first, second = replace(whole, num_samples=4), replace(whole, num_samples=4, first_sample=4)
    (expected,) = sampler.sample([whole])
    a, b = sampler.sample([first, second])
    assert a + b == expected
    assert sampler.sample([second, first]) == [b, a]
    separate = [*sampler.sample([first]), *sampler.sample([second])]
    assert tokens(separate) == tokens([a, b])
    for completion, expected_completion in zip(flatten(separate), expected, strict=True):
        assert completion.logprobs == pytest.approx(expected_completion.logprobs, abs=1e-5)
    if temperature:
        assert len({c.token_ids for c in expected}) == 8
    (last,) = sampler.sample([replace(whole, num_samples=1, first_sample=7)])
    assert last[0].token_ids == expected[7].token_ids


def test_requests_of_different_kinds_in_one_call_equal_separate_calls(llama: Policy) -> None:
    """One call with several temperatures and stop strings is bit-identical to one call per combination."""
    kinds: list[tuple[float, tuple[str, ...]]] = [(1.0, ()), (0.0, ()), (0.6, ()), (0.6, ("a", "7")), (1.0, ("\n",))]
    requests = [replace(r, temperature=t, stop=stop) for r in prompts_and_states() for t, stop in kinds]
    assert len({(r.temperature, r.stop) for r in requests[:5]}) == 5  # neighbouring requests differ
    for sampler in (TorchSampler(llama), TorchSampler(llama, max_rows=4)):
        together = sampler.sample(requests)
        for n, (temperature, stop) in enumerate(kinds):
            one_kind = requests[n :: len(kinds)]
            assert {(r.temperature, r.stop) for r in one_kind} == {(temperature, stop)}
            assert together[n :: len(kinds)] == sampler.sample(one_kind)
            assert largest_gap(llama, one_kind, together[n :: len(kinds)], temperature) < 1e-4 or not temperature
    greedy = together[1 :: len(kinds)]
    assert all(len(set(ids)) == 1 for ids in tokens(greedy))
    assert {x for c in flatten(greedy) for x in c.logprobs} == {0.0}
    free, ended = tokens(together[2 :: len(kinds)]), tokens(together[3 :: len(kinds)])
    assert free != ended
    for request, free_ids, ended_ids in zip(prompts_and_states(), free, ended, strict=True):
        assert request.response_tokens == 0
        assert ended_ids == [stopped(ids, ("a", "7"), llama.codec.decode) for ids in free_ids]


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2"])
def test_removing_finished_rows_does_not_change_the_others(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build_policy(family)
    requests = [replace(r, max_new_tokens=1 + 5 * i, num_samples=2 + i) for i, r in enumerate(prompts_and_states())]
    num_rows: list[int] = []
    keep = KVTree.keep

    def counted(tree: KVTree, rows: torch.Tensor) -> None:
        num_rows.append(len(rows))
        keep(tree, rows)

    monkeypatch.setattr(KVTree, "keep", counted)
    sampler = TorchSampler(policy)
    tree = sampler.sample(requests)
    assert len(num_rows) > 2
    assert num_rows == sorted(num_rows, reverse=True)
    sampler.tree_attention = False
    plain = sampler.sample(requests)
    assert tokens(tree) == tokens(plain)
    assert [c.finish_reason for c in flatten(tree)] == [c.finish_reason for c in flatten(plain)]
    for a, b in zip(flatten(tree), flatten(plain), strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_request_for_no_samples_does_not_change_the_others(llama: Policy) -> None:
    requests = [SampleRequest(random_ids(4, seed), 2, 6, seed) for seed in range(3)]
    sampler = TorchSampler(llama)
    alone = sampler.sample(requests)
    for index in range(4):
        empty = SampleRequest(random_ids(5, 9), 0, 6, 9)
        results = sampler.sample([*requests[:index], empty, *requests[index:]])
        assert results[index] == []
        assert tokens([*results[:index], *results[index + 1 :]]) == tokens(alone)


def test_a_branch_can_exceed_its_first_memory_block(llama: Policy) -> None:
    requests = [SampleRequest(random_ids(3, seed), 8, 60, seed, temperature=0.6) for seed in range(3)]
    results = TorchSampler(llama).sample(requests)
    assert max(len(c.token_ids) for c in flatten(results)) > 40
    assert largest_gap(llama, requests, results, 0.6) < 1e-4


def test_a_finished_row_uses_no_position_beyond_the_context() -> None:
    # One row ends at the last position of the model while rows with a shorter prefix are still decoded.
    policy = build_policy("gpt2", n_positions=LENGTH)
    state = random_ids(LENGTH - 2, 0)
    requests = [SampleRequest(state[:3], 12, LENGTH - 3, seed=0), SampleRequest(state, 1, 2, seed=1)]
    results = TorchSampler(policy).sample(requests)
    assert max(len(c.token_ids) for c in results[0]) == LENGTH - 3
    assert largest_gap(policy, requests, results, 1.0) < 1e-4


def test_sampling_does_not_change_the_model(llama: Policy) -> None:
    token_ids = torch.tensor([random_ids(12, 9)])
    with torch.no_grad():
        before = llama.model(token_ids).logits
        implementation = llama.model.config._attn_implementation
        TorchSampler(llama).sample(prompts_and_states())
        assert llama.model.config._attn_implementation == implementation
        assert torch.equal(llama.model(token_ids).logits, before)
