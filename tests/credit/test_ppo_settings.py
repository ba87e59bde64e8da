"""PPO's further settings: other lambdas, boundaries, and the baseline while the value network is bad."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.credit.enumerated import error, of_groups, of_single_responses
from tests.credit.test_credit import group_with, response_part
from tests.credit.test_ground_truth import TableCritic, policy, world
from tests.world import World
from vineppo.cli.common import training_config
from vineppo.credit.advantages import gae
from vineppo.credit.ppo import (
    Estimation,
    PPOSettings,
    critic_credit,
    explained_by_others,
    explained_variance,
    gae_credit,
    lambdas_of,
)
from vineppo.types import CreditFn, Metrics, RolloutGroup, TrainingSample, UserError


def credit_of(w: World, value_error: float, **settings: Any) -> CreditFn:
    chosen = PPOSettings(**settings)
    lambdas = lambdas_of(chosen, policy().codec.token_texts)
    estimation = Estimation(chosen.gamma, lambdas, chosen.value_lambda, chosen.switch_baseline)
    return critic_credit(TableCritic(w, value_error), estimation)


def test_gae_with_a_lambda_per_token_is_its_definition() -> None:
    """A_t is the sum over u of delta_u times the product of gamma * lambda over the tokens from t to u - 1."""
    values, lambdas, gamma, reward = [0.3, 0.1, 0.7, 0.4], [0.5, 1.0, 0.0, 0.9], 0.9, 1.0
    after = [*values[1:], 0.0]
    deltas = [(reward if t == 3 else 0) + gamma * after[t] - values[t] for t in range(4)]
    expected = [
        sum(deltas[u] * math.prod(gamma * lambdas[v] for v in range(t, u)) for u in range(t, 4)) for t in range(4)
    ]
    assert gae(values, reward, gamma, lambdas)[0] == pytest.approx(expected, abs=1e-12)


def test_between_boundaries_no_value_is_used() -> None:
    """With lambda 0 at the ends of steps, a token's advantage is the value behind its step minus its own value."""
    w = world(4)
    rollout = next(o.rollout for o in w.outcomes if o.rollout.response_ids == (2, 1, 3, 0))
    (sample,), _ = credit_of(w, 0.0, gae_lambda=0.0, boundaries="tests.world:cut_after_a")(
        [RolloutGroup(w.problem, (rollout,))], 0
    )
    value = [w.value(rollout.response_ids[:t]) for t in range(4)]
    assert rollout.reward is not None
    expected = [value[2] - value[0], value[2] - value[1], rollout.reward - value[2], rollout.reward - value[3]]
    assert response_part(sample) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"gae_lambda": 0.5, "boundaries": "tokens:2"},
        {"gae_lambda": 0.0, "boundaries": "tests.world:cut_after_a"},
        {"gae_lambda": 0.3, "boundaries": "cutpoints:1:0.2"},
        {"gae_lambda": 0.5, "value_lambda": 1.0},
    ],
)
def test_exact_values_give_the_exact_gradient(settings: dict[str, Any]) -> None:
    w = world(4)
    assert error(of_single_responses(w, credit_of(w, 0.0, **settings)), w.table_gradient) < 1e-9


def test_errors_of_values_cause_less_bias_at_boundaries_only() -> None:
    w = world(4)
    bias = {
        name: error(of_single_responses(w, credit_of(w, 0.5, gae_lambda=0.5, boundaries=name)), w.table_gradient)
        for name in ("", "tokens:2")
    }
    assert bias[""] == pytest.approx(1.104, abs=1e-3)
    assert bias["tokens:2"] == pytest.approx(0.637, abs=1e-3)


def test_a_lambda_that_depends_on_the_length_is_biased_even_with_exact_values() -> None:
    w = world(4)
    for value_error, expected in ((0.0, 0.1438), (0.5, 1.103)):
        gradient = of_single_responses(w, credit_of(w, value_error, length_alpha=0.5))
        assert error(gradient, w.table_gradient) == pytest.approx(expected, abs=1e-3)
    rollout = w.outcomes[-1].rollout
    assert lambdas_of(PPOSettings(length_alpha=0.5), policy().codec.token_texts)(rollout) == [0.5] * 4
    assert lambdas_of(PPOSettings(length_alpha=0.05), policy().codec.token_texts)(rollout) == [0.0] * 4


def test_targets_have_their_own_lambda() -> None:
    w = world(3)
    plain, _ = credit_of(w, 0.5, gae_lambda=0.4)([w.group()], 0)
    decoupled, _ = credit_of(w, 0.5, gae_lambda=0.4, value_lambda=1.0)([w.group()], 0)
    for before, after in zip(plain, decoupled, strict=True):
        assert after.advantages == before.advantages and after.returns is not None and after.rollout is not None
        assert after.returns[len(w.prompt_ids) :] == pytest.approx(
            [after.rollout.reward] * len(after.rollout.response_ids), abs=1e-12
        )
    assert any(before.returns != after.returns for before, after in zip(plain, decoupled, strict=True))


# --- the switch ---


def test_the_explained_variance_of_the_others_is_that_of_a_smaller_batch() -> None:
    rng = np.random.default_rng(0)
    values = [rng.random(length).tolist() for length in (2, 5, 1, 3)]
    rewards = [1.0, 0.0, 0.0, 0.5]
    for i, share in enumerate(explained_by_others(values, rewards)):
        others = [j for j in range(4) if j != i]
        predictions = [v for j in others for v in values[j]]
        assert share == pytest.approx(explained_variance(predictions, [rewards[j] for j in others for _ in values[j]]))
    assert math.isnan(explained_by_others(values[:2], [1.0, 0.0])[0])


def test_rewards_that_differ_by_a_rounding_error_have_no_explained_variance() -> None:
    """0.1 + 0.2 and 0.3 are the same sum of weighted rewards; the variance of the others is then 0 or noise."""
    for other in (0.1 + 0.2, 0.1 + 0.2 + 1e-16):
        shares = explained_by_others([[0.5], [0.1, 0.9], [0.2]], [0.3, other, 1.0])
        assert math.isnan(shares[2]) and not math.isnan(shares[0])


@pytest.mark.parametrize(("value_error", "expected_share"), [(0.0, 0.1723), (0.5, 0.0680)])
def test_the_switch_is_unbiased(value_error: float, expected_share: float) -> None:
    """All groups of three: the value network is the baseline of some rollouts, and the mean of the others of some."""
    w = world(2)
    credit, shares = credit_of(w, value_error, switch_baseline=True), []

    def recorded(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples, metrics = credit(groups, iteration)
        shares.append(metrics["value/baseline_share"])
        return samples, metrics

    assert error(of_groups(w, recorded, 3), 3 * w.table_gradient) < 1e-9
    assert np.mean(shares) == pytest.approx(expected_share, abs=1e-3)


def test_a_bad_value_network_is_replaced_and_trained_nevertheless() -> None:
    def predict(rollouts: Any) -> list[list[float]]:
        return [[-5.0 * rollout.reward] * len(rollout.response_ids) for rollout in rollouts]

    estimation = Estimation(1.0, lambda rollout: [1.0] * len(rollout.response_ids), None, True)
    samples, metrics = critic_credit(predict, estimation)([group_with([1, 0, 0, 1])], 1)
    for sample, expected in zip(samples, (2 / 3, -2 / 3, -2 / 3, 2 / 3), strict=True):
        assert response_part(sample) == pytest.approx([expected] * len(response_part(sample)))
    assert metrics["value/baseline_share"] == 0 and metrics["value/explained_variance"] < 0
    by_critic, _ = gae_credit(predict, gamma=1, gae_lambda=1)([group_with([1, 0, 0, 1])], 1)
    assert [sample.returns for sample in samples] == [sample.returns for sample in by_critic]
    (single,), metrics = critic_credit(predict, estimation)([group_with([1])], 1)
    assert response_part(single) == [6.0, 6.0] and metrics["value/baseline_share"] == 1


def test_settings_that_cannot_be_combined_are_refused() -> None:
    with pytest.raises(UserError, match=r"ppo.gamma is 0.9 and ppo.switch_baseline is true"):
        PPOSettings(gamma=0.9, switch_baseline=True)
    with pytest.raises(UserError, match=r"unknown splitter 'tokens'"):
        PPOSettings(boundaries="tokens")
    one = {"ppo.switch_baseline": "true", "rollouts.num_problems": "1", "learner.minibatch_size": "1"}
    with pytest.raises(UserError, match=r"an iteration has only one rollout"):
        training_config("judgement", one, "ppo")
