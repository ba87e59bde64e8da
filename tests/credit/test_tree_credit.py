"""The algorithm `tree`: the shape of its trees, its advantages by hand, and its expected gradient.

tests/credit/test_tree.py has a second implementation for two levels, whose trees are enumerated here too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.credit.enumerated import cosine, error, length, weighted
from tests.credit.test_ground_truth import policy, world
from tests.credit.test_tree import Tree, copies, families
from tests.world import TableSampler, World
from vineppo.cli.common import training_config
from vineppo.credit.algorithm import CreditParts
from vineppo.credit.tree import TreeSettings, branching_points, sample_trees, tree_credit
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.types import Completion, Rollout, RolloutGroup, Sampler, SampleRequest, TrainingSample, UserError


def parts_of(w: World, group_size: int, sampler: Sampler | None = None) -> CreditParts:
    return CreditParts(
        sampler=sampler or TableSampler(w),
        task=w.task,
        codec=w.policy.codec,
        predict_values=lambda rollouts: [],
        run_seed=3,
        group_size=group_size,
        max_new_tokens=w.max_new_tokens,
        temperature=w.temperature,
        stop=(),
    )


def leaves(w: World, *responses: tuple[int, ...], rewards: Sequence[float | None]) -> RolloutGroup:
    """A group with these responses, in this order, and these rewards."""
    rollouts = {outcome.rollout.response_ids: outcome.rollout for outcome in w.outcomes}
    return RolloutGroup(
        w.problem, tuple(replace(rollouts[ids], reward=r) for ids, r in zip(responses, rewards, strict=True))
    )


def trained(sample: TrainingSample) -> list[tuple[float, float]]:
    """(advantage, weight) of each trained token."""
    rows = zip(sample.advantages, sample.weights or (), sample.loss_mask, strict=True)
    return [(advantage, weight) for advantage, weight, mask in rows if mask]


# --- expected gradient ---


def expected_gradient(w: World, **settings: Any) -> np.ndarray:
    """Expected gradient of trees with two branches at the prompt and two after the first token, per leaf."""
    credit = tree_credit(TreeSettings(branch_at="tokens:1", **settings), parts_of(w, 4))

    def terms() -> Iterable[tuple[float, TrainingSample]]:
        for (p, one), (q, other) in itertools.product(families(w, Tree()), repeat=2):
            yield from weighted(credit([RolloutGroup(w.problem, copies(one + other))], 0)[0], p * q)

    return w.table_gradient_of(terms()) / 4


def test_the_expected_gradient_is_the_policy_gradient() -> None:
    w = world(2)
    assert error(expected_gradient(w), w.table_gradient) < 1e-9


def test_the_mean_of_all_edges_as_baseline_gives_half_of_the_gradient() -> None:
    """With B = 2 at each branching point, (B - 1) / B."""
    w = world(2)
    assert error(expected_gradient(w, values="parent"), w.table_gradient / 2) < 1e-9


def test_the_form_of_treerl_is_biased() -> None:
    w = world(2)
    gradient = expected_gradient(w, values="parent_and_root")
    assert length(gradient, w.table_gradient) == pytest.approx(1.0354, abs=1e-3)
    assert cosine(gradient, w.table_gradient) == pytest.approx(0.96868, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "group_size"),
    [
        ({"branch_at": "tokens:2"}, 4),
        ({"branch_at": "steps:1", "splitter": "tests.world:cut_after_a"}, 4),
        pytest.param({"branch_at": "tokens:1", "branches": (2, 2)}, 4, marks=pytest.mark.real),
    ],
)
def test_sampled_trees_have_the_expected_gradient(settings: dict[str, Any], group_size: int) -> None:
    """Sampling and credit together. With the branches (2, 2) there is one edge at the prompt."""
    w, count = world(3, 3), 3000
    chosen, parts = TreeSettings(**settings), parts_of(w, group_size)
    groups = sample_trees(chosen, parts)([w.problem] * count, 0)
    samples, _ = tree_credit(chosen, parts)(groups, 0)
    exact = w.table_gradient.ravel()
    terms = np.array(
        [
            w.table_gradient_of(weighted(samples[i : i + group_size], 1 / group_size)).ravel()
            for i in range(0, len(samples), group_size)
        ]
    )
    assert len(terms) == count
    directions = np.concatenate([exact[None], np.random.default_rng(3).standard_normal((8, exact.size))])
    errors = (terms - exact) @ directions.T / np.linalg.norm(directions, axis=1) / np.linalg.norm(exact)
    standard_errors = errors.std(0) / math.sqrt(count)
    assert standard_errors[0] < 0.046
    assert np.abs(errors.mean(0) / standard_errors).max() < 4.5


# --- the shape of trees ---


class Counting(WrappedSampler):
    """Counts the tokens that are sampled."""

    tokens = 0

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        completions = self.sampler.sample(requests)
        self.tokens += sum(len(completion.token_ids) for group in completions for completion in group)
        return completions


@pytest.mark.parametrize("branches", [(2,), (2, 2), (3, 2)])
def test_every_sampled_token_is_trained_once_with_the_number_of_its_leaves(branches: tuple[int, ...]) -> None:
    w = world(4)
    group_size = 2 * math.prod(branches)
    settings, sampler = TreeSettings(branches=branches, branch_at="tokens:1"), Counting(TableSampler(w))
    parts = parts_of(w, group_size, sampler)
    groups = sample_trees(settings, parts)([w.problem] * 30, 1)
    samples, metrics = tree_credit(settings, parts)(groups, 1)
    assert [sample.rollout for sample in samples] == [rollout for group in groups for rollout in group.rollouts]
    assert len({id(sample.rollout) for sample in samples}) == 30 * group_size
    assert sum(sum(sample.loss_mask) for sample in samples) == sampler.tokens
    weights = sum(sum(sample.trained_weights) for sample in samples)
    assert weights == sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)
    assert metrics["credit/leaves_per_token"] == pytest.approx(weights / sampler.tokens)
    points = branching_points(settings, parts)
    for group in groups:
        whole = math.prod(branches)
        for start in range(0, group_size, whole):
            family = group.rollouts[start : start + whole]
            (first,) = {rollout.response_ids[0] for rollout in family}
            assert (first == 0) == (points(family[0]) == [])
            assert len({rollout.response_ids for rollout in family}) == 1 or first != 0
    text = policy().codec.decode
    assert all(rollout.text == text(rollout.response_ids) for group in groups for rollout in group.rollouts)


def test_logprobs_rewards_and_seeds() -> None:
    """Leaves have the log-probabilities and rewards of the world, and trees of the same problem differ."""
    w = world(4)
    truth = {outcome.rollout.response_ids: outcome.rollout for outcome in w.outcomes}
    sample = sample_trees(TreeSettings(branch_at="tokens:1"), parts_of(w, 4, w.sampler()))
    groups = sample([w.problem, w.problem], 0)
    for rollout in (rollout for group in groups for rollout in group.rollouts):
        known = truth[rollout.response_ids]
        assert rollout.sampler_logprobs == pytest.approx(known.sampler_logprobs, abs=1e-4)
        assert replace(rollout, sampler_logprobs=()) == replace(known, sampler_logprobs=())
    assert groups[0] != groups[1]
    other = replace(w.problem, id="other")
    assert sample([other, w.problem, w.problem], 0)[1:] == groups  # other problems change nothing
    assert sample([w.problem, w.problem], 0) == groups and sample([w.problem], 1)[0] != groups[0]


def test_branching_points() -> None:
    w = world(4)
    rollouts: dict[int, Rollout] = {len(o.rollout.response_ids): o.rollout for o in w.outcomes}
    points: Any = lambda n, **settings: branching_points(TreeSettings(**settings), parts_of(w, 4))(rollouts[n])  # noqa: E731
    assert [points(n) for n in (1, 2, 3, 4)] == [[], [], [2], [2]]
    assert [points(n, branches=(2, 2, 2)) for n in (1, 2, 3, 4)] == [[], [1], [1, 2], [1, 2, 3]]
    assert [points(n, branches=(2, 2), branch_at="tokens:1") for n in (2, 3, 4)] == [[1], [1, 2], [1, 2]]
    by_steps = {"branch_at": "steps:1", "splitter": "tests.world:cut_after_a", "branches": (2, 2)}
    chosen = branching_points(TreeSettings(**by_steps), parts_of(w, 4))
    assert [
        chosen(next(o.rollout for o in w.outcomes if o.rollout.response_ids == ids))
        for ids in [(1, 1, 1, 0), (2, 2, 0), (2, 1, 0), (2, 2, 1, 2), (2, 2, 2, 1)]
    ] == [[1, 2], [], [2], [3], []]


# --- advantages by hand ---


def test_advantages_by_hand() -> None:
    """Two edges at the prompt with the values 1/2 and 1, each with two leaves."""
    w = world(4)
    group = leaves(w, (1, 0), (1, 2, 0), (3, 3, 0), (3, 0), rewards=[1, 0, 1, 1])
    by_form = {}
    for values in ("siblings", "parent", "parent_and_root"):
        settings: dict[str, Any] = {"values": values}
        samples, metrics = tree_credit(TreeSettings(branch_at="tokens:1", **settings), parts_of(w, 4))([group], 1)
        by_form[values] = [trained(sample) for sample in samples]
        assert metrics["credit/edges"] == 6 and metrics["credit/distinct_leaf_share"] == 1
        assert metrics["credit/leaves_per_token"] == 10 / 8
    assert by_form["siblings"] == [
        [(-0.5, 2), (1, 1)], [(-1, 1), (-1, 1)], [(0.5, 2), (0, 1), (0, 1)], [(0, 1)],
    ]  # fmt: skip
    assert by_form["parent"] == [
        [(-0.25, 2), (0.5, 1)], [(-0.5, 1), (-0.5, 1)], [(0.25, 2), (0, 1), (0, 1)], [(0, 1)],
    ]  # fmt: skip
    half = pytest.approx(0.5 / math.sqrt(2))
    assert by_form["parent_and_root"] == [
        [(pytest.approx(-0.5 / math.sqrt(2)), 2), (0.75, 1)],
        [(-1.25, 1), (-1.25, 1)],
        [(half, 2), (0.25, 1), (0.25, 1)],
        [(0.25, 1)],
    ]


def test_a_response_that_ended_early_is_trained_once() -> None:
    w = world(4)
    group = leaves(w, (0,), (0,), (1, 0), (1, 2, 0), rewards=[1, 1, 0, 1])
    samples, metrics = tree_credit(TreeSettings(branch_at="tokens:1"), parts_of(w, 4))([group], 1)
    assert [trained(sample) for sample in samples] == [[(0.5, 2)], [], [(-0.5, 2), (-1, 1)], [(1, 1), (1, 1)]]
    assert metrics["credit/distinct_leaf_share"] == 3 / 4


def test_a_single_edge_at_the_prompt_is_compared_with_the_other_trees() -> None:
    w = world(4)
    groups = [leaves(w, (1, 0), (1, 2, 0), rewards=rewards) for rewards in ([1, 0], [1, 1], [None, None])]
    credit = tree_credit(TreeSettings(branch_at="tokens:1"), parts_of(w, 2))
    samples, _ = credit(groups, 1)
    assert [trained(sample)[0] for sample in samples[:4:2]] == [(-0.5, 2), (0.5, 2)]
    assert {a for sample in samples[4:] for a in sample.advantages} == {0.0}
    alone, _ = credit(groups[:1], 1)
    assert [trained(sample) for sample in alone] == [[(0, 2), (1, 1)], [(-1, 1), (-1, 1)]]


def test_rewards_that_are_missing_or_equal() -> None:
    w = world(4)
    credit = tree_credit(TreeSettings(branch_at="tokens:1"), parts_of(w, 4))
    responses = [(1, 0), (1, 2, 0), (3, 3, 0), (3, 0)]
    samples, _ = credit([leaves(w, *responses, rewards=[None, 1, 0.5, 0])], 1)
    assert [trained(sample) for sample in samples] == [
        [(0, 1)], [(0.75, 2), (0, 1), (0, 1)], [(-0.75, 2), (0.5, 1), (0.5, 1)], [(-0.5, 1)],
    ]  # fmt: skip
    equal, metrics = credit([leaves(w, *responses, rewards=[0.3] * 4)], 1)
    assert {a for sample in equal for a in sample.advantages} == {0.0} and metrics["credit/zero_edge_share"] == 1


def test_rollouts_that_are_not_a_tree_are_refused() -> None:
    w = world(4)
    credit = tree_credit(TreeSettings(branch_at="tokens:1"), parts_of(w, 4))
    for responses in ([(1, 0), (2, 0), (3, 0), (3, 0)], [(0,), (1, 0), (3, 0), (3, 0)]):
        with pytest.raises(ValueError, match="not the leaves of a tree"):
            credit([leaves(w, *responses, rewards=[1, 0, 1, 0])], 1)


def cut_before_the_end(token_texts: Sequence[str], logprobs: Sequence[float]) -> list[int]:
    """A splitter that looks ahead: it cuts before the last token."""
    return sorted({len(token_texts) - 1, len(token_texts)} - {0})


def cut_by_the_length(token_texts: Sequence[str], logprobs: Sequence[float]) -> list[int]:
    """A splitter that looks ahead: a response of four tokens has later cuts than one of three."""
    return [2, 3, 4] if len(token_texts) == 4 else list(range(1, len(token_texts) + 1))


@pytest.mark.parametrize(
    ("splitter", "branches", "responses"),
    [
        (cut_before_the_end, (2,), [(1, 2, 0), (1, 0)]),
        # The second branch begins after two tokens, where its own second cut is.
        (cut_by_the_length, (2, 2), [(1, 2, 3, 0), (1, 2, 3, 0), (1, 2, 0), (1, 2, 0)]),
    ],
)
def test_a_splitter_that_looks_ahead_is_refused_in_one_line(
    splitter: Any, branches: tuple[int, ...], responses: list[tuple[int, ...]]
) -> None:
    w = world(4)
    name = f"{__name__}:{splitter.__name__}"
    credit = tree_credit(TreeSettings(branch_at="steps:1", splitter=name, branches=branches), parts_of(w, 4))
    message = f"tree.splitter .*:{splitter.__name__}' cuts responses with the same first tokens at different places"
    with pytest.raises(UserError, match=message) as raised, pytest.warns(UserWarning, match="cuts by later tokens"):
        credit([leaves(w, *responses, rewards=[1, 0] * (len(responses) // 2))], 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tree.branches": "3"}, r"rollouts.group_size is 4, but with tree.branches \[3\] each response at the prompt"),
        ({"tree.branches": "2,1"}, r"tree.branches is \[2, 1\]; it must have at least one number"),
        ({"tree.branch_at": "middle"}, r"tree.branch_at is 'middle'; allowed: budget, tokens:N or steps:N"),
        ({"tree.branch_at": "tokens:0"}, r"tree.branch_at is 'tokens:0'"),
        ({"tree.splitter": "lines"}, r"unknown splitter 'lines'"),
        ({"learner.mask_truncated": "true"}, r"learner.mask_truncated is true, but a truncated response of a tree"),
    ],
)
def test_settings_that_cannot_be_used_are_refused_in_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        training_config("judgement", settings, "tree")
    assert "\n" not in str(raised.value)
