"""Training of adapters: trained and frozen weights, reference, critic, resuming, and saved files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import small_config, weights_hash
from tests.learning.test_learner import build_samples
from tests.training.test_train import Crash, CrashAt
from vineppo.config.schema import CriticConfig, KLConfig, LearnerConfig, LoraConfig, ModelConfig, RunConfig
from vineppo.config.settings import replace
from vineppo.learning.learner import TorchLearner
from vineppo.model.critic import ValueNetwork
from vineppo.model.loading import load_pretrained
from vineppo.model.logits import token_logprobs
from vineppo.model.lora import trained_state
from vineppo.model.policy import Policy, Reference
from vineppo.run.checkpoint import save_checkpoint, write_state
from vineppo.run.directory import RunDirectory
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.tasks import build_task
from vineppo.training.loop import resume, train
from vineppo.training.rollouts import problem_range, sample_groups
from vineppo.types import TrainingSample, UserError

pytest.importorskip("peft")
LORA = LoraConfig(r=4, alpha=8.0)
MODEL = ModelConfig(lora=LORA)


def samples() -> list[TrainingSample]:
    return build_samples([(3, 5), (7, 12), (2, 4), (5, 9)])


def policy_with_trained_adapters(config: ModelConfig = MODEL, updates: int = 2) -> Policy:
    """Return a policy whose adapters were trained for a few updates."""
    policy = Policy.load(config)
    settings = LearnerConfig(lr=3e-2, epochs=updates, minibatch_size=4)
    learner = TorchLearner(policy, None, None, settings, CriticConfig(), temperature=1.0, total_updates=9, seed=0)
    learner.update(samples(), 1, len(samples()))
    return policy


def frozen(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora_" not in name}


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        sample = samples()[1]
        mask = torch.tensor([sample.loss_mask], dtype=torch.bool)
        return token_logprobs(policy.model, torch.tensor([sample.token_ids]), mask, 1.0)[0]


def test_new_adapters_do_not_change_the_model_and_only_they_are_trained() -> None:
    plain, policy = Policy.load(ModelConfig()), Policy.load(MODEL)
    assert torch.equal(logprobs(policy), logprobs(plain))
    trainable = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    assert not any("lm_head" in name for name in trainable)
    before = frozen(policy)
    trained = policy_with_trained_adapters()
    assert all(torch.equal(before[name], p) for name, p in frozen(trained).items())
    assert (logprobs(trained) - logprobs(plain)).abs().max() > 0.1


def test_the_sampler_uses_merged_weights_and_equals_the_trainer() -> None:
    policy, task = policy_with_trained_adapters(), build_task(small_config(Path()).task)
    sampler = TorchSampler(policy)
    groups = sample_groups(
        problem_range(task, "train", 3),
        policy.codec,
        sampler,
        task,
        group_size=4,
        max_new_tokens=40,
        temperature=1.0,
        address=(0,),
    )
    for rollout in (r for group in groups for r in group.rollouts):
        ids = rollout.prompt_ids + rollout.response_ids
        mask = torch.tensor([[0] * len(rollout.prompt_ids) + [1] * len(rollout.response_ids)], dtype=torch.bool)
        with torch.no_grad():
            expected = token_logprobs(policy.model, torch.tensor([ids]), mask, 1.0)[0]
        assert torch.allclose(expected, torch.tensor(rollout.sampler_logprobs), atol=1e-4)
    assert not any("forward" in module.__dict__ for module in policy.model.modules())


def test_the_reference_is_the_model_without_adapters() -> None:
    start = logprobs(Policy.load(ModelConfig()))
    policy = policy_with_trained_adapters()
    reference = Reference(policy)
    with reference.active() as active:
        assert active is policy and torch.equal(logprobs(active), start)
    assert (logprobs(policy) - start).abs().max() > 0.1
    learner = TorchLearner(
        policy,
        reference,
        None,
        LearnerConfig(kl=KLConfig(coefficient=0.1)),
        CriticConfig(),
        temperature=1.0,
        total_updates=9,
        seed=0,
    )
    assert learner.update(samples(), 1, len(samples()))["kl/ref"] > 0.01


def test_the_critic_has_separate_adapters_and_shares_the_other_weights() -> None:
    policy = Policy.load(MODEL)
    critic = ValueNetwork(policy, seed=0)
    policy_body = dict(policy.model.base_model.named_parameters())
    for name, p in critic.body.named_parameters():
        assert (p is policy_body[name]) == ("lora_" not in name)
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    ppo = CriticConfig(value_lr=1e-2)
    settings = LearnerConfig(lr=0.0)
    learner = TorchLearner(policy, None, critic, settings, ppo, temperature=1.0, total_updates=9, seed=0)
    learner.update(samples(), 1, len(samples()))
    changed = {name for name, p in critic.named_parameters() if not torch.equal(before[name], p)}
    assert (
        "head.weight" in changed
        and changed - {"head.weight"}
        and all("lora_" in n or n == "head.weight" for n in changed)
    )
    assert torch.equal(logprobs(policy), logprobs(Policy.load(ModelConfig())))


def test_dropout_is_active_in_updates_only() -> None:
    policy = policy_with_trained_adapters(ModelConfig(lora=replace(LORA, dropout=0.5)))
    assert torch.equal(logprobs(policy), logprobs(policy))
    masks = [samples()[1].loss_mask]
    with policy.dropout([1], masks):
        first = logprobs(policy)
    with policy.dropout([2], masks):
        second = logprobs(policy)
    with policy.dropout([1], masks):
        again = logprobs(policy)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(logprobs(policy), logprobs(policy))


@pytest.mark.parametrize("algorithm", [pytest.param("vineppo", marks=pytest.mark.real), "ppo"])
def test_a_resumed_run_has_the_same_bits_and_saves_merged_and_separate_adapters(tmp_path: Path, algorithm: str) -> None:
    import peft

    run = RunConfig(dir=str(tmp_path / "whole"), iterations=3, checkpoint_every=1)
    model = ModelConfig(lora=replace(LORA, dropout=0.1))
    learner = LearnerConfig(lr=3e-3, minibatch_size=8, epochs=1, kl=KLConfig(coefficient=1e-3))
    whole = small_config(tmp_path / "whole", algorithm, model=model, run=run, learner=learner)
    train(whole)
    cut = replace(whole, run=replace(run, dir=str(tmp_path / "cut")))
    with pytest.raises(Crash):
        train(cut, reporter=CrashAt(2))
    size = max(path.stat().st_size for path in (tmp_path / "cut/checkpoints").rglob("learner.pt"))
    assert size < 1_000_000  # adapters and their moments only; the model alone has 900 kB
    resume(cut)
    assert weights_hash(tmp_path / "cut/final") == weights_hash(tmp_path / "whole/final")

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "whole/final")
    base = Policy.load(ModelConfig()).model
    separate = peft.PeftModel.from_pretrained(base, tmp_path / "whole/final/adapter")
    ids = torch.tensor([samples()[1].token_ids])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, separate(ids).logits, atol=1e-4)
        with separate.disable_adapter():
            assert not torch.allclose(merged(ids).logits, separate(ids).logits, atol=1e-2)


def test_a_checkpoint_of_a_run_in_16_bits_keeps_its_adapters(tmp_path: Path) -> None:
    """In 16 bits, the sum of a weight and a small adapter is often the weight, so that the adapter has no effect."""
    config = small_config(tmp_path / "run", "grpo", model=replace(MODEL, path="embedded:judgement", dtype="bfloat16"))
    run = RunDirectory.create(tmp_path / "run", config)
    policy = Policy.load(config.model)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-4)
    state = {"policy": trained_state(policy.model)}
    path = save_checkpoint(run.checkpoints, 1, {}, writers=[lambda folder: write_state(folder / "learner.pt", state)])
    policy.save(run.final)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded, final = (load_pretrained(ModelConfig(path=str(p)))[0].state_dict() for p in (path, run.final))
    assert all(torch.equal(loaded[name], final[name].float()) for name in final)
    start = Policy.load(replace(config.model, lora=LoraConfig())).model.state_dict()
    changed = {name for name in start if not torch.equal(start[name].float(), loaded[name])}
    assert changed == {name for name in start if name.endswith("proj.weight")}
    for folder in (path, run.final):
        with pytest.warns(UserWarning, match="has merged adapters, and model.dtype is bfloat16: rounding to 16 bits"):
            model, _ = load_pretrained(ModelConfig(path=str(folder), dtype="bfloat16"))
        assert all(torch.equal(t, final[name].bfloat16()) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"targets": ("nothing_proj",)},
            r"targets is nothing_proj; the model has no layers with these names; its linear layers: .*q_proj",
        ),
        ({"alpha": 0.0}, "LoraConfig.alpha is 0.0; it must be above 0"),
        ({"dropout": 1.0}, "LoraConfig.dropout is 1.0; allowed: at least 0, below 1"),
        ({"targets": ()}, "model.lora.targets is empty"),
    ],
)
def test_mistakes_are_reported_in_one_line(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Policy.load(ModelConfig(lora=LoraConfig(**{"r": 4, **settings})))
    assert "\n" not in str(caught.value)
