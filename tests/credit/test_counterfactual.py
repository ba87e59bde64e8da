"""Counterfactual credit: its expected gradient in the enumerable world, and what coupling saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.credit.enumerated import error
from tests.world import EOS, World, build_world
from vineppo.cli.common import training_config
from vineppo.credit.algorithm import CreditParts
from vineppo.credit.counterfactual import (
    CounterfactualSettings,
    _Branch,
    _chance,
    _credit_of_other,
    counterfactual_credit,
)
from vineppo.credit.sample import training_sample
from vineppo.seeds import derive_seed
from vineppo.types import Alternative, Capabilities, Completion, Metrics, SampleRequest, TrainingSample, UserError

RESPONSES = 20_000
"""Number of responses; enough for a standard error of the gradient's length of at most 2.5%."""


def parts(world: World) -> CreditParts:
    return CreditParts(
        sampler=world.sampler(),
        task=world.task,
        codec=world.policy.codec,
        predict_values=lambda rollouts: [],
        run_seed=5,
        group_size=1,
        max_new_tokens=world.max_new_tokens,
        temperature=world.temperature,
        stop=(),
    )


def credit_of(
    world: World, count: int, openness: float, coupled: bool, lowest_reward: float = 0.0
) -> tuple[list[TrainingSample], Metrics]:
    settings = CounterfactualSettings(openness=openness, coupled=coupled, lowest_reward=lowest_reward)
    return counterfactual_credit(settings, parts(world))([world.sampled_group(count, 0)], 0)


@pytest.mark.parametrize(
    ("openness", "coupled", "lowest_reward"),
    # With the lowest reward -1, responses without reward are branched, too.
    [(0.5, True, 0.0), (1.0, True, 0.0), (1.0, False, 0.0), (0.5, True, -1.0), (0.5, False, -1.0)],
)
def test_the_expected_gradient_is_the_policy_gradient(openness: float, coupled: bool, lowest_reward: float) -> None:
    world = build_world(3)
    samples, _ = credit_of(world, RESPONSES, openness, coupled, lowest_reward)
    exact = world.table_gradient.ravel()
    terms = np.array([world.table_gradient_of([(1.0, sample)]).ravel() for sample in samples])
    # Rarely reached states have too few terms for a normal distribution of their mean.
    often = (terms != 0).sum(0) > 500
    assert np.linalg.norm(exact[often]) > 0.8 * np.linalg.norm(exact)
    error = terms.std(0, ddof=1) / math.sqrt(len(samples))
    assert np.abs((terms.mean(0) - exact)[often] / error[often]).max() < 4.5
    along = terms @ exact / (exact @ exact)  # its expectation is 1
    assert along.mean() == pytest.approx(1, abs=4.5 * along.std() / math.sqrt(len(samples)))
    assert along.std() / math.sqrt(len(samples)) < 0.025


Tokens = tuple[int, ...]


def tails(w: World, state: Tokens, of_draft: Tokens, draft: Tokens) -> Iterator[tuple[Tokens, float]]:
    """All continuations of a state with their probabilities, given a draft that was sampled from another state."""
    if state[-1] == EOS or len(state) == w.max_new_tokens:
        yield (), 1.0
        return
    p, taken, rest = w.table[state], 0.0, w.table[state]
    if draft:
        q, token = w.table[of_draft], draft[0]
        taken, rest = min(1.0, p[token] / q[token]), np.maximum(p - q, 0)
        for tail, chance in tails(w, (*state, token), (*of_draft, token), draft[1:]):
            yield (token, *tail), taken * chance
    for token in range(len(p)):
        if taken < 1 and rest[token] > 0:
            for tail, chance in tails(w, (*state, token), (), ()):
                yield (token, *tail), (1 - taken) * rest[token] / rest.sum() * chance


def expected_credit(w: World, settings: CounterfactualSettings, excluded_first: bool) -> list[TrainingSample]:
    """One sample per response, with the expectation of its credit over all branches, tokens and continuations."""
    sampler: Any = SimpleNamespace(capabilities=Capabilities(excluded_first=excluded_first, reproducible=True))
    chosen, samples = replace(parts(w), sampler=sampler), []
    rewards = {outcome.rollout.response_ids: outcome.rollout.reward for outcome in w.outcomes}
    for rollout in (outcome.rollout for outcome in w.outcomes):
        ids = rollout.response_ids
        advantages, others = [0.0] * len(ids), []
        for at in range(len(ids) if rollout.reward != settings.lowest_reward else 0):
            table, prefix = w.table[ids[:at]], ids[:at]
            behind = ids[at + 1 :] if settings.coupled else ()
            chance = _chance(settings, 1 - table[ids[at]])
            branch = _Branch(0, 0, at, 1 - table[ids[at]], chance)
            for token in set(range(len(table))) - ({ids[at]} if excluded_first else set()):
                drawn = table[token] / (branch.others if excluded_first else 1)
                for tail, p in tails(w, (*prefix, token), ids[: at + 1], behind):
                    completion = Completion((token, *tail), (math.log(drawn), *[0.0] * len(tail)), "stop")
                    reward = rewards[(*prefix, token, *tail)]
                    other = _credit_of_other(settings, chosen, rollout, branch, completion, reward)
                    if other is not None:
                        share = chance * drawn * p * other.advantage
                        others.append(Alternative(at, token, share))
                        advantages[at] -= share
        samples.append(training_sample(rollout, advantages, alternatives=others))
    return samples


@pytest.mark.parametrize("lowest_reward", [0.0, -1.0])
@pytest.mark.parametrize(
    ("openness", "coupled", "excluded_first"),
    # 1 - p is between 0.08 and 1 at the places of this world; with 0.7, a quarter of them is branched by chance.
    [(0.7, True, True), (1.0, True, True), (0.7, False, True), (0.7, False, False)],
)
def test_the_expected_gradient_is_exact(
    openness: float, coupled: bool, excluded_first: bool, lowest_reward: float
) -> None:
    """Enumeration finds errors of a few percent, which the noise of the samples above hides."""
    w = build_world(3)
    settings = CounterfactualSettings(openness=openness, coupled=coupled, lowest_reward=lowest_reward)
    samples = expected_credit(w, settings, excluded_first)
    assert error(w.table_gradient_of(zip(w.probabilities, samples, strict=True)), w.table_gradient) < 1e-9


@pytest.mark.parametrize("lowest_reward", [0.0, -1.0])
def test_the_two_tokens_of_a_pair_have_opposite_credit(lowest_reward: float) -> None:
    world = build_world(4)
    samples, _ = credit_of(world, 50, 0.5, True, lowest_reward)
    prompt = len(world.prompt_ids)
    pairs = 0
    for sample in samples:
        assert sample.rollout is not None
        of_others = {alternative.position: alternative.advantage for alternative in sample.alternatives}
        assert sample.rollout.reward or lowest_reward or not of_others
        for position, advantage in enumerate(sample.advantages[prompt:]):
            assert advantage == -of_others.pop(position, 0.0)
            assert sample.rollout.reward or advantage <= 0  # no reward is below 0
            pairs += advantage != 0
        assert not of_others
    assert pairs > 20


def test_the_order_of_the_problems_changes_nothing() -> None:
    """A rollout's branches and continuations depend on its problem, not on what stands before it."""
    w = build_world(4)
    groups = [replace(w.sampled_group(3, i), problem=replace(w.problem, id=f"p{i}")) for i in range(4)]
    credit = counterfactual_credit(CounterfactualSettings(openness=0.7), parts(w))
    forward, backward = credit(groups, 0)[0], credit(groups[::-1], 0)[0]
    assert sum(len(sample.alternatives) for sample in forward) > 3
    reordered = [sample for i in range(4) for sample in backward[3 * (3 - i) : 3 * (4 - i)]]
    assert reordered == forward


def test_random_numbers_are_addressed_by_the_number_of_the_rollout_of_its_problem() -> None:
    """Seeds are made of whole numbers and texts. The first rollout has no reward, and is counted nevertheless."""
    w = build_world(4)
    group = w.sampled_group(3, 0)
    rollouts = tuple(replace(r, reward=None if i == 0 else 1.0) for i, r in enumerate(group.rollouts))
    requests: list[SampleRequest] = []
    given = parts(w)

    class Recording:
        capabilities = given.sampler.capabilities

        def sample(self, asked: Sequence[SampleRequest], *rest: Any, **named: Any) -> list[list[Completion]]:
            requests.extend(asked)
            return given.sampler.sample(asked, *rest, **named)

    sampler: Any = Recording()
    credit = counterfactual_credit(CounterfactualSettings(openness=0.01), replace(given, sampler=sampler))
    credit([replace(group, rollouts=rollouts)], 7)
    expected = {
        derive_seed(given.run_seed, 7, w.problem.id, "counterfactual", number, at)
        for number in (1, 2)
        for at in range(len(rollouts[number].response_ids))
    }
    assert len(requests) > 3 and {request.seed for request in requests} <= expected


def test_a_reward_below_the_lowest_one_is_an_error() -> None:
    with pytest.raises(UserError, match=r"the reward 0[.0-9]*, .* counterfactual.lowest_reward 0\.5"):
        credit_of(build_world(4), 50, 0.5, True, 0.5)


@pytest.mark.parametrize(("key", "value"), [("learner.kl.place", "reward"), ("learner.advantage_scaling", "whiten")])
def test_settings_that_would_change_other_tokens_are_refused(key: str, value: str) -> None:
    settings = {"learner.kl.coefficient": "0.001", key: value}
    with pytest.raises(UserError, match=f"{key} is {value}"):
        training_config("judgement", settings, "counterfactual")


def test_coupling_lowers_the_noise_and_the_tokens() -> None:
    world = build_world(4)
    noise, tokens = {}, {}
    for coupled in (True, False):
        samples, metrics = credit_of(world, 4000, 1.0, coupled)
        noise[coupled] = np.mean([sum(a.advantage**2 for a in sample.alternatives) for sample in samples])
        tokens[coupled] = metrics["tokens/mc"]
        assert (metrics["tokens/scored"] > 0) == coupled
    assert tokens[True] < 0.9 * tokens[False]
    assert noise[True] < 0.9 * noise[False]
