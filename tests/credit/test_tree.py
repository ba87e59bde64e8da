"""A tree of two levels: an example of an algorithm whose training samples are not its rollouts.

P prefixes are sampled for a problem, and n continuations of each prefix. The group has P * n rollouts, of which n
neighbouring ones share a prefix. The credit of a prefix is the mean reward of its leaves minus that of the leaves of
the *other* prefixes. The credit of a leaf is its reward minus the mean reward of its n - 1 siblings. Each baseline is
independent of the tokens whose credit it is part of, so the expected gradient is the policy gradient. The samples have
two equivalent forms: one sample per edge, in which prefix tokens have the weight n, or one sample per leaf with all its
tokens. The tests use the learner of the package for both.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import update_with_gradient
from tests.world import World, build_policy, build_world
from vineppo.config.schema import CriticConfig, KLConfig, LearnerConfig
from vineppo.credit.sample import reward_of, training_sample
from vineppo.learning.learner import TorchLearner
from vineppo.model.policy import Policy, Reference
from vineppo.run.records import rollout_rows
from vineppo.types import CreditFn, Metrics, Rollout, RolloutGroup, TrainingSample

ABSOLUTE = 1e-6
SIGMAS = 4.5


@dataclass(frozen=True)
class Tree:
    """Settings of the algorithm, and options that introduce mistakes."""

    num_leaves: int = 2
    """n: number of continuations of a prefix."""
    prefix_tokens: int = 1
    """Length of a prefix; a response that ends within it is a prefix with n equal leaves."""
    as_edges: bool = True
    prefix_weight: float | None = None
    """None: the correct weight n."""
    biased_prefix_baseline: bool = False
    """Include the prefix's leaves in the baseline of the prefix."""
    biased_leaf_baseline: bool = False
    """Include the leaf's reward in the baseline of the leaf."""


def tree_credit(tree: Tree) -> CreditFn:
    """Build the credit function."""

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        for group in groups:
            n = tree.num_leaves
            families = [group.rollouts[i : i + n] for i in range(0, len(group.rollouts), n)]
            means = [fmean(reward_of(rollout) for rollout in family) for family in families]
            for number, family in enumerate(families):
                others = means if tree.biased_prefix_baseline else means[:number] + means[number + 1 :]
                samples += family_samples(tree, family, means[number] - fmean(others))
        return samples, {}

    return credit


def family_samples(tree: Tree, family: Sequence[Rollout], prefix_advantage: float) -> Iterator[TrainingSample]:
    """Training samples of the leaves of one prefix."""
    n, d = tree.num_leaves, min(tree.prefix_tokens, len(family[0].response_ids))
    weight = n if tree.prefix_weight is None else tree.prefix_weight
    prefix = replace(
        family[0], response_ids=family[0].response_ids[:d], sampler_logprobs=family[0].sampler_logprobs[:d]
    )
    if tree.as_edges:
        sample = training_sample(prefix, [prefix_advantage] * d, weights_T=[weight] * d)
        yield replace(sample, rollout=family[0] if prefix == family[0] else None)
    for leaf in family:
        tokens = len(leaf.response_ids) - d
        siblings = fmean(reward_of(r) for r in family if r is not leaf or tree.biased_leaf_baseline)
        advantages = [prefix_advantage] * d + [reward_of(leaf) - siblings] * tokens
        if not tree.as_edges:
            yield training_sample(leaf, advantages)
        elif tokens:
            yield training_sample(leaf, [0.0] * d + advantages[d:], weights_T=[0.0] * d + [1.0] * tokens)


@cache
def world(max_new_tokens: int) -> World:
    return build_world(max_new_tokens, policy=build_policy())


def build_learner(w: World, policy: Policy | None = None, reference: bool = False, **options: Any) -> TorchLearner:
    """A learner with one minibatch. The learning rate is 0 by default, so the policy does not change."""
    config = LearnerConfig(**{"lr": 0.0, "epochs": 1, "minibatch_size": 1 << 20, "max_grad_norm": 0.0, **options})
    start = Reference(build_policy(seed=3)) if reference else None
    return TorchLearner(
        policy or w.policy, start, None, config, CriticConfig(), temperature=w.temperature, total_updates=9, seed=0
    )


def summed_gradient(w: World, samples: Sequence[TrainingSample], num_rollouts: int) -> torch.Tensor:
    """Sum over tokens of weight * A_t * grad log pi(a_t): the learner's gradient times its denominator."""
    gradient, _ = update_with_gradient(build_learner(w), samples, num_rollouts)
    return -gradient * sum(sum(sample.trained_weights) for sample in samples)


# --- exact expectations: all trees that can be sampled, with their probabilities ---


def families(w: World, tree: Tree) -> list[tuple[float, tuple[Rollout, ...]]]:
    """(probability, leaves) for every prefix and every tuple of its continuations."""
    by_prefix: dict[tuple[int, ...], list[tuple[float, Rollout]]] = defaultdict(list)
    for outcome in w.outcomes:
        by_prefix[outcome.rollout.response_ids[: tree.prefix_tokens]].append((outcome.probability, outcome.rollout))
    result = []
    for leaves in by_prefix.values():
        prefix_probability = sum(probability for probability, _ in leaves)
        if len(leaves) == 1:  # the response ends within the prefix
            result.append((prefix_probability, copies([leaves[0][1]] * tree.num_leaves)))
            continue
        for family in itertools.product(leaves, repeat=tree.num_leaves):
            probability = prefix_probability * math.prod(p / prefix_probability for p, _ in family)
            result.append((probability, copies([rollout for _, rollout in family])))
    return result


def copies(rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
    """One new object per rollout, as in sampled groups."""
    return tuple(replace(rollout) for rollout in rollouts)


def expected_gradient(w: World, tree: Tree) -> torch.Tensor:
    """Expected gradient per rollout over all pairs of families (P = 2).

    The samples of all trees are trained in one update: the weight of a token is multiplied by the probability of its
    tree, and samples with the same tokens are added up. This is exact because at a ratio of 1 the gradient is linear in
    weight * advantage.
    """
    credit = tree_credit(tree)
    samples: dict[tuple[int, ...], TrainingSample] = {}
    sums: dict[tuple[int, ...], np.ndarray] = {}
    for (p, one), (q, other) in itertools.product(families(w, tree), repeat=2):
        for sample in credit([RolloutGroup(w.problem, one + other)], 0)[0]:
            weights = p * q * np.array(sample.weights or sample.loss_mask, dtype=float)
            previous = sums.get(sample.token_ids, 0.0)
            sums[sample.token_ids] = previous + np.stack([weights, weights * np.array(sample.advantages)])
            samples[sample.token_ids] = sample
    merged = []
    for token_ids, (weights, credits) in sums.items():
        advantages = np.divide(credits, weights, out=np.zeros_like(credits), where=weights > 0)
        row, counts = tuple(advantages.tolist()), tuple(weights.tolist())
        merged.append(replace(samples[token_ids], advantages=row, weights=counts))
    return summed_gradient(w, merged, 1) / (2 * tree.num_leaves)


def test_families_enumerates_everything_that_can_be_sampled() -> None:
    w, tree = world(2), Tree()
    enumerated = families(w, tree)
    assert len(enumerated) == 1 + 4 * 5**2 and sum(p for p, _ in enumerated) == pytest.approx(1, abs=1e-9)
    expected = sum(p * fmean(reward_of(r) for r in family) for p, family in enumerated)
    assert expected == pytest.approx(w.value(()), abs=1e-9)


@pytest.mark.parametrize("as_edges", [True, False])
def test_the_expected_gradient_is_the_policy_gradient(as_edges: bool) -> None:
    w = world(2)
    gradient = expected_gradient(w, Tree(as_edges=as_edges))
    assert (gradient - w.exact_gradient()).abs().max() < ABSOLUTE


WRONG = {
    "prefix weight 1 instead of 2": Tree(prefix_weight=1.0),
    "prefix weight 3 instead of 2": Tree(prefix_weight=3.0),
    "the prefix's leaves are in its baseline": Tree(biased_prefix_baseline=True),
    "the leaf's reward is in its baseline": Tree(biased_leaf_baseline=True),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_causes_a_bias(mistake: str) -> None:
    w = world(2)
    assert (expected_gradient(w, WRONG[mistake]) - w.exact_gradient()).abs().max() > 0.01


# --- sampled trees of a larger world, in both forms ---

LARGE = Tree(num_leaves=3, prefix_tokens=2)


def sampled_group(w: World, tree: Tree, num_prefixes: int, seed: int) -> RolloutGroup:
    """A group of P prefixes with n leaves each, drawn with the exact probabilities."""
    rng = np.random.default_rng(seed)
    rollouts = [outcome.rollout for outcome in w.outcomes]
    probabilities = np.array(w.probabilities) / sum(w.probabilities)
    leaves: list[Rollout] = []
    for first in rng.choice(len(rollouts), num_prefixes, p=probabilities):
        prefix = rollouts[first].response_ids[: tree.prefix_tokens]
        matching = np.array([r.response_ids[: tree.prefix_tokens] == prefix for r in rollouts]) * probabilities
        drawn = rng.choice(len(rollouts), tree.num_leaves, p=matching / matching.sum())
        leaves += copies([rollouts[i] for i in drawn])
    return RolloutGroup(w.problem, tuple(leaves))


def z_scores(gradients: Sequence[torch.Tensor], exact: torch.Tensor) -> list[float]:
    """Error of the mean gradient in standard errors, along the exact gradient and eight fixed directions."""
    random = torch.randn(8, len(exact), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = (torch.stack(list(gradients)) - exact) @ torch.cat([exact[None], random]).T  # (iterations, 9)
    return (errors.mean(0) / (errors.std(0) / math.sqrt(len(errors)))).tolist()


def sampled_gradients(tree: Tree, iterations: int) -> list[torch.Tensor]:
    w, P = world(4), 4
    gradients = []
    for seed in range(iterations):
        samples, _ = tree_credit(tree)([sampled_group(w, tree, P, seed)], seed)
        gradients.append(summed_gradient(w, samples, P * tree.num_leaves) / (P * tree.num_leaves))
    return gradients


def test_sampled_trees_are_unbiased_and_wrong_weights_cause_a_bias() -> None:
    exact = world(4).exact_gradient()
    assert max(map(abs, z_scores(sampled_gradients(LARGE, 200), exact))) < SIGMAS
    assert max(map(abs, z_scores(sampled_gradients(replace(LARGE, prefix_weight=1.0), 200), exact))) > 2 * SIGMAS


@pytest.mark.parametrize(
    "options",
    [
        {"reference": True, "kl": KLConfig(coefficient=0.1), "entropy_coefficient": 0.01},
        {"reference": True, "kl": KLConfig(coefficient=0.1, reduction="token_mean"), "advantage_scaling": "std"},
        {"advantage_scaling": "whiten", "micro_batch_tokens": 16},
    ],
)
def test_both_forms_have_the_same_gradient_and_metrics(options: dict[str, Any]) -> None:
    w = world(4)
    for seed in range(3):
        group = sampled_group(w, LARGE, 4, seed)
        results = []
        for tree in (LARGE, replace(LARGE, as_edges=False)):
            samples, _ = tree_credit(tree)([group], 1)
            gradient, _ = update_with_gradient(build_learner(w, **options), samples, len(group.rollouts))
            learner = build_learner(w, build_policy(), **{**options, "lr": 3e-3, "epochs": 4})
            metrics = learner.update(samples, 1, len(group.rollouts))
            results.append((len(samples), gradient, metrics))
        (num_edges, edge_gradient, edge_metrics), (num_leaves, leaf_gradient, leaf_metrics) = results
        assert num_leaves == 12 != num_edges and edge_gradient.abs().max() > 0.01
        assert (edge_gradient - leaf_gradient).abs().max() < ABSOLUTE
        assert edge_metrics["policy/kl_old"] > 1e-5
        # The leaves repeat sampled tokens, so their standard error does not count each token once.
        edge_metrics.pop("policy/logprob_excess_error"), leaf_metrics.pop("policy/logprob_excess_error")
        assert edge_metrics == pytest.approx(leaf_metrics, rel=1e-4, abs=1e-6)


def test_a_small_tree_by_hand() -> None:
    """Two prefixes with two leaves of two and three tokens: rewards 1, 0 and 1, 1.

    The advantages of the prefixes are 1/2 - 1 and 1 - 1/2, those of the leaves 1, -1, 0, 0. The weights are 2 + 2 for
    the prefixes and 1 + 2 + 2 + 1 for the leaves, so the mean advantage is (2 * -1/2 + 2 * 1/2 + 1 * 1 - 2 * 1) / 10.
    """
    w = world(4)
    rollouts = {outcome.rollout.response_ids: outcome.rollout for outcome in w.outcomes}
    chosen = {(1, 0): 1.0, (1, 2, 0): 0.0, (3, 3, 0): 1.0, (3, 0): 1.0}
    group = RolloutGroup(w.problem, tuple(replace(rollouts[ids], reward=reward) for ids, reward in chosen.items()))
    for as_edges in (True, False):
        samples, _ = tree_credit(Tree(as_edges=as_edges))([group], 1)
        metrics = build_learner(w).update(samples, 1, 4)
        assert metrics["policy/loss"] == pytest.approx(0.1, abs=1e-6)
        assert metrics["credit/advantage_abs_mean"] == pytest.approx((2 * 0.5 + 2 * 0.5 + 1 + 2) / 10)
        rows = rollout_rows(1, [group], samples, str)
        assert [row["kind"] for row in rows] == ["rollout"] * 4 + ["sample"] * 2 * as_edges
    edges, _ = tree_credit(Tree())([group], 1)
    assert [sum(sample.trained_weights) for sample in edges] == [2, 1, 2, 2, 2, 1]
    assert [sample.advantages[-1] for sample in edges] == [-0.5, 1, -1, 0.5, 0, 0]
