"""The savings of the learner change no update: packing, the forward pass of the first minibatch, a share of the KL."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import update_with_gradient
from tests.learning.test_learner import (
    NONE,
    RAGGED,
    build_learner,
    build_policy,
    build_samples,
    sparse,
    weights,
    with_alternatives,
)
from vineppo.config.schema import CriticConfig, KLConfig, LoraConfig, ModelConfig
from vineppo.learning.learner import TorchLearner
from vineppo.learning.scores import Savings
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy
from vineppo.types import Metrics, TrainingSample, UserError

ALL = Savings()
LOSS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kl": {"kl": KLConfig(coefficient=0.1)},
    "kl in the reward": {"kl": KLConfig(coefficient=0.1, place="reward")},
    "entropy": {"entropy_coefficient": 0.1, "advantage_scaling": "whiten"},
    "both": {"kl": KLConfig(coefficient=0.1, reduction="as_policy"), "entropy_coefficient": 0.1},
    "small minibatches": {"kl": KLConfig(coefficient=0.1), "minibatch_size": 3, "epochs": 2},
    "half the kl": {"kl": KLConfig(coefficient=0.1, share=0.5), "minibatch_size": 5, "epochs": 2},
}


def shared_prompts() -> list[TrainingSample]:
    """Samples of which groups of three share a prompt, with alternatives, and with advantages that are mostly 0."""
    samples = build_samples([(6, 5), (6, 12), (6, 3), (4, 9), (4, 9), (4, 2), (3, 17), (2, 1)])
    for i in (1, 2, 4, 5):
        first = samples[3 * (i // 3)]
        prompt = first.loss_mask.index(1)
        samples[i] = replace(samples[i], token_ids=first.token_ids[:prompt] + samples[i].token_ids[prompt:])
    return sparse(with_alternatives(samples), share=0.5)


def outcome(savings: Savings, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[torch.Tensor, Metrics, int]:
    """Return the gradient of the last update, the metrics and the number of tokens through the policy."""
    policy, tokens = build_policy(dtype=dtype), [0]

    def count(_module: Any, _args: Any, kwargs: Any) -> None:
        tokens[0] += kwargs["input_ids"].numel()

    policy.model.register_forward_pre_hook(count, with_kwargs=True)
    reference = build_policy(seed=1, dtype=dtype) if "kl" in options else None
    options = {"max_grad_norm": 0.0, "lr": 1e-4, **options}
    learner = build_learner(policy, reference, savings=savings, **options)
    learner._packs(policy)  # its trial is not counted
    tokens[0] = 0
    samples = shared_prompts()
    gradient, metrics = update_with_gradient(learner, samples, len(samples))
    return gradient, metrics, tokens[0]


@pytest.mark.parametrize("case", LOSS)
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 8192])
def test_the_savings_change_no_gradient_and_no_metric(case: str, micro_batch_tokens: int) -> None:
    # float64, because the rounding errors of float32 depend on the processor.
    dtype = torch.float64
    expected, expected_metrics, all_tokens = outcome(NONE, dtype, micro_batch_tokens=8192, **LOSS[case])
    gradient, metrics, tokens = outcome(ALL, dtype, micro_batch_tokens=micro_batch_tokens, **LOSS[case])
    # In the second epoch, the gradient also has the rounding errors of the weights after the first update.
    tolerance = 1e-6 if LOSS[case].get("epochs", 1) == 1 else 1e-5
    assert (gradient - expected).abs().max() < tolerance * expected.abs().max()
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6)
    assert tokens < 0.8 * all_tokens


@pytest.mark.parametrize(("case", "passes"), [("kl", 1), ("entropy", 1), ("plain", 2), ("kl in the reward", 2)])
def test_the_first_forward_pass_gives_the_old_log_probabilities(case: str, passes: int) -> None:
    """There is one pass per sample where all tokens have gradients, and two passes otherwise."""
    samples = build_samples(RAGGED)
    policy = build_policy()
    learner = build_learner(policy, build_policy(seed=1) if "kl" in LOSS[case] else None, **LOSS[case])
    learner._packs(policy)
    calls: list[int] = []
    policy.model.register_forward_pre_hook(lambda *_: calls.append(1))
    learner.update(samples, 1, len(samples))
    assert len(calls) == passes


def test_an_error_of_the_check_leaves_weights_and_gradients_unchanged() -> None:
    policy = build_policy()
    learner = build_learner(policy, build_policy(seed=1), kl=KLConfig(coefficient=0.1))
    before, seen = weights(policy.model), []

    def refuse(metrics: Metrics) -> None:
        seen.append(metrics)
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        learner.update(build_samples(RAGGED), 1, len(RAGGED), refuse)
    assert torch.equal(weights(policy.model), before) and learner.updates == learner.scheduled == 0
    assert all(p.grad is None for p in policy.model.parameters())
    # The metrics are those of all samples, and the same as with a separate pass.
    other = build_learner(build_policy(), build_policy(seed=1), kl=KLConfig(coefficient=0.1), savings=NONE)
    with pytest.raises(UserError, match="no"):
        other.update(build_samples(RAGGED), 1, len(RAGGED), refuse)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5) and "kl/ref" in seen[0] and "policy/entropy" in seen[0]


@pytest.mark.parametrize("kind", [list, np.array])
def test_token_ids_may_be_lists_or_arrays(kind: Any) -> None:
    """A credit function of a user may return them, and packing compares sequences."""
    samples = shared_prompts()
    others = [replace(s, token_ids=kind(s.token_ids)) if i % 2 else s for i, s in enumerate(samples)]
    expected, found = (update_with_gradient(build_learner(build_policy()), x, 8)[0] for x in (samples, others))
    assert torch.equal(found, expected)


def test_the_value_network_has_the_same_gradient() -> None:
    norms = []
    for savings in (ALL, NONE):
        policy = build_policy()
        learner = build_learner(policy, critic=ValueNetwork(policy, seed=0), savings=savings, ppo=CriticConfig())
        norms.append(learner.update(shared_prompts(), 1, 8)["value/grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0


def test_dropout_keeps_the_padded_form_and_the_separate_pass() -> None:
    gradients = []
    for savings in (ALL, NONE):
        lora = LoraConfig(r=4, dropout=0.3)
        policy = Policy.load(ModelConfig(path="embedded:judgement", lora=lora))
        samples = [replace(s, token_ids=tuple(t % 50 for t in s.token_ids)) for s in shared_prompts()]
        learner = build_learner(policy, policy, kl=KLConfig(coefficient=0.1), savings=savings, max_grad_norm=0.0)
        gradients.append(update_with_gradient(learner, samples, len(samples))[0])
    # The old log-probabilities come from a packed pass, so the ratios of the two differ by a rounding error.
    assert (gradients[0] - gradients[1]).abs().max() < 1e-5 * gradients[1].abs().max()


def drawn_gradient(monkeypatch: pytest.MonkeyPatch, draws: tuple[int, ...], share: float) -> tuple[torch.Tensor, float]:
    """Return the gradient and `kl/ref` if the KL terms of the samples with 1 in `draws` are computed."""
    samples = sparse(build_samples([(3, 5), (4, 7), (2, 6), (5, 3)]), share=0.5)
    monkeypatch.setattr(TorchLearner, "_kl_weights", lambda *_: [draw / share for draw in draws])
    policy, reference = build_policy(dtype=torch.float64), build_policy(seed=1, dtype=torch.float64)
    kl = KLConfig(coefficient=0.5, share=share)
    learner = build_learner(policy, reference, kl=kl, max_grad_norm=0.0)
    gradient, metrics = update_with_gradient(learner, samples, len(samples))
    return gradient, metrics["kl/ref"]


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_the_mean_gradient_over_all_draws_is_the_full_gradient(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    full, full_kl = drawn_gradient(monkeypatch, (1, 1, 1, 1), 1.0)
    mean, mean_kl, spread = torch.zeros_like(full), 0.0, 0.0
    for draws in itertools.product((0, 1), repeat=4):
        probability = float(np.prod([share if draw else 1 - share for draw in draws]))
        gradient, kl = drawn_gradient(monkeypatch, draws, share)
        mean, mean_kl = mean + probability * gradient, mean_kl + probability * kl
        spread = max(spread, float((gradient - full).abs().max()))
    assert (mean - full).abs().max() < 1e-6 * full.abs().max()
    assert mean_kl == pytest.approx(full_kl, rel=1e-6)
    assert spread > 0.1 * full.abs().max()  # the single gradients differ


def test_draws_depend_on_seed_iteration_and_sample_only() -> None:
    learner = build_learner(build_policy(), build_policy(seed=1), kl=KLConfig(coefficient=0.1, share=0.25))
    draws = [learner._kl_weights(400, iteration) for iteration in (1, 2, 1)]
    assert draws[0] == draws[2] != draws[1] and draws[0][:50] == learner._kl_weights(50, 1)
    assert set(draws[0]) == {0.0, 4.0} and 70 < sum(w > 0 for w in draws[0]) < 130


def test_samples_that_are_not_drawn_need_no_reference_and_few_tokens() -> None:
    samples, tokens = sparse(build_samples(RAGGED), share=0.8), {}
    for share in (1.0, 0.01):
        policy, seen = build_policy(), [0, 0]
        learner = build_learner(policy, build_policy(seed=1), kl=KLConfig(coefficient=0.1, share=share), epochs=2)
        assert learner.reference is not None
        with learner.reference.active() as reference:
            policies = (policy, reference)
        for number, each in enumerate(policies):
            learner._packs(each)
            each.model.register_forward_pre_hook(
                lambda _module, _args, kwargs, seen=seen, n=number: seen.__setitem__(
                    n, seen[n] + kwargs["input_ids"].numel()
                ),
                with_kwargs=True,
            )
        learner.update(samples, 1, len(samples))
        tokens[share] = seen
    assert tokens[0.01][1] == 0 < tokens[1.0][1]
    assert tokens[0.01][0] < tokens[1.0][0]


def test_a_share_of_the_penalty_in_the_reward_is_refused() -> None:
    with pytest.raises(UserError, match=r"learner\.kl\.share is 0\.5 and learner\.kl\.place is reward"):
        KLConfig(coefficient=0.1, place="reward", share=0.5)
