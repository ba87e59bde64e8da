"""Packed rows: logits and gradients are those of each sequence alone, for windows, soft caps and shared prefixes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PretrainedConfig,
)

from vineppo.model.packing import common_prefix, pack, packed_batches, packed_mode, packing_supported

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    # Windows that are shorter than the sequences and than the shared prompt.
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "gemma2": Gemma2Config(**SHAPE, sliding_window=5, head_dim=8, attn_logit_softcapping=2.0),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    ),
}


def build(config: PretrainedConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.double().eval()


def tokens(count: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def tree() -> list[tuple[int, ...]]:
    """A prompt with three responses, of which two share their first tokens, the prompt alone, and two other prompts."""
    prompt, start = tokens(9, 1), tokens(4, 2)
    return [
        prompt + tokens(12, 3),
        prompt + start + tokens(3, 4),
        prompt + start + tokens(5, 5),
        prompt,
        tokens(10, 6),
        tokens(25, 7),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["sorted", "as it is", "equal lengths"])
def test_logits_and_gradients_are_those_of_each_sequence(family: str, order: str) -> None:
    model, sequences = build(FAMILIES[family]), tree()
    if order == "sorted":
        sequences = sorted(sequences)
    elif order == "equal lengths":
        sequences = [tokens(11, seed) for seed in range(3)]
    assert packing_supported(model)
    weights = [torch.randn(len(s), 60, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(sequences)]

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    packing = pack(sequences)
    with packed_mode(model):
        packed = model(
            input_ids=packing.token_ids, position_ids=packing.position_ids, packing=packing, use_cache=False
        ).logits[0]  # (L, V)
    rows = [packed[path] for path in packing.paths]
    alone = [model(input_ids=torch.tensor([s]), use_cache=False).logits[0] for s in sequences]
    for row, expected in zip(rows, alone, strict=True):
        assert torch.allclose(row, expected, rtol=0, atol=1e-5)
    expected = gradient(sum((a * w).sum() for a, w in zip(alone, weights, strict=True)))
    found = gradient(sum((r * w).sum() for r, w in zip(rows, weights, strict=True)))
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_common_prefix_is_packed_once() -> None:
    sequences = sorted(tree())
    packing = pack(sequences)
    # 9 prompt tokens, 4 shared response tokens, and 12 + 3 + 5 + 10 + 25 tokens of one sequence each.
    assert packing.token_ids.shape == (1, 9 + 4 + 12 + 3 + 5 + 10 + 25)
    for sequence, path in zip(sequences, packing.paths, strict=True):
        assert tuple(packing.token_ids[0, path].tolist()) == sequence
        assert packing.position_ids[0, path].tolist() == list(range(len(sequence)))
    assert common_prefix((1, 2, 3), (1, 2, 4, 5)) == 2 and common_prefix((), (1,)) == 0
    assert common_prefix((1, 2), (1, 2, 3)) == 2 and common_prefix((7,), (1,)) == 0


def test_a_short_common_prefix_is_not_shared() -> None:
    """Otherwise prompts that only start with the same token would need masks in the attention."""
    sequences = [(7, *tokens(19, 1)), (7, *tokens(19, 2))]
    packing = pack(sequences)
    assert packing.token_ids.shape == (1, 40) and packing.blocks[0].whole and packing.blocks[0].causal
    assert [len(group) for group in packed_batches(sequences, 39)] == [1, 1]


@pytest.mark.parametrize("limit", [1, 30, 45, 1000])
def test_micro_batches_count_packed_tokens(limit: int) -> None:
    sequences = tree()
    groups = packed_batches(sequences, limit)
    assert sorted(itertools.chain(*groups)) == list(range(len(sequences)))
    sizes = [pack([sequences[i] for i in group]).token_ids.numel() for group in groups]
    assert all(size <= limit or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
    if limit == 45:  # padded, the second micro-batch has 84 tokens
        assert groups == [[5, 3], [0, 1, 2, 4]] and sizes == [34, 43]
    if limit == 1000:
        assert len(groups) == 1


def test_models_with_other_states_are_not_supported() -> None:
    mamba = MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert not packing_supported(AutoModelForCausalLM.from_config(mamba).eval())
