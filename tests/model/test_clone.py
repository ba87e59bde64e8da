"""Clones compute the same bits as the original, and share the requested tensors, for several model families."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vineppo.config.schema import ModelConfig
from vineppo.model.clone import clone_model
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.lora import merged_weights
from vineppo.model.modes import with_checkpointing, without_dropout
from vineppo.model.policy import Policy, Reference
from vineppo.model.tiny import build_tokenizer
from vineppo.types import UserError

# Warnings of peft: GPT-2's layers are transposed, and the experts of Mixtral get no adapters by default.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word",
    "ignore:Setting `save_embedding",
    "ignore:fan_in_fan_out is set",
    "ignore:The following .*_pattern keys",
)

SIZE: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {**SIZE, "tie_word_embeddings": True}),
    "llama-untied": ("llama", {**SIZE, "tie_word_embeddings": False}),
    "llama-yarn": ("llama", {**SIZE, "rope_scaling": YARN}),
    "qwen2": ("qwen2", SIZE),
    "qwen3": ("qwen3", {**SIZE, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**SIZE, "query_pre_attn_scalar": 8, "sliding_window": 5, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**SIZE, "query_pre_attn_scalar": 8, "sliding_window": 5}),
    "gpt2": ("gpt2", {"vocab_size": 37, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", {**SIZE, "tie_word_embeddings": False}),
    "mistral-window": ("mistral", {**SIZE, "sliding_window": 5}),
    "mixtral": ("mixtral", {**SIZE, **EXPERTS}),
}


def build_model(family: str, **changes: Any) -> Any:
    model_type, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **options, bos_token_id=None, eos_token_id=1, pad_token_id=0)
        return without_dropout(AutoModelForCausalLM.from_config(config, **changes))


def ids() -> torch.Tensor:
    return torch.randint(2, 37, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), use_cache=False).logits


def adapted(model: Any, **settings: Any) -> Any:
    """Add adapters with random weights to a model; returns the peft model."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        settings = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
        adapters = peft.get_peft_model(model, peft.LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert "lora_" in name or "modules_to_save" in name
                parameter.data = torch.randn_like(parameter) / 8
    without_dropout(model)
    return adapters


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def assert_same_state(clone: nn.Module, model: nn.Module) -> None:
    """The clone has the same names, bits, dtypes, tied weights, trained weights and modes as copy.deepcopy."""
    cloned, original, expected = tensors(clone), tensors(model), tensors(copy.deepcopy(model))
    assert list(cloned) == list(original)
    for name, tensor in cloned.items():
        assert torch.equal(tensor, expected[name]) and tensor.dtype == expected[name].dtype
        assert tensor.device == expected[name].device and tensor.is_leaf
        assert tensor.requires_grad == original[name].requires_grad and type(tensor) is type(expected[name])

    def ties(of: dict[str, torch.Tensor]) -> list[list[str]]:
        return [[other for other in of if of[other] is of[name]] for name in of]

    assert ties(cloned) == ties(expected)
    assert list(clone.state_dict()) == list(model.state_dict())
    assert [module.training for module in clone.modules()] == [module.training for module in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_clone_computes_the_same_bits_with_separate_weights(family: str, dtype: torch.dtype) -> None:
    model = build_model(family).to(dtype)
    expected, state = logits(model), torch.get_rng_state()
    clone = clone_model(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(clone) is type(model) and clone.config is not model.config
    assert clone.config.to_dict() == model.config.to_dict()
    assert clone.generation_config == model.generation_config is not clone.generation_config
    assert_same_state(clone, model)
    assert torch.equal(logits(clone), expected)
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(model).values()}
    assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors(clone).values()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    assert torch.equal(logits(clone), expected) and not torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_adapters_are_copied_and_frozen_weights_are_shared(family: str) -> None:
    model = build_model(family)
    adapters = adapted(model)
    expected, state = logits(model), torch.get_rng_state()
    with adapters.disable_adapter():
        without = logits(model)
    clone = clone_model(model, share=[p for p in model.parameters() if not p.requires_grad])
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state(clone, model)
    original = dict(model.named_parameters())
    for name, parameter in clone.named_parameters():
        assert (parameter is original[name]) == ("lora_" not in name)
    assert torch.equal(logits(clone), expected) and not torch.equal(expected, without)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert torch.equal(logits(model), without) and torch.equal(logits(clone), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.3, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 1}},
        {"target_modules": r"model\.layers\.1\..*_proj", "bias": "none"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ],
    ids=str,
)
def test_other_kinds_of_adapters_are_cloned_and_merged(settings: dict[str, Any]) -> None:
    model = build_model("llama-untied")
    adapters = adapted(model, **settings)
    assert_same_state(clone_model(model), model)
    assert torch.equal(logits(clone_model(model)), logits(model))
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    merged = dict(merged_weights(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    expected = copy.deepcopy(adapters).merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in merged)


def test_the_active_one_of_two_adapters_is_cloned_and_merged() -> None:
    peft = pytest.importorskip("peft")
    model = build_model("llama-tied")
    adapters = adapted(model)
    adapters.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapters.set_adapter("second")
    clone = clone_model(model)
    assert_same_state(clone, model)
    assert torch.equal(logits(clone), logits(model))
    expected = copy.deepcopy(adapters).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged_weights(model))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_policy_with_adapters_is_saved_as_peft_merges_it(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    adapters = adapted(model)
    policy = Policy(model, Codec(build_tokenizer(), eos_ids=(1,)), adapters)
    policy.save(tmp_path / "final")
    merged = copy.deepcopy(adapters).merge_and_unload()
    merged.save_pretrained(tmp_path / "expected")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        files = [hashlib.sha256((tmp_path / place / name).read_bytes()).digest() for place in ("final", "expected")]
        assert files[0] == files[1], name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert torch.equal(logits(again), logits(merged))
    assert (logits(again) - logits(model)).abs().max() < 1e-4
    assert (tmp_path / "final/adapter/adapter_model.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "final").glob("*model*")) == ["model.safetensors"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_and_gradient_checkpointing_are_preserved(attention: str) -> None:
    model = without_dropout(with_checkpointing(build_model("llama-tied", attn_implementation=attention)))
    clone = clone_model(model)
    assert clone.config._attn_implementation == attention
    assert clone.is_gradient_checkpointing and clone.model.layers[0].training and not clone.training
    calls = [0, 0]
    for i, one in enumerate((model, clone)):
        one.model.layers[0].mlp.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        one(input_ids=ids(), use_cache=False).logits.logsumexp(-1).sum().backward()
    assert calls == [2, 2]
    gradients = zip(model.parameters(), clone.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in gradients)


def test_dropout_of_the_configuration_stays_off() -> None:
    model = without_dropout(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_layer=1, n_embd=24)))
    clone = clone_model(model)
    assert not any(module.training for module in clone.modules())
    layers = [module for module in clone.modules() if isinstance(module, nn.Dropout)]
    assert layers and all(layer.p == 0.1 for layer in layers)


def test_reference_and_critic_are_clones() -> None:
    policy = Policy.load(ModelConfig())
    expected = logits(policy.model)
    with Reference(policy).active() as reference:
        assert torch.equal(logits(reference.model), expected)
        assert not any(parameter.requires_grad for parameter in reference.model.parameters())
        assert reference.codec is policy.codec
    critic = ValueNetwork(policy, seed=0)
    body = copy.deepcopy(policy.model.base_model)
    assert_same_state(critic.body, body)
    assert not {p.data_ptr() for p in critic.parameters()} & {p.data_ptr() for p in policy.model.parameters()}


def test_a_head_tied_to_an_embedding_with_adapters_is_saved_as_trained(tmp_path: Path) -> None:
    """The merging of peft would also change the head, because it is tied to the embedding."""
    model = build_model("llama-tied")
    adapters = adapted(model, target_modules=["embed_tokens"])
    Policy(model, Codec(build_tokenizer(), eos_ids=(1,)), adapters).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (logits(again) - logits(model)).abs().max() < 1e-4


def test_a_sharded_model_is_cloned_and_merged_although_deepcopy_fails(tmp_path: Path) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = build_model("llama-tied")
    adapted(model)
    expected = dict(merged_weights(model))
    state = {name: tensor.clone() for name, tensor in tensors(model).items()}
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for layer in (*model.model.layers, model):
            fsdp.fully_shard(layer)
        with pytest.raises(AssertionError, match="deepcopy"):
            copy.deepcopy(model)
        clone = clone_model(model)
        assert type(clone).__name__ == "LlamaForCausalLM"
        for name, tensor in clone.named_parameters():
            assert torch.equal(tensor.full_tensor(), state[name])
        for name, merged in dict[str, Any](merged_weights(model)).items():
            assert torch.equal(merged.full_tensor(), expected[name])
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_with_a_replaced_layer_is_an_error_in_one_line() -> None:
    model = build_model("llama-tied")
    model.model.layers[1].mlp.up_proj = nn.Sequential(model.model.layers[1].mlp.up_proj)
    message = r"LlamaForCausalLM cannot be copied: its layer 'model.layers.1.mlp.up_proj"
    with pytest.raises(UserError, match=message) as caught:
        clone_model(model)
    assert "\n" not in str(caught.value)


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_layer_with_another_class_under_the_same_name_is_an_error() -> None:
    model = build_model("llama-tied")
    model.model.layers[0].mlp.up_proj.__class__ = Doubling
    with pytest.raises(UserError, match=r"its layer 'model.layers.0.mlp.up_proj' differs from the one"):
        clone_model(model)
