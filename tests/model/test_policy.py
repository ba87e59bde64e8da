"""Loading and saving models, log-probabilities and entropies of tokens, and the value network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vineppo.config.schema import ModelConfig
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.location import resolve_model_path
from vineppo.model.logits import selected_logits, token_logprobs
from vineppo.model.policy import Policy
from vineppo.model.tiny import build_model, build_tokenizer
from vineppo.types import UserError

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gemma2": {**LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 5, "final_logit_softcapping": 2.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    "gpt_neox": LLAMA,
    "granite": {**LLAMA, "logits_scaling": 4.0},
}


def build_policy(family: str = "llama", **changes: Any) -> Policy:
    tokenizer = build_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        family, **{**FAMILIES[family], **ends, "vocab_size": len(tokenizer), "tie_word_embeddings": True, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float()
    return Policy(model, Codec.for_model(model, tokenizer))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return build_policy()


def some_ids(policy: Policy, batch: int = 3, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, len(policy.codec.tokenizer), (batch, length), generator=generator)


def test_a_saved_policy_loads_with_the_same_bits(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path / "final")
    ids = some_ids(policy)
    with torch.no_grad():
        expected = policy.model(ids).logits
        loaded = Policy.load(ModelConfig(path=str(tmp_path / "final")))
        assert torch.equal(loaded.model(ids).logits, expected)
        loaded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
        assert torch.equal(loaded_model(ids).logits, expected)
    assert loaded.codec.eos_ids == policy.codec.eos_ids
    assert loaded.codec.max_length == 64
    text = "a=7;b=a*3;b?\n"
    assert loaded.codec.encode_prompt(text) == policy.codec.encode_prompt(text)


def test_a_model_is_loaded_in_the_configured_dtype(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    loaded = Policy.load(ModelConfig(path=str(tmp_path), dtype="bfloat16"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    loaded.save(tmp_path / "half")
    with torch.no_grad():
        again = Policy.load(ModelConfig(path=str(tmp_path / "half"), dtype="bfloat16"))
        assert torch.equal(again.model(some_ids(policy)).logits, loaded.model(some_ids(policy)).logits)


@pytest.mark.parametrize(
    ("dtype", "multiplies", "num_warnings"), [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)]
)
def test_a_dtype_without_instructions_of_the_processor_gives_a_warning(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, multiplies: bool, num_warnings: int
) -> None:
    monkeypatch.setattr("vineppo.model.loading.cpu_multiplies", lambda dtype: multiplies)
    policy.save(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Policy.load(ModelConfig(path=str(tmp_path), dtype=dtype))
    messages = [str(w.message) for w in caught if "model.dtype" in str(w.message)]
    assert len(messages) == num_warnings
    assert all("is bfloat16, but this CPU" in text and "use model.dtype float32" in text for text in messages)


def test_a_new_tiny_model_depends_on_the_seed_only() -> None:
    tokenizer = build_tokenizer()
    first, same, other = (build_model(tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("embedded:nothing", r"'embedded:nothing', but the package does not include this model; allowed: "),
        ("./missing", r"'\./missing' does not exist; give a model directory or a hub id"),
        ("some/deep/missing", "does not exist; give a model directory or a hub id"),
        ("", "'' does not exist"),
    ],
)
def test_an_invalid_model_path_is_an_error_in_one_line(path: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolve_model_path(path)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json; give a directory written by save_pretrained"):
        resolve_model_path(str(tmp_path))
    for content in ("{}", "not json", '{"model_type": "no-such-model"}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"could not be loaded: \w") as caught:
            Policy.load(ModelConfig(path=str(tmp_path)))
        assert "\n" not in str(caught.value)


def test_a_directory_without_weights_is_an_error_in_one_line(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"could not be loaded: \w") as caught:
        Policy.load(ModelConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_model_directory_and_a_hub_id_are_returned_unchanged(policy: Policy, tmp_path: Path) -> None:
    policy.save(tmp_path)
    assert resolve_model_path(str(tmp_path)) == str(tmp_path)
    assert resolve_model_path("org/name") == "org/name"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_selected_logits_are_those_of_the_full_forward(family: str) -> None:
    policy = build_policy(family)
    ids = some_ids(policy)
    select = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    with torch.no_grad():
        full = policy.model(ids).logits
        chosen = selected_logits(policy.model, ids, select)
        assert torch.allclose(chosen, full[select], rtol=0, atol=1e-5)
        # Afterwards the model returns all logits again.
        assert torch.equal(policy.model(ids).logits, full)
        if family == "gemma2":
            uncapped = policy.model.lm_head(policy.model.model(ids).last_hidden_state)[select]
            assert (chosen - uncapped).abs().max() > 0.1
            assert chosen.abs().max() < 2


def test_the_selection_is_undone_when_the_model_fails(policy: Policy) -> None:
    ids = some_ids(policy)
    with pytest.raises(IndexError):
        selected_logits(policy.model, ids + 10_000, torch.ones_like(ids, dtype=torch.bool))
    assert policy.model(ids).logits.shape == (3, 12, len(policy.codec.tokenizer))


def test_token_logprobs_are_those_of_the_masked_tokens(policy: Policy) -> None:
    ids = some_ids(policy)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 4:9] = mask[2, 1:3] = True
    with torch.no_grad():
        logprobs, entropies = token_logprobs(policy.model, ids, mask, 0.6, with_entropy=True)
        assert entropies is not None
        distribution = (policy.model(ids).logits / 0.6).log_softmax(-1)
    where = [(0, t) for t in range(4, 9)] + [(2, 1), (2, 2)]
    assert logprobs.tolist() == pytest.approx([float(distribution[b, t - 1, ids[b, t]]) for b, t in where], abs=1e-5)
    rows = [distribution[b, t - 1] for b, t in where]
    assert entropies.tolist() == pytest.approx([float(-(row.exp() * row).sum()) for row in rows], abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_values_are_of_the_states_before_the_masked_tokens(family: str) -> None:
    policy = build_policy(family)
    critic = ValueNetwork(policy, seed=3)
    ids = some_ids(policy)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 4:9] = mask[2, 1:3] = True
    values = critic(ids, mask)
    assert values.shape == (7,)
    assert values.dtype == torch.float32
    hidden = policy.model(ids, output_hidden_states=True).hidden_states[-1]
    head = critic.head.weight[0]
    expected = [hidden[0, t - 1] @ head for t in range(4, 9)] + [hidden[2, 0] @ head, hidden[2, 1] @ head]
    assert values.tolist() == pytest.approx(torch.stack(expected).tolist(), abs=1e-5)
    # The value of the state before a token does not depend on the token.
    changed = ids.clone()
    changed[0, 8] = changed[2, 2] = 3 + (changed[0, 8] + 1) % 20
    assert torch.equal(critic(changed, mask), values)


def test_the_initial_value_head_depends_on_seed_and_scale(policy: Policy) -> None:
    heads = [ValueNetwork(policy, seed=seed).head for seed in range(40)]
    assert all(head.bias is None and head.weight.shape == (1, 32) for head in heads)
    weights = torch.stack([head.weight.detach() for head in heads])
    # The standard errors for 1280 normal numbers are 2% of the standard deviation, and 0.005 for the mean.
    assert float(weights.std()) == pytest.approx(33**-0.5, rel=0.07)
    assert abs(float(weights.mean())) < 0.02
    assert torch.equal(ValueNetwork(policy, seed=5).head.weight, heads[5].weight)
    assert not torch.equal(heads[4].weight, heads[5].weight)
    assert torch.allclose(ValueNetwork(policy, seed=5, head_scale=0.25).head.weight, heads[5].weight / 4)
    assert not ValueNetwork(policy, seed=5, head_scale=0.0).head.weight.any()


def test_the_value_network_shares_no_weight_with_the_policy() -> None:
    policy = build_policy()
    critic = ValueNetwork(policy.frozen_copy(), seed=0)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    body = dict(policy.model.base_model.named_parameters())
    for name, parameter in critic.body.named_parameters():
        assert torch.equal(parameter, body[name])
        assert parameter.data_ptr() != body[name].data_ptr()


def test_values_of_a_bfloat16_body_are_float32() -> None:
    policy = build_policy()
    policy.model.to(torch.bfloat16)
    ids = some_ids(policy)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    values = ValueNetwork(policy, seed=0)(ids, mask)
    assert values.dtype == torch.float32
    assert values.shape == (3 * 11,)


def test_a_frozen_copy_does_not_change_with_the_policy() -> None:
    policy = build_policy()
    reference = policy.frozen_copy()
    ids = some_ids(policy)
    before = reference.model(ids).logits
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.1
    assert torch.equal(reference.model(ids).logits, before)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    assert all(parameter.requires_grad for parameter in policy.model.parameters())


def test_dropout_is_never_active() -> None:
    policy = build_policy("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy.model.train()
    for model in (Policy(policy.model, policy.codec).model, policy.frozen_copy().model):
        assert torch.equal(model(some_ids(policy)).logits, model(some_ids(policy)).logits)


def test_gradient_checkpointing_recomputes_activations_with_equal_gradients(tmp_path: Path) -> None:
    """The layers run a second time in the backward pass."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    gradients, calls = [], []
    for checkpointing in (False, True):
        policy = Policy.load(ModelConfig(path=str(tmp_path), gradient_checkpointing=checkpointing))
        count = [0]
        policy.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.__setitem__(0, count[0] + 1)
        )
        token_ids = torch.tensor([policy.codec.encode_prompt("a=7;b=a*3;b?\n")])
        mask = torch.ones_like(token_ids, dtype=torch.bool)
        mask[:, 0] = False
        token_logprobs(policy.model, token_ids, mask, 1.0)[0].sum().backward()
        gradients.append(policy.model.model.layers[0].mlp.up_proj.weight.grad)
        calls.append(count[0])
    assert calls == [1, 2]
    assert torch.equal(gradients[0], gradients[1])
