"""Case 19: reductions of the policy loss (`learner.reduction`), responses left out of the loss, cosine decay."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from tests.helpers import update_with_gradient
from tests.learning.test_learner import build_learner, build_policy, logprobs_of
from vineppo.config.schema import CriticConfig, KLConfig, LearnerConfig
from vineppo.credit.sample import training_sample
from vineppo.learning.learner import TorchLearner
from vineppo.learning.losses import kl_estimate
from vineppo.learning.optim import lr_factor
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy
from vineppo.types import Rollout, TrainingSample

LIMIT = 10
"""Maximum number of tokens of a response in these tests."""


def sample_of(response: tuple[int, ...], advantages: tuple[float, ...], finish_reason: Any = "eos") -> TrainingSample:
    rollout = Rollout((5, 6, 7), response, (-1.0,) * len(response), finish_reason, "", 0.0)
    return training_sample(rollout, advantages, returns_T=(1.0,) * len(response), values_T=(0.0,) * len(response))


SHORT = sample_of((8,), (1.0,))
LONG = sample_of((9, 10, 11, 12), (-0.25, 0.5, 0.0, -1.25))
CUT = sample_of((13, 14), (2.0, 4.0), "length")


def learner_of(policy: Policy, reference: Policy | None = None, **options: Any) -> TorchLearner:
    learner = build_learner(policy, reference, lr=0.0, **options)
    learner.max_new_tokens = LIMIT
    return learner


# Sums of the advantages: SHORT 1 (one token), LONG -1 (four tokens), CUT 6 (two tokens). Means: 1, -1/4 and 3. With the
# ratio 1 of a first update, the loss of a token is its negative advantage.
@pytest.mark.parametrize(
    ("reduction", "masked", "loss"),
    [
        ("token_mean", False, -6 / 7),
        ("sequence_mean", False, -(1 - 0.25 + 3) / 3),
        ("constant", False, -6 / (3 * LIMIT)),
        ("token_mean", True, 0 / 5),
        ("sequence_mean", True, -(1 - 0.25) / 3),
        ("constant", True, 0 / (3 * LIMIT)),
    ],
)
@pytest.mark.parametrize("micro_batch_tokens", [1, 8192])
def test_losses_by_hand(reduction: str, masked: bool, loss: float, micro_batch_tokens: int) -> None:
    learner = learner_of(
        build_policy(), reduction=reduction, mask_truncated=masked, micro_batch_tokens=micro_batch_tokens
    )
    assert learner.update([SHORT, LONG, CUT], 1, num_rollouts=3)["policy/loss"] == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_the_gradient_has_the_formula_of_trl(reduction: str) -> None:
    """The factor of a token: 1 / all tokens, 1 / (responses x tokens of its response), 1 / (responses x limit)."""
    policy, reference = build_policy(dtype=torch.float64), build_policy(seed=1, dtype=torch.float64)
    samples, beta = [SHORT, LONG], 0.3
    factors = {
        "token_mean": (1 / 5, 1 / 5),
        "sequence_mean": (1 / 2, 1 / 8),
        "constant": (1 / (2 * LIMIT), 1 / (2 * LIMIT)),
    }[reduction]
    objective = torch.zeros((), dtype=torch.float64)
    rows = zip(logprobs_of(policy, samples), logprobs_of(reference, samples), samples, factors, strict=True)
    for logprobs, ref, sample, factor in rows:
        advantages = torch.tensor(sample.advantages[3:], dtype=torch.float64)
        ratio = (logprobs - logprobs.detach()).exp()
        kl = kl_estimate(logprobs, ref.detach(), "k3", 10.0)
        objective = objective + factor * (-ratio * advantages + beta * kl).sum()
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    expected = torch.cat([g.flatten().double() for g in torch.autograd.grad(objective, parameters)])
    learner = learner_of(policy, reference, reduction=reduction, kl=KLConfig(coefficient=beta, reduction="as_policy"))
    gradient, metrics = update_with_gradient(learner, samples, 2)
    assert metrics["policy/objective"] == pytest.approx(objective.item(), rel=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-7)


def test_only_truncated_responses_change_nothing() -> None:
    policy = build_policy()
    critic = ValueNetwork(policy, seed=0, head_scale=0.1)
    before = [p.detach().clone() for p in (*policy.model.parameters(), *critic.parameters())]
    learner = build_learner(policy, None, critic, mask_truncated=True, ppo=CriticConfig(value_lr=1e-3))
    metrics = learner.update([CUT, replace(CUT)], 1, num_rollouts=2)
    after = [*policy.model.parameters(), *critic.parameters()]
    assert metrics["policy/loss"] == 0 and metrics["policy/grad_norm"] == 0 and metrics["value/loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_cosine_decay_equals_that_of_transformers() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 10)
    for update in range(11):
        if update >= 2:  # during the warm-up, the first update here has not the learning rate 0 of transformers
            assert lr_factor(update, 2, 10, "cosine") == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert [lr_factor(u, 2, 10, "cosine") for u in (0, 1, 6, 10)] == pytest.approx([0.5, 1, 0.5, 0], abs=1e-12)
    assert lr_factor(4, 2, 10, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert LearnerConfig(decay="cosine").decay == "cosine"
