"""The parts of benchmarks/llama.py that need no llama.cpp: the GGUF file, sampling from logits, sharing of prefixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.llama import BLOCK, Trunk, gguf_tensors, interleaved, read_weights, sample_rows, trunks_of, write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def small_llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    """Return a Llama with random weights, grouped heads, and a head size that is not hidden size / heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_reads_the_same_weights_from_the_gguf_file(tmp_path: Path, dtype: str, tied: bool) -> None:
    """The reader of transformers is another implementation, which reverses the order of the rows of q and k."""
    pytest.importorskip("gguf")
    model = small_llama(getattr(torch, dtype), tied)
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert loaded.config.rope_parameters["rope_theta"] == 5000
    assert loaded.config.rms_norm_eps == pytest.approx(1e-5)
    # The reader does not know the head size of this model, so the weights are compared and no logits.
    for name, weight in model.model.layers.state_dict().items():
        assert torch.equal(loaded.model.layers.state_dict()[name], weight.float()), name
    ids = torch.arange(40)[None]
    assert torch.equal(loaded.get_input_embeddings()(ids), model.get_input_embeddings()(ids).float())
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_interleaved_rows_rotate_neighbours_by_the_same_angles() -> None:
    """The product of a rotated query and a rotated key must not depend on the order of the pairs."""
    generator = np.random.default_rng(0)
    heads, size, width = 3, 8, 5
    x, y = generator.normal(size=(2, width))
    query, key = generator.normal(size=(2, heads * size, width))
    angles = {position: position * 10.0 ** -np.arange(size // 2) for position in (3, 7)}

    def rotated(vector: np.ndarray, position: int, first: slice, second: slice) -> np.ndarray:
        out, a, b = vector.copy(), vector[:, first], vector[:, second]
        cos, sin = np.cos(angles[position]), np.sin(angles[position])
        out[:, first], out[:, second] = a * cos - b * sin, a * sin + b * cos
        return out

    halves, neighbours = (slice(0, size // 2), slice(size // 2, size)), (slice(0, size, 2), slice(1, size, 2))
    scores = []
    for order, pairs in ((lambda w: w, halves), (lambda w: interleaved(w, heads), neighbours)):
        q, k = ((order(w) @ v).reshape(heads, size) for w, v in ((query, x), (key, y)))
        scores.append((rotated(q, 7, *pairs) * rotated(k, 3, *pairs)).sum(1))
    assert scores[0] == pytest.approx(scores[1], abs=1e-12)


def test_weights_of_bfloat16_are_read_exactly(tmp_path: Path) -> None:
    model = small_llama(torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert set(weights) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert np.array_equal(weights[name], weight.float().numpy())


def test_a_model_with_biases_is_refused() -> None:
    config = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.bias is not one of a Llama model"):
        list(gguf_tensors(config, {"model.layers.0.mlp.up_proj.bias": np.zeros(4)}))


@pytest.mark.parametrize("vocabulary", [5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_sampling_inverts_the_cumulative_probabilities(vocabulary: int) -> None:
    generator = np.random.default_rng(vocabulary)
    logits = generator.normal(size=(400, vocabulary)).astype(np.float32) * 2
    uniforms = generator.random(400)
    weights = np.exp(logits.astype(np.float64))
    cumulative = weights.cumsum(1) / weights.sum(1, keepdims=True)
    expected = (cumulative <= uniforms[:, None]).sum(1)
    tokens = sample_rows(logits.copy(), uniforms)
    # Rounding may move a number that lies on the border of two tokens.
    distance = np.abs(np.take_along_axis(cumulative, np.minimum(tokens, expected)[:, None], 1)[:, 0] - uniforms)
    assert np.all((tokens == expected) | (distance < 1e-5))
    assert (tokens == expected).mean() > 0.99


def test_the_ends_of_the_unit_interval_give_tokens_of_the_vocabulary() -> None:
    logits = np.zeros((2, BLOCK + 3), np.float32)
    assert sample_rows(logits, np.array([0.0, 1 - 2**-53])).tolist() == [0, BLOCK + 2]


def test_a_prefix_of_a_longer_prefix_shares_its_trunk() -> None:
    prefixes = [[1, 2], [1, 2, 3, 4], [1, 3], [1]]
    lengths = [[5, 7], [2], [4, 0], [9]]
    assert trunks_of(prefixes, lengths) == [
        Trunk((1, 2, 3, 4), ((1, 9), (2, 7), (2, 5), (4, 2))),
        Trunk((1, 3), ((2, 4),)),
    ]
