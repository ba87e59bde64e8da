"""DPO-positive: pairs, the loss through a model, and complete runs."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.helpers import weights_hash
from tests.training.test_restem import group, lines_of, offline_config, rollout
from tests.world import World, build_policy, build_world, flat_gradient
from vineppo.config.offline import DPOPositiveConfig
from vineppo.training.dpo import Pair, accumulate_pairs, pairs_of, response_logprobs
from vineppo.training.offline import run_offline
from vineppo.types import UserError


def test_pairs_are_counted_by_hand() -> None:
    """Problem 0 has 2 x 3 pairs. Problem 1 has no wrong response, and problem 2 no right one."""
    right, wrong = (
        [rollout(str(token), reward, (token,)) for token in tokens]
        for reward, tokens in ((1.0, (10, 11)), (0.0, (20, 21, 22)))
    )
    groups = [
        group("train/0", wrong[0], right[0], wrong[1], rollout("none", None, (30,)), right[1], wrong[2]),
        group("train/1", *right),
        group("train/2", *wrong),
    ]
    everything = {(a, b) for a in (10, 11) for b in (20, 21, 22)}
    counted: Counter[tuple[int, int]] = Counter()
    for seed in range(60):
        for max_pairs in (1, 4, 6, 64):
            pairs = pairs_of(groups, 1.0, max_pairs, (seed,))
            tokens = [(pair.chosen[0][2], pair.rejected[0][2]) for pair in pairs]
            assert len(tokens) == len(set(tokens)) == min(max_pairs, 6) and set(tokens) <= everything
            assert all(pair.chosen[1] == pair.rejected[1] == 2 for pair in pairs)
            counted.update(tokens if max_pairs == 1 else [])
        assert pairs_of(groups, 1.0, 4, (seed,)) == pairs_of(groups, 1.0, 4, (seed,))
    assert set(counted) == everything
    assert pairs_of(groups[1:], 1.0, 4, (0,)) == []


def pair_of(world: World, chosen: int, rejected: int) -> Pair:
    start = len(world.prompt_ids)
    return Pair(*((world.prompt_ids + world.responses[i], start) for i in (chosen, rejected)))


def test_log_probabilities_of_responses_are_those_of_the_enumerable_world() -> None:
    world = build_world(3)
    responses = [(world.prompt_ids + response, len(world.prompt_ids)) for response in world.responses]
    found = response_logprobs(world.policy, [*responses, *responses], 40, world.temperature)
    assert len(found) == len(responses)
    expected = [math.log(probability) for probability in world.probabilities]
    assert [found[item] for item in responses] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 30, 1000])
def test_the_loss_and_its_gradient_are_those_of_the_formula(max_tokens: int) -> None:
    """The reference is another policy, so that some right responses are less probable than in it, and others more."""
    world, reference = build_world(3), build_world(3, policy=build_policy(seed=9))
    settings = DPOPositiveConfig(beta=0.3, penalty=5.0)
    numbers = [(0, 30), (7, 60), (20, 3), (80, 9)]
    pairs = [pair_of(world, *pair) for pair in numbers]
    items = [item for pair in pairs for item in (pair.chosen, pair.rejected)]
    refs = response_logprobs(reference.policy, items, 1000, world.temperature)
    sums, ref_sums = world.token_logprobs().sum(1), reference.token_logprobs().sum(1).detach()
    losses = []
    for chosen, rejected in numbers:
        c, r = sums[chosen] - ref_sums[chosen], sums[rejected] - ref_sums[rejected]
        margin = 0.3 * (c - r - 5.0 * (-c).clamp(min=0))
        losses.append(torch.log1p(torch.exp(-margin)))
    log_ratios = [(sums - ref_sums)[chosen].item() for chosen, _ in numbers]
    assert min(log_ratios) < -0.1 and max(log_ratios) > 0.1
    expected = torch.stack(losses)
    gradient = flat_gradient(expected.mean(), world.policy)
    totals = accumulate_pairs(world.policy, pairs, refs, settings, world.temperature, max_tokens)
    found = torch.cat([p.grad.reshape(-1) for p in world.policy.model.parameters()])
    assert totals["loss"] == pytest.approx(expected.sum().item(), rel=1e-4)
    assert totals["chosen_log_ratio"] == pytest.approx(sum(log_ratios), abs=1e-3)
    assert totals["penalised_share"] == sum(ratio < 0 for ratio in log_ratios)
    assert (found - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_the_first_gradient_is_that_of_dpo_for_every_size_of_micro_batches(max_tokens: int) -> None:
    """At the starting model the loss of a pair is log 2 and its gradient -beta / 2 * grad(log chosen - log rejected).

    The reference was computed in other batches, so the log-ratios are rounding errors. They must not switch on the
    penalty, whose slope is 50 times as large.
    """
    world = build_world(3)
    numbers = [(0, 30), (7, 60), (20, 3)]
    pairs = [pair_of(world, *pair) for pair in numbers]
    refs = response_logprobs(world.policy, (i for p in pairs for i in (p.chosen, p.rejected)), 24, world.temperature)
    sums = world.token_logprobs().sum(1)
    wanted = -0.05 * torch.stack([sums[chosen] - sums[rejected] for chosen, rejected in numbers]).mean()
    gradient = flat_gradient(wanted, world.policy)
    totals = accumulate_pairs(world.policy, pairs, refs, DPOPositiveConfig(), world.temperature, max_tokens)
    found = torch.cat([p.grad.reshape(-1) for p in world.policy.model.parameters()])
    assert totals["loss"] == pytest.approx(3 * math.log(2), abs=1e-4)
    assert totals["penalised_share"] == 0
    assert (found - gradient).norm() < 1e-4 * gradient.norm()


def test_a_run_counts_tokens_and_updates_and_orders_the_pairs(tmp_path: Path) -> None:
    settings = {"max_pairs": 3, "epochs": 2, "penalty": 5.0}
    for name in "ab":
        config = offline_config(tmp_path / name, method="dpo_positive", dpo_positive=settings, lr=3e-4)
        summary = run_offline(config, "small", lambda line: None)
    before, first, second = lines_of(tmp_path / "a")
    rows = pq.read_table(tmp_path / "a" / "rollouts" / "000001.parquet").to_pylist()
    right = Counter(row["problem_id"] for row in rows if row["reward"] == 1)
    pairs = sum(min(3, count * (4 - count)) for count in right.values())
    assert pairs > 4 and first["dpo_positive/pairs"] == second["dpo_positive/pairs"] == pairs
    assert (first["updates"], second["updates"]) == (-(-pairs // 4), 2 * -(-pairs // 4))
    generated = sum(row["num_tokens"] for row in rows)
    assert [line["tokens/generated"] for line in (before, first, second)] == [0, generated, generated]
    assert second["tokens/trained"] == 2 * first["tokens/trained"] == summary["tokens"]["trained"] > 0
    lengths = [row["num_tokens"] for row in rows]
    assert 2 * pairs * min(lengths) <= first["tokens/trained"] <= 2 * pairs * max(lengths)
    assert second["dpo_positive/ordered_share"] > 0.5 and second["dpo_positive/chosen_log_ratio"] > 0
    assert second["reward/mean"] is None and first["reward/mean"] == sum(right.values()) / len(rows)
    assert (summary["algorithm"], summary["label"], summary["iterations"]) == ("dpo_positive", "DPO-positive", 2)
    assert weights_hash(tmp_path / "a" / "final") == weights_hash(tmp_path / "b" / "final")
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")


@pytest.mark.parametrize(("threshold", "solved"), [(2.0, 0), (0.0, 6)])
def test_without_pairs_there_is_an_error(threshold: float, solved: int, tmp_path: Path) -> None:
    config = offline_config(tmp_path / "run", method="dpo_positive", reward_threshold=threshold)
    with pytest.raises(UserError, match=rf"none of 6 problems has both .* wrong one \({solved} have"):
        run_offline(config, report=lambda line: None)
    assert not (tmp_path / "run").exists()
