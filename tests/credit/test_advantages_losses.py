"""Advantages, losses, the learning rate schedule and the optimizer: invariants and examples worked by hand."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.config.schema import Config, KLConfig, LearnerConfig, RolloutConfig
from vineppo.credit.advantages import (
    gae,
    grpo_advantages,
    leave_one_out_advantages,
    node_advantages,
    spread_over_tokens,
    step_advantages,
)
from vineppo.learning.losses import clipped_policy_loss, clipped_value_loss, kl_estimate
from vineppo.learning.optim import Optimizer, lr_factor
from vineppo.learning.scaling import penalty_to_go, scale_advantages
from vineppo.statistics import mean_of
from vineppo.steps import build_splitter, merge_steps
from vineppo.training.configure import with_algorithm_section
from vineppo.types import UserError

rewards = st.floats(-10, 10)
value_lists = st.lists(rewards, min_size=1, max_size=30)


# --- telescoping ---


@settings(deadline=None)
@given(value_lists, rewards)
def test_first_value_plus_step_advantages_is_the_reward(values: list[float], reward: float) -> None:
    advantages = step_advantages(values, reward)
    assert len(advantages) == len(values)
    assert values[0] + math.fsum(advantages) == pytest.approx(reward, abs=1e-9)


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["a", " b", "\n", ".\n", "####", ""]), min_size=1, max_size=40),
    st.sampled_from(["newline", "tokens:1", "tokens:3"]),
    st.integers(0, 6),
    st.randoms(use_true_random=False),
)
def test_any_split_of_any_response_telescopes(tokens: list[str], spec: str, max_states: int, random: Any) -> None:
    """All tokens of a step have the advantage of the step, and V(s_0) plus the step advantages is the reward."""
    ends = merge_steps(build_splitter(spec)(tokens), max_states)
    values, reward = [random.random() for _ in ends], random.random()
    advantages_S = step_advantages(values, reward)
    advantages_T = spread_over_tokens(advantages_S, ends)
    assert len(advantages_T) == len(tokens)
    starts = (0, *ends[:-1])
    for start, end, advantage in zip(starts, ends, advantages_S, strict=True):
        assert set(advantages_T[start:end]) == {advantage}
    assert values[0] + sum(advantages_T[start] for start in starts) == pytest.approx(reward, abs=1e-9)


def test_step_advantages_by_hand() -> None:
    assert step_advantages([0.5, 0.75, 0.25], 1.0) == [0.25, -0.5, 0.75]
    assert step_advantages([0.25], 0.0) == [-0.25]
    with pytest.raises(ValueError, match="at least one step"):
        step_advantages([], 1.0)


def test_spread_over_tokens_by_hand() -> None:
    assert spread_over_tokens([0.25, -0.5, 0.75], (2, 3, 6)) == [0.25, 0.25, -0.5, 0.75, 0.75, 0.75]


# --- GAE ---


def gae_by_the_definition(values: list[float], reward: float, gamma: float, lam: float) -> list[float]:
    """A_t as the sum over the deltas from t to the end, computed separately for every t."""
    T = len(values)
    advantages = []
    for t in range(T):
        total = 0.0
        for k in range(t, T):
            after = values[k + 1] if k + 1 < T else 0.0
            delta = (reward if k == T - 1 else 0.0) + gamma * after - values[k]
            total += (gamma * lam) ** (k - t) * delta
        advantages.append(total)
    return advantages


@settings(deadline=None)
@given(value_lists, rewards, st.floats(0.1, 1), st.floats(0, 1))
def test_gae_equals_its_definition(values: list[float], reward: float, gamma: float, lam: float) -> None:
    advantages, returns = gae(values, reward, gamma, lam)
    assert advantages == pytest.approx(gae_by_the_definition(values, reward, gamma, lam), abs=1e-8)
    assert returns == pytest.approx([a + v for a, v in zip(advantages, values, strict=True)])


def test_gae_of_three_tokens_by_hand() -> None:
    """V = .5, .25, .75, reward 1, gamma .5, lambda .5: the deltas are -.375, .125, .25."""
    advantages, returns = gae([0.5, 0.25, 0.75], 1.0, gamma=0.5, gae_lambda=0.5)
    assert advantages == [-0.375 + 0.25 * (0.125 + 0.25 * 0.25), 0.125 + 0.25 * 0.25, 0.25]
    assert advantages == [-0.328125, 0.1875, 0.25]
    assert returns == [0.171875, 0.4375, 1.0]


@settings(deadline=None)
@given(value_lists, rewards)
def test_gae_without_discount_is_the_return_minus_the_value_or_one_step(values: list[float], reward: float) -> None:
    by_return, returns = gae(values, reward, 1.0, 1.0)
    assert by_return == pytest.approx([reward - v for v in values], abs=1e-8)
    assert returns == pytest.approx([reward] * len(values), abs=1e-8)
    assert gae(values, reward, 1.0, 0.0)[0] == pytest.approx(step_advantages(values, reward), abs=1e-12)


def test_gae_of_no_tokens_is_empty() -> None:
    assert gae([], 1.0, 1.0, 1.0) == ([], [])


# --- groups ---


def test_grpo_by_hand() -> None:
    """Rewards 1, 0, 0, 1: mean .5, variance with n - 1 is 4 * .25 / 3, std .57735."""
    assert grpo_advantages([1, 0, 0, 1], scale_by_std=False) == [0.5, -0.5, -0.5, 0.5]
    scaled = 0.5 / (0.5773502691896257 + 1e-4)
    assert grpo_advantages([1, 0, 0, 1], scale_by_std=True) == pytest.approx([scaled, -scaled, -scaled, scaled])
    # 1, 0, 0, 0: mean .25, variance (9 + 3) / 16 / 3 = .25
    assert grpo_advantages([1, 0, 0, 0], scale_by_std=True) == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])


def test_leave_one_out_by_hand() -> None:
    assert leave_one_out_advantages([1, 0, 0, 1]) == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert leave_one_out_advantages([3, 1]) == [2, -2]


@settings(deadline=None)
@given(st.lists(rewards, min_size=2, max_size=16))
def test_grpo_without_std_is_leave_one_out_times_g_minus_1_over_g(group: list[float]) -> None:
    """Including a response's own reward in its baseline shrinks its advantage."""
    G = len(group)
    shrunk = [(G - 1) / G * a for a in leave_one_out_advantages(group)]
    assert grpo_advantages(group, scale_by_std=False) == pytest.approx(shrunk, abs=1e-9)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, 0.7])
@pytest.mark.parametrize("group_size", [2, 3, 7, 8])
def test_a_group_with_equal_rewards_has_no_advantage(reward: float, group_size: int) -> None:
    """The rounded mean of equal rewards may differ from them, for example that of three rewards of 0.7."""
    for scale_by_std in (False, True):
        assert grpo_advantages([reward] * group_size, scale_by_std) == [0.0] * group_size
    assert leave_one_out_advantages([reward] * group_size) == [0.0] * group_size
    assert node_advantages(reward, reward, [reward] * (group_size - 1), [reward]) == (0.0, [0.0])
    assert mean_of([reward] * group_size) == reward


def test_advantages_of_rewards_of_zero_and_one_are_bounded() -> None:
    for group_size in range(2, 65):
        one_success = [1.0] + [0.0] * (group_size - 1)
        assert max(grpo_advantages(one_success, scale_by_std=True)) < math.sqrt(group_size)
        assert max(leave_one_out_advantages(one_success)) == 1.0


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two"):
        grpo_advantages([1.0], scale_by_std=False)
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out_advantages([1.0])
    one, two = RolloutConfig(group_size=1, num_problems=1), RolloutConfig(group_size=1, num_problems=2)
    learner = LearnerConfig(minibatch_size=1)
    for algorithm in ("grpo", "rloo", "reinforce"):
        with pytest.raises(UserError, match="at least 2"):
            with_algorithm_section(Config(algorithm=algorithm, rollouts=one, learner=learner))
    with_algorithm_section(
        Config(algorithm="reinforce", rollouts=two, learner=learner)
    )  # the baseline is the reward of the other problem


# --- scaling ---


def test_scaling_by_hand() -> None:
    """1, 1, -2, 4: mean 1, variance (0 + 0 + 9 + 9) / 4, std 2.12132, over all tokens of all rows."""
    rows = [[1.0, 1.0, -2.0], [4.0]]
    std = 2.1213203435596424
    assert scale_advantages(rows, "none") == rows
    assert scale_advantages(rows, "std") == [pytest.approx([1 / std, 1 / std, -2 / std]), pytest.approx([4 / std])]
    assert scale_advantages(rows, "whiten") == [pytest.approx([0, 0, -3 / std]), pytest.approx([3 / std])]


def test_only_whitening_changes_an_advantage_of_zero() -> None:
    rows = [[0.0, 0.0], [0.0, 4.0]]
    assert scale_advantages(rows, "std")[0] == [0.0, 0.0]
    assert scale_advantages(rows, "whiten")[0] == pytest.approx([-1 / math.sqrt(3)] * 2)


@pytest.mark.parametrize("scaling", ["none", "std", "whiten"])
def test_scaling_of_equal_advantages_does_not_divide(scaling: str) -> None:
    """The std of equal advantages is 0 or, because of rounding, almost 0: the mean of three times 0.1 is not 0.1."""
    for advantage in (0.0, 0.1, -0.7):
        expected = 0.0 if scaling == "whiten" else advantage
        assert scale_advantages([[advantage], [advantage] * 2], scaling) == [
            pytest.approx([expected], abs=1e-12),
            pytest.approx([expected] * 2, abs=1e-12),
        ]
    assert scale_advantages([], scaling) == [] and scale_advantages([[]], scaling) == [[]]


@settings(deadline=None)
@given(st.lists(st.lists(rewards, max_size=6), max_size=6), st.randoms(use_true_random=False))
def test_scaling_does_not_depend_on_the_order_of_rows(rows: list[list[float]], random: Any) -> None:
    """Scaling uses all tokens of the iteration and exact sums, so batches and order do not matter."""
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = scale_advantages([rows[i] for i in order], "whiten")
    assert shuffled == [scale_advantages(rows, "whiten")[i] for i in order]


def test_penalty_to_go_by_hand() -> None:
    assert penalty_to_go([1.0, 0.5, -0.25]) == [1.25, 0.25, -0.25]
    assert penalty_to_go([]) == []


# --- the clipped policy loss ---


def policy_loss_of(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float, int]:
    """(loss, gradient with respect to the log-probability, tokens on which clipping removed it)."""
    old = torch.tensor([-1.5], dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    loss, clipped = clipped_policy_loss(logprob, old, torch.tensor([advantage], dtype=torch.float64), low, high)
    (gradient,) = torch.autograd.grad(loss, logprob)
    return loss.item(), gradient.item(), int(clipped)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.0, -2.0, 2.0, 2.0, 0),
        (1.25, 2.0, -2.5, -2.5, 0),  # inside 1 + 0.3
        (1.5, 2.0, -2.6, 0.0, 1),  # a good token above the upper limit: 1.3 * 2
        (1.5, -2.0, 3.0, 3.0, 0),  # a bad token above the upper limit is still made less likely
        (0.95, -2.0, 1.9, 1.9, 0),  # inside 1 - 0.1
        (0.5, -2.0, 1.8, 0.0, 1),  # a bad token below the lower limit: 0.9 * 2
        (0.5, 2.0, -1.0, -1.0, 0),  # a good token below the lower limit is still made more likely
        (0.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, gradient: float, clipped: int) -> None:
    """Clip range 0.1 below and 0.3 above. The gradient of ratio * A is ratio * A; it is 0 if clipping is active."""
    assert policy_loss_of(ratio, advantage, low=0.1, high=0.3) == pytest.approx((loss, gradient, clipped))


def test_the_policy_loss_is_a_sum_over_tokens() -> None:
    """The losses of two parts add up to the loss of the whole, so the caller can divide once."""
    generator = torch.Generator().manual_seed(0)
    old, new, advantages = torch.randn(3, 64, generator=generator, dtype=torch.float64) * 0.3
    whole, clipped = clipped_policy_loss(new, old, advantages, 0.2, 0.2)
    parts = [clipped_policy_loss(new[i:j], old[i:j], advantages[i:j], 0.2, 0.2) for i, j in ((0, 5), (5, 64))]
    assert whole.item() == pytest.approx(sum(p.item() for p, _ in parts), rel=1e-12)
    assert 0 < int(clipped) == sum(int(c) for _, c in parts)
    ratio = (new - old).exp()
    by_hand = -sum(
        min(r * a, min(max(r, 0.8), 1.2) * a) for r, a in zip(ratio.tolist(), advantages.tolist(), strict=True)
    )
    assert whole.item() == pytest.approx(by_hand, rel=1e-12)


# --- KL ---


@pytest.mark.parametrize(
    ("d", "k1", "k2", "k3"),
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.5, 0.5, 0.125, 0.10653065971263342),  # exp(-.5) - 1 + .5
        (-0.5, -0.5, 0.125, 0.14872127070012819),  # exp(.5) - 1 - .5
        (2.0, 2.0, 2.0, 1.1353352832366128),
        (-2.0, -2.0, 2.0, 4.38905609893065),
    ],
)
def test_kl_estimates_by_hand(d: float, k1: float, k2: float, k3: float) -> None:
    ref = torch.tensor([-3.0], dtype=torch.float64)
    estimates = [kl_estimate(ref + d, ref, name, 10.0).item() for name in ("k1", "k2", "k3")]
    assert estimates == pytest.approx([k1, k2, k3], abs=1e-12)


def test_an_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4", 10.0)


@settings(deadline=None)
@given(st.lists(st.floats(-30, 0), min_size=1, max_size=20), st.lists(st.floats(-30, 0), min_size=20, max_size=20))
def test_k3_is_never_negative(logprobs: list[float], ref: list[float]) -> None:
    """Also in float32 near 0, where exp(-d) - 1 + d could be negative because of cancellation."""
    new = torch.tensor(logprobs)
    assert (kl_estimate(new, torch.tensor(ref[: len(logprobs)]), "k3", 10.0) >= 0).all()
    small = new * 1e-5
    assert (kl_estimate(small, torch.zeros_like(small), "k3", 10.0) >= 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_clamped_and_its_gradient_is_0_there(estimator: str) -> None:
    """Also if exp(-d) overflows: the gradient of a clamped token is 0, not nan."""
    d = torch.tensor([-200.0, -5.0, 0.25], requires_grad=True)
    estimate = kl_estimate(d, torch.zeros(3), estimator, clamp=1.0)
    (gradient,) = torch.autograd.grad(estimate.sum(), d)
    edge = -1.0 if estimator == "k1" else 1.0
    assert estimate.tolist()[:2] == [edge, edge] and abs(estimate[2].item()) < 1
    assert gradient.tolist()[:2] == [0.0, 0.0] and gradient[2].item() != 0


def categorical() -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the policy, log-probabilities of the reference) over six tokens."""
    logits, ref = torch.randn(2, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1)


def expected_penalty_gradient(estimator: str, weighted: bool = False) -> torch.Tensor:
    """Expected gradient of the estimate over sampled tokens, by enumeration of the tokens."""
    logits, ref = categorical()
    logprobs = logits.log_softmax(-1)
    estimate = kl_estimate(logprobs, ref, estimator, clamp=100.0)
    if weighted:
        estimate = estimate * (logprobs - logprobs.detach()).exp()
    return torch.autograd.grad((logprobs.exp().detach() * estimate).sum(), logits)[0]


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    logits, ref = categorical()
    logprobs = logits.detach().log_softmax(-1)
    kl = (logprobs.exp() * (logprobs - ref)).sum().item()
    expected = {k: (logprobs.exp() * kl_estimate(logprobs, ref, k, 100.0)).sum().item() for k in ("k1", "k2", "k3")}
    assert expected["k1"] == pytest.approx(kl) and expected["k3"] == pytest.approx(kl)
    assert abs(expected["k2"] - kl) > 0.01


def test_gradient_of_k2_is_that_of_the_kl_and_of_k3_that_of_the_reverse_kl() -> None:
    logits, ref = categorical()
    logprobs = logits.log_softmax(-1)
    forward, reverse = (logprobs.exp() * (logprobs - ref)).sum(), (ref.exp() * (ref - logprobs)).sum()
    (of_kl,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (of_reverse,) = torch.autograd.grad(reverse, logits)
    torch.testing.assert_close(expected_penalty_gradient("k2"), of_kl, atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_penalty_gradient("k3"), of_reverse, atol=1e-12, rtol=0)
    assert (of_kl - of_reverse).abs().max() > 0.01


def test_importance_weights_make_the_gradient_of_k1_and_k3_that_of_the_kl() -> None:
    logits, ref = categorical()
    logprobs = logits.log_softmax(-1)
    (of_kl,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(expected_penalty_gradient(estimator, weighted=True), of_kl, atol=1e-12, rtol=0)
    assert KLConfig(coefficient=0.1, estimator="k1", importance_weighted=True).importance_weighted


def test_k1_in_the_loss_has_no_expected_gradient_and_is_refused() -> None:
    assert expected_penalty_gradient("k1").abs().max() < 1e-12
    with pytest.raises(UserError, match="k1"):
        KLConfig(coefficient=0.1, estimator="k1", place="loss")
    KLConfig(coefficient=0.1, estimator="k1", place="reward")


# --- the value loss ---


def value_loss_of(value: float, clip: float) -> tuple[float, float]:
    """(loss, gradient) for an old value of 0.5 and a return of 1."""
    values = torch.tensor([value], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    loss = clipped_value_loss(values, old, returns, clip)
    return loss.item(), torch.autograd.grad(loss, values)[0].item()


@pytest.mark.parametrize(
    ("value", "clip", "loss", "gradient"),
    [
        (0.8, 0.0, 0.02, -0.2),
        (0.6, 0.2, 0.08, -0.4),  # changed by 0.1 only: not clipped
        (0.8, 0.2, 0.045, 0.0),  # above the limit 0.7, towards the return: no gradient
        (0.2, 0.2, 0.32, -0.8),  # away from the return: the unclipped error is larger
    ],
)
def test_clipped_value_loss_by_hand(value: float, clip: float, loss: float, gradient: float) -> None:
    assert value_loss_of(value, clip) == pytest.approx((loss, gradient))


def test_the_value_loss_is_a_sum() -> None:
    values, old, returns = torch.tensor([0.8, 0.6]), torch.tensor([0.5, 0.5]), torch.tensor([1.0, 1.0])
    assert clipped_value_loss(values, old, returns, 0.2).item() == pytest.approx(0.045 + 0.08)
    assert clipped_value_loss(values, old, returns, 0.0).item() == pytest.approx(0.02 + 0.08)


# --- the schedule ---


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("constant", {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 9: 1.0, 50: 1.0}),
        ("linear", {0: 0.25, 3: 1.0, 4: 1.0, 5: 5 / 6, 7: 0.5, 9: 1 / 6, 10: 0.0, 50: 0.0}),
    ],
)
def test_learning_rate_by_hand(decay: str, factors: dict[int, float]) -> None:
    """Four updates of warm-up out of ten."""
    assert {u: lr_factor(u, 4, 10, decay) for u in factors} == pytest.approx(factors)


def test_learning_rate_without_warm_up() -> None:
    assert [lr_factor(u, 0, 4, "linear") for u in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert lr_factor(0, 0, 4, "constant") == 1.0
    assert lr_factor(7, 4, 4, "linear") == 0.0  # all updates are warm-up


# --- the optimizer ---


def parameter(values: list[float], dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def optimizer(*parameters: torch.nn.Parameter, weight_decay: float = 0.0) -> Optimizer:
    return Optimizer(parameters, betas=(0.9, 0.999), weight_decay=weight_decay)


def test_bfloat16_weights_keep_small_updates_in_their_masters() -> None:
    """AdamW with a constant gradient changes a weight by lr per update: 0.01 after 100 updates of 1e-4.

    The spacing of bfloat16 numbers below 1 is 1/256, so without float32 masters the updates are lost.
    """
    weight = parameter([1.0], torch.bfloat16)
    with_masters = optimizer(weight)
    weight_without_master = parameter([1.0], torch.bfloat16)
    without_masters = torch.optim.AdamW([weight_without_master], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        weight.grad, weight_without_master.grad = torch.ones_like(weight), torch.ones_like(weight_without_master)
        with_masters.step(1e-4, max_grad_norm=0)
        without_masters.step()
    assert with_masters.masters[0].dtype == torch.float32
    assert with_masters.masters[0].item() == pytest.approx(0.99, abs=1e-5)
    assert weight.dtype == torch.bfloat16 and weight.item() == pytest.approx(0.99, abs=1 / 512)
    assert weight_without_master.item() == 1.0


def test_float32_weights_are_their_own_masters() -> None:
    weight, frozen = parameter([1.0]), parameter([1.0])
    frozen.requires_grad_(False)
    adamw = optimizer(weight, frozen)
    assert adamw.masters == [weight] and adamw.state_dict()["masters"] == []


def test_gradient_clipping_is_by_the_global_norm() -> None:
    """The norm of (3, 4) over two weights is 5. AdamW's first moments are 0.1 times the clipped gradient."""
    first, second = parameter([1.0]), parameter([1.0], torch.bfloat16)
    for max_norm, share in ((1.0, 0.2), (10.0, 1.0), (0.0, 1.0)):
        clipped = optimizer(first, second)
        first.grad, second.grad = torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)
        assert clipped.step(0.0, max_norm) == pytest.approx(5.0)
        moments = [state["exp_avg"].item() for state in clipped.adamw.state.values()]
        assert moments == pytest.approx([0.3 * share, 0.4 * share], rel=1e-5)
        assert first.grad is None and second.grad is None
    assert first.item() == 1.0 and second.item() == 1.0  # the learning rate is 0


def test_first_update_by_hand() -> None:
    """First decay, p * (1 - lr * wd), then AdamW's first step, lr * sign of the gradient."""
    weight = parameter([2.0, -2.0])
    decaying = optimizer(weight, weight_decay=0.1)
    weight.grad = torch.tensor([0.5, 0.001])
    decaying.step(0.01, max_grad_norm=0)
    assert weight.tolist() == pytest.approx([2 * 0.999 - 0.01, -2 * 0.999 - 0.01], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_refused(bad: float, max_grad_norm: float, dtype: torch.dtype) -> None:
    weight, other = parameter([1.0, 2.0], dtype), parameter([3.0])
    adamw = optimizer(weight, other)
    weight.grad, other.grad = torch.tensor([0.1, bad], dtype=dtype), torch.tensor([0.1])
    with pytest.raises(UserError, match="gradient's norm is") as error:
        adamw.step(0.1, max_grad_norm)
    assert "\n" not in str(error.value)
    assert weight.tolist() == [1.0, 2.0] and other.tolist() == [3.0]
    assert not adamw.adamw.state
    weight.grad, other.grad = torch.tensor([0.1, 0.1], dtype=dtype), torch.tensor([0.1])
    assert math.isfinite(adamw.step(0.1, max_grad_norm)) and weight[1].item() < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_is_exact(dtype: torch.dtype) -> None:
    """Three updates, saving to a file and loading into a new optimizer, three more: bit-identical to six updates."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(40, generator=generator).to(dtype)
    gradients = torch.randn(6, 40, generator=generator).to(dtype)

    def train(weight: torch.nn.Parameter, adamw: Optimizer, rows: torch.Tensor) -> None:
        for row in rows:
            weight.grad = row.clone()
            adamw.step(3e-4, max_grad_norm=1.0)

    uninterrupted_weight = torch.nn.Parameter(start.clone())
    uninterrupted = optimizer(uninterrupted_weight, weight_decay=0.1)
    train(uninterrupted_weight, uninterrupted, gradients)
    interrupted_weight = torch.nn.Parameter(start.clone())
    interrupted = optimizer(interrupted_weight, weight_decay=0.1)
    train(interrupted_weight, interrupted, gradients[:3])
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    file.seek(0)
    resumed_weight = torch.nn.Parameter(interrupted_weight.data.clone())
    resumed = optimizer(resumed_weight, weight_decay=0.1)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed_weight, resumed, gradients[3:])
    assert torch.equal(resumed_weight, uninterrupted_weight)
    assert all(torch.equal(a, b) for a, b in zip(resumed.masters, uninterrupted.masters, strict=True))


# --- alternatives ---


def test_node_advantages_by_hand() -> None:
    """Three continuations: two with the response's token (rewards 1 and 0), one with another (0); next value 0.8."""
    advantage, alternatives = node_advantages(0.8, 0.5, followed=[1.0, 0.0], diverged=[0.0])
    # The mean is 1/3. Minus the mean of the others the rewards are 1 - 0, 0 - 1/2 and 0 - 1/2; the response 0.8 - 1/3.
    assert advantage == pytest.approx((0.8 - 1 / 3 + 1.0 - 0.5) / 4)
    assert alternatives == pytest.approx([-0.5 / 4])


def test_node_advantages_with_at_most_one_continuation() -> None:
    """A single continuation gets no credit; its reward is the baseline of the response."""
    for followed, diverged, expected in [([], [], 0.3), ([1.0], [], -0.2), ([], [0.25], 0.55)]:
        advantage, alternatives = node_advantages(0.8, 0.5, followed, diverged)
        assert advantage == pytest.approx(expected)
        assert alternatives == [0.0] * len(diverged)


@pytest.mark.parametrize("n", [2, 5, 9])
def test_node_advantages_of_equal_rewards_are_zero(n: int) -> None:
    for num_followed in range(n + 1):
        advantage, alternatives = node_advantages(1.0, 0.0, [1.0] * num_followed, [1.0] * (n - num_followed))
        assert [advantage, *alternatives] == pytest.approx([0.0] * (1 + n - num_followed), abs=1e-15)


def test_the_sum_of_node_advantages_is_the_credit_of_the_response() -> None:
    """The credit of all continuations sums to 0, because each is compared with the mean of the others."""
    advantage, alternatives = node_advantages(0.9, 0.1, [0.3, 0.7, 0.2], [0.5, 1.0])
    assert advantage + sum(alternatives) == pytest.approx((0.9 - 2.7 / 5) / 6)
