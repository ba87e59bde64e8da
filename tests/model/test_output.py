"""Log-probabilities in chunks: values and gradients are those of all logits at once, with little memory."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PretrainedConfig

from tests.model.test_packing import SHAPE
from vineppo.model import logits, output
from vineppo.model.sequences import build_sequences, mode
from vineppo.types import Alternative

FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25, pad_token_id=None),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
}
IDS = [(5, 9, 2, 11, 40, 3, 17), (8, 1, 33, 6)]
MASKS = [(0, 0, 1, 1, 0, 1, 1), (0, 1, 1, 1)]
OTHERS = [(Alternative(0, 7, 0.0), Alternative(3, 50, 0.0), Alternative(3, 51, 0.0)), (Alternative(1, 33, 0.0),)]


def build(family: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES[family])
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("chunk", "packed"), [(1, True), (3 * 60, False), (1 << 20, True)])
def test_chunks_give_the_same_scores_and_gradients(
    monkeypatch: pytest.MonkeyPatch, family: str, chunk: int, packed: bool
) -> None:
    model = build(family)
    monkeypatch.setattr(logits, "CHUNKED_FROM", 0)
    monkeypatch.setattr(output, "CHUNK", chunk)
    sequences = build_sequences(IDS, MASKS, OTHERS, packed, torch.device("cpu"))
    factors = torch.randn(7 + 4, generator=torch.Generator().manual_seed(1))

    def outcome(chunked: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
        with mode(model, packed):
            scores = logits.sequence_scores(model, sequences, 0.7, entropies=True, variances=True, chunked=chunked)
        assert scores.entropies is not None and scores.variances is not None
        loss = (scores.logprobs * factors).sum() + (scores.entropies * factors[:7].square()).sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        numbers = [scores.logprobs.detach(), scores.entropies.detach(), scores.variances]
        return numbers, torch.cat([g.flatten() for g in gradients])

    (numbers, gradient), (expected_numbers, expected) = outcome(True), outcome(False)
    assert output.output_of(model) is not None
    for found, wanted in zip(numbers, expected_numbers, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert (gradient - expected).abs().max() < 1e-6 * expected.abs().max()


def test_output_layers_that_are_more_than_a_weight_are_refused() -> None:
    hooked = build("llama")
    hooked.lm_head.register_forward_hook(lambda _module, _inputs, result: result)
    assert output.output_of(hooked) is None
    # The configuration does not describe what this model does with its logits.
    other = build("granite")
    other.config.logits_scaling = 1.0
    forward = other.forward

    def scaled(**inputs: Any) -> Any:
        result = forward(**inputs)
        result.logits = result.logits * 3
        return result

    other.forward = scaled
    assert output.output_of(other) is None
    peft = pytest.importorskip("peft")
    adapted = build("llama")
    peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["lm_head"]))
    assert output.output_of(adapted) is None


def test_saved_memory_does_not_grow_with_the_vocabulary() -> None:
    """Counts the numbers that the forward pass saves for the backward pass, apart from the weight."""
    saved: dict[bool, dict[int, int]] = {True: {}, False: {}}
    N, H = 64, 8
    for vocabulary in (100, 10_000):
        weight, hidden = torch.randn(vocabulary, H, requires_grad=True), torch.randn(N, H, requires_grad=True)
        targets, none = torch.arange(N), torch.zeros(0, dtype=torch.int64)
        for chunked in (True, False):
            sizes: dict[int, int] = {}

            def count(tensor: torch.Tensor, sizes: dict[int, int] = sizes, weight: Any = weight) -> torch.Tensor:
                if tensor.data_ptr() != weight.data_ptr():
                    sizes[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                if chunked:
                    layer = output.Output(weight, None)
                    result = output.chunked_scores(layer, hidden, targets, (none, none), 1.0)[0]
                else:
                    result = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None])
            saved[chunked][vocabulary] = sum(sizes.values())
            result.sum().backward()
    assert saved[True][100] == saved[True][10_000] <= N * (H + 4)
    assert saved[False][10_000] >= N * 10_000


def test_a_chunk_has_a_limited_number_of_logits() -> None:
    parts = list(output._chunks(1000, 49_152))
    assert [part.stop - part.start for part in parts[:-1]] == [output.CHUNK // 49_152] * (len(parts) - 1)
    assert parts[0].start == 0 and parts[-1].stop == 1000
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
