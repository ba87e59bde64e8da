"""Truncated importance sampling between the sampler and the trainer (`learner.importance_sampling_cap`)."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.helpers import update_with_gradient
from tests.learning.test_learner import NONE, TWO, build_learner, build_policy, build_samples, logprobs_of
from tests.world import World, build_world, flat_gradient, world_of
from vineppo.config.schema import LearnerConfig
from vineppo.learning.learner import TorchLearner
from vineppo.learning.losses import importance_weights
from vineppo.learning.scores import Savings
from vineppo.types import TrainingSample


def test_weights_by_hand() -> None:
    old, sampler = torch.tensor([0.2, 0.1, 0.3]).log(), torch.tensor([0.1, 0.4, 0.2]).log()
    assert importance_weights(old, sampler, 1.2).tolist() == pytest.approx([1.2, 0.25, 1.2])
    assert importance_weights(old, sampler, 100.0).tolist() == pytest.approx([2.0, 0.25, 1.5])


@pytest.mark.parametrize("savings", [Savings(), NONE])
def test_the_loss_and_metrics_of_an_update_by_hand(savings: Savings) -> None:
    """A factor is the trainer's probability of a token divided by the one that the sampler reported."""
    policy = build_policy(dtype=torch.float64)
    factors, advantages = [[3.0, 0.5], [1.0, 2.0, 0.25, 1.5, 0.75]], [[1.0, -2.0], [0.5, 0.25, -1.0, 3.0, 0.0]]
    samples = []
    for sample, log_p, f, a in zip(
        build_samples(TWO), logprobs_of(policy, build_samples(TWO)), factors, advantages, strict=True
    ):
        zeros = (0.0,) * sample.loss_mask.index(1)
        q = [p - math.log(x) for p, x in zip(log_p.tolist(), f, strict=True)]
        samples.append(replace(sample, sampler_logprobs=(*zeros, *q), advantages=(*zeros, *a)))
    for cap in (0.0, 2.0):
        learner = build_learner(policy, lr=0.0, importance_sampling_cap=cap, savings=savings)
        metrics = learner.update(samples, 1, num_rollouts=2)
        pairs = [(f, a) for fs, row in zip(factors, advantages, strict=True) for f, a in zip(fs, row, strict=True)]
        expected = sum((min(cap, f) if cap else 1.0) * a for f, a in pairs)
        assert metrics["policy/loss"] == pytest.approx(-expected / 7, abs=1e-5)
        assert ("policy/importance_mean" in metrics) == (cap > 0)
    assert metrics["policy/importance_mean"] == pytest.approx((2 + 0.5 + 1 + 2 + 0.25 + 1.5 + 0.75) / 7, abs=1e-5)


def test_the_metric_of_the_cap() -> None:
    policy = build_policy(dtype=torch.float64)
    samples = [
        replace(s, sampler_logprobs=tuple([0.0] * s.loss_mask.index(1) + [x - 1.0 for x in row.tolist()]))
        for s, row in zip(build_samples(TWO), logprobs_of(policy, build_samples(TWO)), strict=True)
    ]  # all weights are e
    for cap, mean, share in ((2.0, 2.0, 1.0), (3.0, math.e, 0.0)):
        metrics = build_learner(policy, lr=0.0, importance_sampling_cap=cap).update(samples, 1, num_rollouts=2)
        assert metrics["policy/importance_mean"] == pytest.approx(mean, rel=1e-5)
        assert metrics["policy/importance_capped_share"] == share


# --- a sampler with a bias, in the enumerable world ---


@cache
def trainer_world(tokens: int) -> World:
    return build_world(tokens)


@cache
def sampler_world(tokens: int) -> World:
    """The same policy and rewards at temperature 1.4 instead of 0.7: the sampler draws from flatter distributions."""
    w = trainer_world(tokens)
    return world_of(w.policy, w.task, w.problem, tokens, temperature=1.4)


def samples_of_the_sampler(tokens: int) -> list[TrainingSample]:
    """Return every response, weighted with its probability under the sampler; its reward is the advantage."""
    samples, prompt = [], len(trainer_world(tokens).prompt_ids)
    for outcome in sampler_world(tokens).outcomes:
        rollout, length = outcome.rollout, len(outcome.rollout.response_ids)
        assert rollout.reward is not None
        samples.append(
            TrainingSample(
                token_ids=rollout.prompt_ids + rollout.response_ids,
                loss_mask=(0,) * prompt + (1,) * length,
                sampler_logprobs=(0.0,) * prompt + rollout.sampler_logprobs,
                advantages=(0.0,) * prompt + (rollout.reward,) * length,
                weights=(0.0,) * prompt + (outcome.probability,) * length,
            )
        )
    return samples


@cache
def learner_gradient(tokens: int, cap: float) -> torch.Tensor:
    """Return the gradient ascent direction of an update on all weighted responses, shape (parameters,)."""
    w, samples = trainer_world(tokens), samples_of_the_sampler(tokens)
    config = LearnerConfig(lr=0.0, epochs=1, minibatch_size=10**6, max_grad_norm=0.0, importance_sampling_cap=cap)
    learner = TorchLearner(w.policy, None, None, config, None, temperature=w.temperature, total_updates=1, seed=0)
    gradient, _ = update_with_gradient(learner, samples, len(samples))
    return -gradient * sum(sum(s.trained_weights) for s in samples)  # the learner divides by the sum of the weights


def enumerated_gradient(tokens: int, cap: float | None) -> torch.Tensor:
    """Return sum over responses y of q(y) R(y) sum over t of min(cap, p_t / q_t) grad log p_t, by autograd.

    Args:
        cap: None means weights of 1, that is, no correction.
    """
    w = trainer_world(tokens)
    log_p, outcomes = w.token_logprobs(), sampler_world(tokens).outcomes  # (N, T)
    total = torch.zeros((), dtype=torch.float64)
    for row, outcome in zip(log_p, outcomes, strict=True):
        logprobs_q = torch.tensor(outcome.rollout.sampler_logprobs, dtype=torch.float64)
        logprobs_p = row[: len(logprobs_q)]
        ratio = torch.exp(logprobs_p.detach() - logprobs_q)
        weight = torch.ones_like(ratio) if cap is None else ratio.minimum(torch.tensor(cap, dtype=torch.float64))
        total = total + outcome.probability * (outcome.rollout.reward or 0.0) * (weight * logprobs_p).sum()
    return flat_gradient(total, w.policy)


def bias(tokens: int, cap: float) -> float:
    """Return the norm of the error of the learner's gradient, divided by the norm of the exact gradient."""
    exact = trainer_world(tokens).exact_gradient()
    return float((learner_gradient(tokens, cap) - exact).norm() / exact.norm())


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_gradient_of_the_learner_is_the_enumerated_one(tokens: int) -> None:
    for cap in (0.0, 1.1, 1e6):
        expected = enumerated_gradient(tokens, cap or None)
        torch.testing.assert_close(learner_gradient(tokens, cap), expected, atol=2e-6, rtol=0)


def test_with_one_token_and_no_cap_the_correction_removes_the_bias() -> None:
    assert bias(1, 0.0) == pytest.approx(0.0300, abs=1e-3)
    assert bias(1, 1e6) < 1e-5


def test_the_correction_lowers_the_bias_of_a_sampler_with_another_temperature() -> None:
    """With several tokens a bias remains, because the probabilities of the tokens before a token are not corrected.

    No weight of this world is above 2, so a cap of 2 changes nothing.
    """
    biases = [bias(3, cap) for cap in (0.0, 2.0, 1e6)]
    assert biases == pytest.approx([0.4235, 0.2842, 0.2842], abs=1e-3)
