"""Every kind of adapters that peft offers is either refused in one line, or trained, sampled from and saved right.

Case 13 and the families of options around it: LoRA with tied embeddings, variants of LoRA, and adapters in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import update_with_gradient
from tests.learning.test_learner import build_samples
from tests.model.test_clone import build_model, logits
from tests.sampling.test_sampler import trainer_logprobs
from vineppo.config.schema import LearnerConfig
from vineppo.learning.learner import TorchLearner
from vineppo.model.adapters import SUPPORTED, check_new_adapters
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.lora import merged_weights
from vineppo.model.modes import with_checkpointing
from vineppo.model.policy import Policy, Reference
from vineppo.model.tiny import build_tokenizer
from vineppo.sampling.torch.packed import packed_weights
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.types import SampleRequest, TrainingSample, UserError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

LAYERS = ["q_proj", "v_proj", "up_proj"]
PLAIN = {"r": 4, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}
# Kind -> the options that it needs for a model with 32 numbers per hidden state.
OPTIONS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": ["up_proj"]},
    "OFT": {"r": 0, "oft_block_size": 4},
    "ROAD": {"group_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": None, "token_indices": [3, 4, 5]},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
    "BEFT": {"target_modules": ["q_proj"]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "one-layer": {"layers_to_transform": [1]},
    "parameters": {"target_modules": [], "target_parameters": ["self_attn.q_proj.weight"]},
    "tokens": {"trainable_token_indices": [3, 4]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    **{f"init-{init}": {"init_lora_weights": init} for init in (False, "gaussian", "pissa", "olora", "orthogonal")},
}


def build_policy(settings: Any, family: str = "llama-tied", dtype: torch.dtype = torch.float32) -> Policy:
    check_new_adapters(settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(family).to(dtype)
        adapters = peft.get_peft_model(model, settings)
    return Policy(model, Codec.for_model(model, build_tokenizer()), adapters)


def samples() -> list[TrainingSample]:
    """Return samples of several lengths, with token ids below 37."""
    found = build_samples([(3, 5), (7, 12), (2, 4), (5, 9), (4, 9)])
    return [replace(s, token_ids=tuple(token % 35 + 2 for token in s.token_ids)) for s in found]


def build_learner(policy: Policy, **settings: Any) -> TorchLearner:
    config = LearnerConfig(**{"lr": 1e-2, "epochs": 2, "minibatch_size": 5, **settings})
    return TorchLearner(policy, None, None, config, None, temperature=1.0, total_updates=9, seed=0)


def assert_trained_sampled_and_saved(policy: Policy, path: Path) -> None:
    """Make two updates; the sampler then has the trainer's log-probabilities, and the saved model the same logits."""
    before = logits(policy.model)
    build_learner(policy).update(samples(), 1, 5)
    after = logits(policy.model)
    assert (after - before).abs().max() > 1e-3
    prompt = (3, 4, 5)
    for completion in TorchSampler(policy).sample([SampleRequest(prompt, 3, 12, 1)])[0]:
        gap = trainer_logprobs(policy, prompt, completion, 1.0) - torch.tensor(completion.logprobs)
        assert gap.abs().max() < 1e-4
    policy.save(path)
    again = AutoModelForCausalLM.from_pretrained(path)
    assert (logits(again) - after).abs().max() < 1e-4
    assert again.config.tie_word_embeddings == torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


def options_of(kind: Any) -> dict[str, Any]:
    """Return the arguments of the configuration of a kind of adapters."""
    known = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind].__dataclass_fields__
    plain = {**PLAIN, "num_virtual_tokens": 3, "total_step": 10}
    return {k: v for k, v in {**plain, **OPTIONS.get(kind.value, {})}.items() if k in known and v is not None}


def kinds() -> Iterator[Any]:
    yield from peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: str(kind.value))
def test_every_kind_of_adapters_is_trained_sampled_and_saved_or_refused(kind: Any, tmp_path: Path) -> None:
    if kind.value not in SUPPORTED:
        # Some configurations cannot be built without further packages or other adapters; only their kind matters.
        settings = object.__new__(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind])
        settings.peft_type = kind
        with pytest.raises(UserError, match=rf"^adapters of kind {kind.value} are not supported: it.*") as caught:
            check_new_adapters(settings)
        assert "\n" not in str(caught.value)
        return
    settings = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options_of(kind))
    assert_trained_sampled_and_saved(
        build_policy(settings, "qwen2" if kind.value == "BEFT" else "llama-tied"), tmp_path
    )


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_of_lora_is_trained_sampled_and_saved(variant: str, family: str, tmp_path: Path) -> None:
    policy = build_policy(peft.LoraConfig(**{**PLAIN, **VARIANTS[variant]}), family)
    assert_trained_sampled_and_saved(policy, tmp_path)


def test_lora_on_transposed_layers_is_trained_sampled_and_saved(tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    policy = build_policy(settings, "gpt2")
    build_learner(policy).update(samples(), 1, 5)
    policy.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(again) - logits(policy.model)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_bias": True},
            "peft cannot merge the adapters of model.layers.0.self_attn.q_proj into the weights, so ",
        ),
        ({"alora_invocation_tokens": [5]}, "adapters with alora_invocation_tokens are not supported: such adapters "),
        ({"layer_replication": [(0, 2), (1, 2)]}, "adapters with layer_replication are not supported: the saved "),
        ({"init_lora_weights": "eva"}, "peft_config has init_lora_weights 'eva', which computes the first adapters "),
        ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, "peft cannot merge the adapters of "),
    ],
)
def test_options_that_cannot_be_saved_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        build_policy(peft.LoraConfig(**{**PLAIN, **options}))
    assert "\n" not in str(caught.value)


def test_dropout_of_other_kinds_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^adapters of kind LOHA with rank_dropout are not supported; set rank_dropout"
    ):
        build_policy(peft.LoHaConfig(**PLAIN, rank_dropout=0.1))


def test_adapters_that_were_loaded_without_training_are_refused() -> None:
    model = build_model("llama-tied")
    adapters = peft.get_peft_model(model, peft.LoraConfig(**PLAIN))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match=r"^no weight of the model with adapters is trained; .*is_trainable=True\)$"):
        Policy(model, Codec.for_model(model, build_tokenizer()), adapters)


def test_a_value_network_for_adapters_that_cannot_be_copied_is_refused() -> None:
    policy = build_policy(peft.BOFTConfig(boft_block_size=4, target_modules=LAYERS, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"^a model with adapters of kind BOFT cannot be copied; use LORA") as caught:
        ValueNetwork(policy, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "copied"),
    [
        ({}, False),
        ({"use_dora": True}, False),
        ({"init_lora_weights": "pissa"}, True),  # With disabled adapters, the weights lack their largest part.
        ({"init_lora_weights": False}, True),  # The adapters change the model from the start.
        ({"bias": "lora_only"}, True),  # Disabling the adapters leaves the trained biases.
    ],
)
def test_the_reference_is_the_policy_before_training(options: dict[str, Any], copied: bool) -> None:
    policy = build_policy(peft.LoraConfig(**{**PLAIN, **options}), "qwen2")
    before = logits(policy.model)
    reference = Reference(policy)
    build_learner(policy).update(samples(), 1, 5)
    with reference.active() as active:
        assert (active is not policy) == copied
        assert (logits(active.model) - before).abs().max() < 1e-4
    assert (logits(policy.model) - before).abs().max() > 1e-3


def small_adapters(size: float = 1e-4) -> Policy:
    """Return a policy in bfloat16 whose adapters have entries of about `size` in B."""
    policy = build_policy(peft.LoraConfig(**PLAIN), dtype=torch.bfloat16)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return policy


def test_small_adapters_of_a_bfloat16_model_are_saved_in_float32(tmp_path: Path) -> None:
    """Case 13: in bfloat16, most entries of a weight would not change."""
    policy = small_adapters()
    name = "model.layers.1.self_attn.q_proj"
    layer = policy.model.get_submodule(name)
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    rounded = dict(merged_weights(policy.model))[f"{name}.weight"]
    assert (rounded == layer.base_layer.weight).double().mean() > 0.9
    policy.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == again.config.dtype == torch.float32
    weight = again.get_submodule(name).weight
    assert (weight.double() - exact).abs().max() < 1e-7
    assert (weight == layer.base_layer.weight.float()).double().mean() < 0.01
    # The configuration of the model in memory is unchanged.
    assert policy.model.dtype == torch.bfloat16 and str(policy.model.config.dtype).endswith("bfloat16")


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_the_sampler_computes_the_learners_products_with_adapters_in_bfloat16(size: float) -> None:
    """Case 13, in the sampler: merged weights in bfloat16 would give other products than the learner's."""
    policy = small_adapters(size)
    layer = policy.model.get_submodule("model.layers.1.self_attn.q_proj")
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        learner = layer(x).float()
        with packed_weights(policy.model):
            assert "forward" in layer.__dict__
            sampler = layer(x).float()
        merged = merged_weights(policy.model)
        merged_product = (x @ dict(merged)["model.layers.1.self_attn.q_proj.weight"].T).float()
    assert (sampler - learner).abs().mean() < 0.05 * (merged_product - learner).abs().mean()


@pytest.mark.parametrize(
    ("options", "layers"), [({}, LAYERS), ({}, ["lm_head", "q_proj"]), ({"use_dora": True}, LAYERS)]
)
def test_dropout_does_not_depend_on_micro_batches(options: dict[str, Any], layers: list[str]) -> None:
    """The gradient of an update with dropout is the same for every division into micro-batches."""
    gradients = {}
    for tokens, checkpointing in ((1, False), (40, False), (4096, False), (4096, True)):
        settings = peft.LoraConfig(r=4, target_modules=layers, lora_dropout=0.3, task_type="CAUSAL_LM", **options)
        policy = build_policy(settings)
        if checkpointing:
            Policy(with_checkpointing(policy.model), policy.codec, policy.adapters)
        # In the second update the matrices B are not 0, so that the gradient of the matrices A is not 0 either.
        learner = build_learner(policy, micro_batch_tokens=tokens, max_grad_norm=0)
        gradients[tokens, checkpointing] = update_with_gradient(learner, samples(), 5)[0]
    whole = gradients[4096, False]
    for gradient in gradients.values():
        assert (gradient - whole).abs().max() < 1e-6 * max(1.0, float(whole.abs().max()))
    without = build_policy(peft.LoraConfig(r=4, target_modules=layers, task_type="CAUSAL_LM", **options))
    plain = update_with_gradient(build_learner(without, max_grad_norm=0), samples(), 5)[0]
    assert (plain - whole).abs().max() > 1e-3 * float(whole.abs().max())


def test_dropout_drops_the_given_share_and_keeps_the_mean() -> None:
    policy = build_policy(peft.LoraConfig(**PLAIN, lora_dropout=0.3))
    layer = policy.model.model.layers[0].mlp.up_proj.lora_dropout["default"]
    x = torch.ones(2, 500, 32)
    masks = [[1] * 500, [1] * 200]
    assert torch.equal(layer(x), x)
    with policy.dropout([1, 2], masks):
        first = layer(x)
        again = layer(x)
    with policy.dropout([2], masks[1:]):
        alone = layer(x[1:, :200])
    assert torch.equal(first, again) and torch.equal(first[1:, :200], alone)
    assert first[0].unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert abs(float((first[0] == 0).double().mean()) - 0.3) < 0.02
    assert not torch.equal(first[0, :200], first[1, :200])


def test_dropout_of_a_layer_without_rows_is_refused() -> None:
    policy = build_policy(peft.LoraConfig(**PLAIN, lora_dropout=0.3))
    layer = policy.model.model.layers[0].mlp.up_proj.lora_dropout["default"]
    with (
        policy.dropout([1, 2], [[0, 1, 1], [0, 1]]),
        pytest.raises(UserError, match=r"shape \(4, 32\) and not one row"),
    ):
        layer(torch.ones(4, 32))
