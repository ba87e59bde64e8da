"""Packed weights give the same products up to 16-bit rounding, and the model is unchanged afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.sampling.test_sampler import build_policy, largest_gap, prompts_and_states, random_ids, tokens
from vineppo.sampling.torch.packed import packed_weights
from vineppo.sampling.torch.sampler import TorchSampler

ROUNDING = 2.0**-8
"""Relative rounding error of a bfloat16 number."""

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no 16-bit products in oneDNN"
)


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("family", ["llama", "llama-tied-multi-query", "qwen2", "gpt-neox"])
def test_every_product_is_exact_except_for_rounding_of_the_result(family: str) -> None:
    model = build_policy(family).model.to(torch.bfloat16)
    layers = linears(model)
    assert len(layers) > 8
    assert any(layer.bias is not None for layer in layers) == (family in ("qwen2", "gpt-neox"))
    for layer in layers:
        if layer.bias is not None:
            nn.init.normal_(layer.bias)
    with packed_weights(model), torch.no_grad():
        for i, layer in enumerate(layers):
            assert "forward" in layer.__dict__
            for rows in ((1, 1), (3, 5), (70, 1)):
                generator = torch.Generator().manual_seed(i)
                x = torch.randn(*rows, layer.in_features, generator=generator).to(torch.bfloat16)
                exact = x.double() @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())
                torch.testing.assert_close(layer(x).double(), exact, rtol=ROUNDING, atol=1e-5)
    assert all("forward" not in layer.__dict__ for layer in layers)


def test_patched_layers_are_not_packed_and_all_layers_are_restored_after_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_policy().model.to(torch.bfloat16)
    changed, *others = linears(model)
    monkeypatch.setattr(changed, "forward", lambda x: x.new_zeros(*x.shape[:-1], changed.out_features))
    with pytest.raises(ZeroDivisionError), packed_weights(model):
        assert not changed(torch.ones(2, changed.in_features, dtype=torch.bfloat16)).any()
        assert all("forward" in layer.__dict__ for layer in others)
        raise ZeroDivisionError
    assert "forward" in changed.__dict__
    assert all("forward" not in layer.__dict__ for layer in others)


def test_float32_layers_are_not_packed() -> None:
    model = build_policy().model
    with packed_weights(model):
        assert all("forward" not in layer.__dict__ for layer in linears(model))


def test_a_16_bit_sampler_uses_new_weights_at_once() -> None:
    policy = build_policy()
    policy.model.to(torch.bfloat16)
    requests = prompts_and_states()
    sampler = TorchSampler(policy)
    before = tokens(sampler.sample(requests))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = sampler.sample(requests)
    assert tokens(after) != before
    assert largest_gap(policy, requests, after, 1.0) < 0.15
    assert tokens(after) == tokens(TorchSampler(policy).sample(requests))


def test_the_model_has_gradients_after_sampling() -> None:
    policy = build_policy()
    policy.model.to(torch.bfloat16)
    TorchSampler(policy).sample(prompts_and_states())
    policy.model(torch.tensor([random_ids(9, 0)])).logits.float().logsumexp(-1).sum().backward()
    gradients = [layer.weight.grad for layer in linears(policy.model)]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
