"""Weights of tokens: the update of a tree of responses does not depend on how it is split into samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import update_with_gradient
from tests.learning.test_learner import (
    NONE,
    RAGGED,
    TWO,
    build_learner,
    build_policy,
    build_samples,
    logprobs_of,
    weights,
    with_alternatives,
)
from vineppo.config.schema import CriticConfig, KLConfig, LoraConfig, ModelConfig
from vineppo.learning.experience import Experience, minibatches
from vineppo.learning.losses import clipped_policy_loss, clipped_value_loss, kl_estimate
from vineppo.learning.optim import lr_factor
from vineppo.learning.scaling import penalties_to_go, scale_advantages
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy
from vineppo.types import Alternative, TrainingSample, UserError

# --- a small tree by hand: a prefix of one token, followed by a response of one token and one of two ---


def sample_of(token_ids: tuple[int, ...], advantages: tuple[float, ...], weight: float | None = None) -> TrainingSample:
    """Return a sample that trains the last len(advantages) tokens."""
    before, zeros = len(token_ids) - len(advantages), (0.0,) * (len(token_ids) - len(advantages))
    return TrainingSample(
        token_ids=token_ids,
        loss_mask=(0,) * before + (1,) * len(advantages),
        sampler_logprobs=zeros + (-1.0,) * len(advantages),
        advantages=zeros + advantages,
        weights=None if weight is None else zeros + (weight,) * len(advantages),
    )


def small_tree() -> list[TrainingSample]:
    prefix = sample_of((5, 6, 7), (0.5,), weight=2.0)
    return [prefix, sample_of((5, 6, 7, 8), (1.0,)), sample_of((5, 6, 7, 9, 10), (-0.25, -0.25))]


def test_denominators_by_hand() -> None:
    """The tree has five tokens, because the prefix counts twice. Advantages: .5, .5, 1, -.25, -.25."""
    policy, reference = build_policy(dtype=torch.float64), build_policy(seed=1, dtype=torch.float64)
    learner = build_learner(policy, reference, kl=KLConfig(coefficient=0.0), lr=0.0)
    metrics = learner.update(small_tree(), 1, num_rollouts=2)
    assert metrics["policy/loss"] == pytest.approx(-1.5 / 5, abs=1e-6)
    assert metrics["credit/advantage_abs_mean"] == pytest.approx(2.5 / 5)
    variance = (2 * 0.2**2 + 0.7**2 + 2 * 0.55**2) / 5
    scaled = build_learner(policy, advantage_scaling="std", lr=0.0).update(small_tree(), 1, num_rollouts=2)
    assert scaled["policy/loss"] == pytest.approx(-0.3 / math.sqrt(variance), abs=1e-6)
    whitened = build_learner(policy, advantage_scaling="whiten", lr=0.0).update(small_tree(), 1, num_rollouts=2)
    assert whitened["policy/loss"] == pytest.approx(0, abs=1e-6)

    rows = zip(logprobs_of(policy, small_tree()), logprobs_of(reference, small_tree()), strict=True)
    prefix, one, two = (kl_estimate(a.detach(), b.detach(), "k3", 10.0) for a, b in rows)
    total = (2 * prefix.sum() + one.sum() + two.sum()).item()
    assert metrics["kl/ref"] == pytest.approx(total / 2, rel=1e-5)
    for reduction, count in (("sequence_sum", 2), ("token_mean", 5)):
        kl = KLConfig(coefficient=0.3, reduction=reduction)
        learner = build_learner(policy, reference, kl=kl, lr=0.0, micro_batch_tokens=1)
        objective = learner.update(small_tree(), 1, num_rollouts=2)["policy/objective"]
        assert objective == pytest.approx(-0.3 + 0.3 * total / count, abs=1e-5)


def test_penalties_after_a_shared_prefix_are_the_mean_over_its_continuations() -> None:
    tree = small_tree()
    assert penalties_to_go(tree, [[1.0], [4.0], [2.0, 3.0]]) == [[1 + (4 + 5) / 2], [4.0], [5.0, 3.0]]
    heavier = [tree[0], replace(tree[1], weights=(0.0, 0.0, 0.0, 3.0)), tree[2]]
    assert penalties_to_go(heavier, [[1.0], [4.0], [2.0, 3.0]])[0] == [1 + (3 * 4 + 5) / 4]
    # A continuation that contains the prefix's tokens with weight 0 counts as a continuation too.
    with_prefix = replace(tree[2], loss_mask=(0, 0, 1, 1, 1), weights=(0.0, 0.0, 0.0, 1.0, 1.0))
    assert penalties_to_go([tree[0], tree[1], with_prefix], [[1.0], [4.0], [9.0, 2.0, 3.0]])[0] == [1 + (4 + 5) / 2]
    assert penalties_to_go(build_samples(TWO), [[1.0, 2.0], [1.0] * 5]) == [[3.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]]


def test_weighted_sums_by_hand() -> None:
    """Ratios 2, 2, 0.5 at advantages 1, 1, -1: clipped to 1.2, 1.2, 0.8."""
    new, old = torch.tensor([2.0, 2.0, 0.5]).log(), torch.zeros(3)
    loss, clipped = clipped_policy_loss(
        new, old, torch.tensor([1.0, 1.0, -1.0]), 0.2, 0.2, torch.tensor([1.0, 3.0, 0.5])
    )
    assert loss.item() == pytest.approx(-1.2 - 3 * 1.2 + 0.5 * 0.8) and clipped.item() == 4.5
    value = clipped_value_loss(torch.ones(2), torch.ones(2), torch.tensor([0.0, 3.0]), 0.0, torch.tensor([2.0, 0.25]))
    assert value.item() == pytest.approx(0.5 * (2 * 1 + 0.25 * 4))
    assert scale_advantages([[1.0], [3.0]], "whiten", [[3.0], [1.0]]) == [
        [pytest.approx(-0.5 / math.sqrt(0.75))],
        [pytest.approx(1.5 / math.sqrt(0.75))],
    ]
    assert scale_advantages([[1.0, 5.0]], "std", [[0.0, 0.0]]) == [[1.0, 5.0]]


# --- trees of several levels, as edges and as leaves ---


@dataclass
class Edge:
    """Tokens between two nodes of a tree, with random credit, and the edges that follow."""

    token_ids: tuple[int, ...]
    rows: dict[str, tuple[float, ...]]
    alternatives: tuple[Alternative, ...]
    children: list[Edge] = field(default_factory=list)

    @property
    def leaves(self) -> int:
        return sum(child.leaves for child in self.children) or 1


def random_edge(rng: np.random.Generator, levels: int) -> Edge:
    T = int(rng.integers(1, 5))
    scales = {"sampler_logprobs": -1.0, "advantages": 1.0, "returns": 1.0, "values": 1.0}
    rows = {name: tuple((scale * rng.normal(size=T)).tolist()) for name, scale in scales.items()}
    places = rng.integers(T, size=int(rng.integers(3)))
    choices = tuple(Alternative(int(at), int(rng.integers(3, 9)), float(rng.normal())) for at in sorted(places))
    children = [random_edge(rng, levels - 1) for _ in range(int(rng.integers(2, 4)))] if levels > 1 else []
    return Edge(tuple(rng.integers(3, 20, T).tolist()), rows, choices, children)


def as_sample(prompt: tuple[int, ...], path: list[Edge], first: int, weight: float | None) -> TrainingSample:
    """Return a sample that trains the tokens of the path from edge number `first` on."""
    before = len(prompt) + sum(len(edge.token_ids) for edge in path[:first])
    trained, alternatives, place = path[first:], [], 0
    for edge in trained:
        alternatives += [replace(a, position=place + a.position) for a in edge.alternatives]
        place += len(edge.token_ids)
    rows: dict[str, Any] = {
        name: (0.0,) * before + sum((edge.rows[name] for edge in trained), ()) for name in path[0].rows
    }
    return TrainingSample(
        token_ids=prompt + sum((edge.token_ids for edge in path), ()),
        loss_mask=(0,) * before + (1,) * place,
        alternatives=tuple(alternatives),
        weights=None if weight is None else (0.0,) * before + (weight,) * place,
        **rows,
    )


def paths(path: list[Edge]) -> Iterator[list[Edge]]:
    """Yield the path from the first edge to every edge of the tree."""
    yield path
    for child in path[-1].children:
        yield from paths([*path, child])


def trees_as_edges_and_leaves(seed: int = 0, trees: int = 2) -> tuple[list[TrainingSample], list[TrainingSample]]:
    """Return the same random trees of three levels as (one sample per edge, one sample per leaf)."""
    rng = np.random.default_rng(seed)
    edges, leaves = [], []
    for number in range(trees):
        prompt = (20 + number, 4, 3)
        for path in paths([random_edge(rng, 3)]):
            edges.append(as_sample(prompt, path, len(path) - 1, path[-1].leaves))
            if not path[-1].children:
                leaves.append(as_sample(prompt, path, 0, None))
    return edges, leaves


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "std": {"advantage_scaling": "std"},
    "kl per rollout": {"kl": KLConfig(coefficient=0.1), "entropy_coefficient": 0.05},
    "kl per token": {"kl": KLConfig(coefficient=0.1, reduction="token_mean", importance_weighted=True)},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("micro_batch_tokens", [30, 100_000])
def test_weighted_edges_and_leaves_give_the_same_update(setting: str, micro_batch_tokens: int) -> None:
    """Loss, gradients and all metrics are equal, also after updates with clipped ratios."""
    edges, leaves = trees_as_edges_and_leaves()
    assert len(edges) > len(leaves) > 8 and max(max(edge.trained_weights) for edge in edges) > 3
    outcomes = []
    for samples in (edges, leaves):
        policy = build_policy(dtype=torch.float64)
        critic, reference = ValueNetwork(policy, seed=0), build_policy(seed=1, dtype=torch.float64)
        ppo = CriticConfig(value_lr=1e-3)
        options = {**SETTINGS[setting], "ppo": ppo, "micro_batch_tokens": micro_batch_tokens, "lr": 1e-2}
        learner = build_learner(policy, reference, critic, epochs=3, **options)
        first, metrics = update_with_gradient(learner, samples, len(leaves))
        outcomes.append((first, metrics, weights(critic)))
    (gradient, metrics, values), (other, other_metrics, other_values) = outcomes
    assert metrics["policy/clip_share"] > 0.01 and metrics["policy/kl_old"] > 1e-3
    # The leaves repeat sampled tokens, so their standard error does not count each token once.
    metrics.pop("policy/logprob_excess_error"), other_metrics.pop("policy/logprob_excess_error")
    assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-6)
    assert (gradient - other).abs().max() < 1e-4 * other.abs().max()
    assert torch.allclose(values, other_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
def test_edges_and_leaves_have_the_same_first_gradient(setting: str) -> None:
    edges, leaves = trees_as_edges_and_leaves()
    gradients = {}
    for name, samples in (("edges", edges), ("leaves", leaves), ("wrong", [replace(e, weights=None) for e in edges])):
        policy, reference = build_policy(dtype=torch.float64), build_policy(seed=1, dtype=torch.float64)
        learner = build_learner(policy, reference, lr=0.0, **SETTINGS[setting])
        gradients[name], _ = update_with_gradient(learner, samples, len(leaves))
    assert (gradients["edges"] - gradients["leaves"]).abs().max() < 1e-6
    assert (gradients["wrong"] - gradients["leaves"]).abs().max() > 1e-2


def test_kl_in_the_reward_is_the_same_for_edges_and_leaves() -> None:
    """The credit of a prefix contains the penalties of all its continuations."""
    kl = KLConfig(coefficient=0.3, place="reward")
    edges, leaves = trees_as_edges_and_leaves()
    (one, metrics), (other, other_metrics) = (
        update_with_gradient(
            build_learner(build_policy(dtype=torch.float64), build_policy(seed=1, dtype=torch.float64), lr=0.0, kl=kl),
            samples,
            len(leaves),
        )
        for samples in (edges, leaves)
    )
    assert (one - other).abs().max() < 1e-6
    assert metrics["policy/loss"] == pytest.approx(other_metrics["policy/loss"], abs=1e-6)
    assert metrics["kl/ref"] == pytest.approx(other_metrics["kl/ref"], rel=1e-6)


def test_a_weight_counts_copies_and_its_unit_does_not_matter() -> None:
    samples = with_alternatives(build_samples(RAGGED))
    weighted = [replace(s, weights=tuple(3.0 * m for m in s.loss_mask)) if i == 2 else s for i, s in enumerate(samples)]
    copies = [*samples, samples[2], samples[2]]
    tenfold = [replace(s, weights=tuple(10 * w for w in s.weights or s.loss_mask)) for s in weighted]
    options: dict[str, Any] = {"advantage_scaling": "whiten", "kl": KLConfig(coefficient=0.1, reduction="token_mean")}
    (first, first_metrics), *others = [
        update_with_gradient(build_learner(build_policy(), build_policy(seed=1), lr=0.0, **options), batch, len(batch))
        for batch in (weighted, copies, tenfold)
    ]
    for gradient, metrics in others:
        assert torch.allclose(gradient, first, rtol=0, atol=1e-6)
        assert metrics["policy/objective"] == pytest.approx(first_metrics["policy/objective"], abs=1e-6)


def test_dropping_tokens_of_weight_zero_does_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with keeping these tokens, and with masking them."""
    samples = with_alternatives(build_samples(RAGGED))
    halves = [tuple(float(m and i < 6) for i, m in enumerate(s.loss_mask)) for s in samples]
    weighted = [replace(s, weights=w) for s, w in zip(samples, halves, strict=True)]
    masked = [
        replace(
            s,
            loss_mask=tuple(int(x) for x in w),
            alternatives=tuple(a for a in s.alternatives if a.position < sum(w)),
        )
        for s, w in zip(samples, halves, strict=True)
    ]
    seen: list[int] = []

    def gradient_of(batch: list[TrainingSample]) -> torch.Tensor:
        learner = build_learner(build_policy(dtype=torch.float64), lr=0.0, micro_batch_tokens=1, savings=NONE)
        handle = learner.policy.model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        gradient, _ = update_with_gradient(learner, batch, len(batch))
        handle.remove()
        return gradient

    short = gradient_of(weighted)
    tokens = sum(seen)
    assert torch.allclose(short, gradient_of(masked), rtol=0, atol=1e-7)
    monkeypatch.setattr("vineppo.learning.learner.all_tokens_stay", lambda *_: True)
    seen.clear()
    assert torch.allclose(short, gradient_of(weighted), rtol=0, atol=1e-7)
    lengths = [len(s.token_ids) for s in samples]
    assert sum(seen) == 2 * sum(lengths) and short.abs().max() > 1e-3
    # Old log-probabilities need every token; the update needs those before the sixth, if the response begins there.
    assert tokens == sum(lengths) + sum(
        min(length, 6) for (prompt, _), length in zip(RAGGED, lengths, strict=True) if prompt < 6
    )


# --- minibatches if there is not one sample per rollout ---


def test_minibatches_with_one_sample_per_rollout_are_slices() -> None:
    for n in range(1, 40):
        for size in range(1, 45):
            order = list(range(n))
            assert minibatches(order, size, n) == [order[i : i + size] for i in range(0, n, size)]


def test_the_number_of_minibatches_does_not_depend_on_the_number_of_samples() -> None:
    for num_rollouts, size in ((16, 8), (20, 8), (7, 3), (5, 10)):
        for num_samples in (0, 1, 2, 5, 16, 33, 100):
            order = list(range(num_samples))
            parts = minibatches(order, size, num_rollouts)
            assert len(parts) == math.ceil(num_rollouts / size)
            assert [i for part in parts for i in part] == order
    assert [len(part) for part in minibatches(range(33), 8, 20)] == [13, 13, 7]  # cuts at 13.2 and 26.4
    assert [len(part) for part in minibatches(range(1), 4, 16)] == [0, 0, 1, 0]  # at .25, .5 and .75


def test_a_minibatch_represents_its_share_of_the_rollouts() -> None:
    """Six samples of four rollouts are two minibatches. In each the KL term is a mean over two rollouts."""
    samples = build_samples([(3, 4)] * 6, advantage=0.0)
    policy, reference = build_policy(), build_policy(seed=1)
    learner = build_learner(policy, reference, kl=KLConfig(coefficient=0.3), lr=0.0, minibatch_size=2)
    metrics = learner.update(samples, 1, num_rollouts=4)
    assert metrics["updates"] == 2
    rows = zip(logprobs_of(policy, samples), logprobs_of(reference, samples), strict=True)
    total = sum(kl_estimate(a.detach(), b.detach(), "k3", 10.0).sum().item() for a, b in rows)
    assert metrics["kl/ref"] == pytest.approx(total / 4, rel=1e-5)
    assert metrics["policy/objective"] == pytest.approx(0.3 * total / 4, rel=1e-5)  # the mean over two minibatches


def test_empty_minibatches_make_no_update_but_advance_the_schedule() -> None:
    """Learning rates of a run of 12 planned updates; iteration 2 has no samples and iteration 3 has one."""
    samples = build_samples([(3, 4)] * 8)
    learner = build_learner(build_policy(), lr=1e-3, decay="linear", minibatch_size=2, total_updates=12)
    expected = [1e-3 * lr_factor(u, 0, 12, "linear") for u in range(12)]
    assert learner.update(samples, 1, 8)["policy/lr"] == pytest.approx(sum(expected[:4]) / 4)
    before = weights(learner.policy.model)
    assert learner.update([], 2, 8) == {"updates": 4}
    assert torch.equal(weights(learner.policy.model), before) and learner.scheduled == 8
    metrics = learner.update(samples[:1], 3, 8)
    assert metrics["updates"] == 5 and learner.scheduled == 12
    assert metrics["policy/lr"] == pytest.approx(expected[10])  # the third of four minibatches contains the sample
    assert not torch.equal(weights(learner.policy.model), before)


def test_samples_without_any_weight_are_a_step_of_gradient_zero() -> None:
    samples = [replace(s, weights=(0.0,) * len(s.token_ids)) for s in build_samples(TWO)]
    policy = build_policy()
    before, critic = weights(policy.model), ValueNetwork(policy, seed=0)
    options: dict[str, Any] = {"kl": KLConfig(coefficient=0.1), "entropy_coefficient": 0.1}
    for extra in (options, {}):
        learner = build_learner(policy, build_policy(seed=1) if extra else None, critic, **extra)
        metrics = learner.update(samples, 1, 2)
        assert metrics["policy/grad_norm"] == metrics["value/grad_norm"] == metrics["policy/loss"] == 0
        assert all(math.isfinite(value) for value in metrics.values())
    assert torch.equal(weights(policy.model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": (1.0, 1.0)}, r"sample 1 of the credit function has 2 weights for 9 tokens"),
        ({"advantages": (1.0,)}, r"sample 1 of the credit function has 1 advantages for 9 tokens"),
        ({"weights": (0.0,) * 8 + (-2.0,)}, r"sample 1 of the credit function has a weight of -2.0; allowed"),
        ({"weights": (0.0,) * 8 + (math.inf,)}, r"sample 1 of the credit function has a weight of inf; allowed"),
        ({"weights": (0.0,) * 8 + (math.nan,)}, r"sample 1 of the credit function has a weight of nan; allowed"),
        ({"loss_mask": (1,) * 9}, r"sample 1 of the credit function has loss_mask 1 for its first token, whose prob"),
        ({"returns": None}, r"sample 1 of the credit function has no returns or no values"),
    ],
)
def test_invalid_samples_are_reported_in_one_line(change: dict[str, Any], message: str) -> None:
    policy = build_policy()
    first, second = build_samples(TWO)
    with pytest.raises(UserError, match=message) as error:
        build_learner(policy, critic=ValueNetwork(policy, seed=0)).update([first, replace(second, **change)], 1, 2)
    assert "\n" not in str(error.value)


# --- weights for sampling engines, and the learner's checkpoint file ---


def test_weights_without_adapters_are_those_of_the_model() -> None:
    policy = build_policy()
    other = build_policy(seed=1)
    other.model.load_state_dict(dict(build_learner(policy).weights()))
    assert torch.equal(weights(other.model), weights(policy.model))
    # After an update, the weights are the new ones.
    learner = build_learner(policy)
    learner.update(build_samples(TWO), 1, 2)
    assert all(torch.equal(tensor, policy.model.state_dict()[name]) for name, tensor in learner.weights())
    assert not torch.equal(weights(other.model), weights(policy.model))


def test_weights_have_merged_adapters_and_the_model_is_unchanged() -> None:
    pytest.importorskip("peft")
    policy = Policy.load(ModelConfig(lora=LoraConfig(r=4, targets=("q_proj", "down_proj"))))
    generator = torch.Generator().manual_seed(0)
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator)
    before = {name: p.clone() for name, p in policy.model.state_dict().items()}
    merged = list(build_learner(policy).weights())
    expected = copy.deepcopy(policy.adapters).merge_and_unload().state_dict()
    assert sorted(name for name, _ in merged) == sorted(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged)
    plain = Policy.load(ModelConfig()).model.state_dict()
    changed = {name for name, tensor in merged if not torch.equal(tensor, plain[name])}
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


def test_a_checkpoint_without_the_learners_file_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no learner.pt: another version of vineppo \(.*\) wrote it"):
        build_learner(build_policy()).load(tmp_path)


def test_the_clip_share_counts_alternatives_in_both_numbers() -> None:
    """By hand: of the weights 1, 2, 1 of three tokens and 2 of an alternative, those of the first and last are clipped.

    The first token and the alternative have ratio 2 and a positive advantage. The second token has ratio 1. The third
    has ratio 2 and a negative advantage, which is not clipped.
    """
    policy = build_policy(dtype=torch.float64)
    sample = TrainingSample(
        token_ids=(3, 4, 5, 6),
        loss_mask=(0, 1, 1, 1),
        sampler_logprobs=(0.0, 0.0, 0.0, 0.0),
        advantages=(0.0, 1.0, 1.0, -1.0),
        alternatives=(Alternative(1, 7, 1.0),),
        weights=(0.0, 1.0, 2.0, 1.0),
    )
    learner = build_learner(policy)
    scores = learner.logprobs(policy, [sample])
    rows, alternatives = scores.logprobs, scores.alternatives
    double = math.log(2)
    old = (rows[0][0] - double, rows[0][1], rows[0][2] - double)
    experience = Experience(sample, old, (alternatives[0][0] - double,), None)
    assert learner._policy_gradient([experience], 1)["policy/clip_share"] == pytest.approx((1 + 2) / (1 + 2 + 1 + 2))
