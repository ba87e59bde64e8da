"""Whole runs of an algorithm that samples its own rollouts: a tree of two levels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.helpers import small_config, weights_hash
from tests.training.test_train import Crash, CrashAt
from vineppo.config.schema import LearnerConfig, RolloutConfig
from vineppo.credit import BUILT_IN
from vineppo.credit.algorithm import Algorithm, CreditParts, SampleFn
from vineppo.credit.sample import reward_of, training_sample
from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed
from vineppo.training.loop import resume, train
from vineppo.types import CreditFn, Metrics, Problem, Rollout, RolloutGroup, SampleRequest, TrainingSample, UserError

PREFIX = 5
"""Tokens of a prefix."""
LEAVES = 2
"""Continuations of each prefix."""


def sample_tree(settings: Any, parts: CreditParts) -> SampleFn:
    """`group_size / LEAVES` prefixes of each problem, and LEAVES continuations of each prefix."""

    def sample(problems: Sequence[Problem], iteration: int) -> list[RolloutGroup]:
        return [grow(problem, iteration) for problem in problems]

    def grow(problem: Problem, iteration: int) -> RolloutGroup:
        prompt, address = parts.codec.prompt_ids(problem), (parts.run_seed, iteration, problem.id)
        (prefixes,) = parts.sampler.sample(
            [SampleRequest(prompt, parts.group_size // LEAVES, PREFIX, derive_seed(*address, "prefixes"))]
        )
        assert all(len(prefix.token_ids) == PREFIX and prefix.finish_reason == "length" for prefix in prefixes)
        requests = [
            SampleRequest(
                prompt + prefix.token_ids,
                LEAVES,
                parts.max_new_tokens - PREFIX,
                derive_seed(*address, "leaves", number),
                response_tokens=PREFIX,
            )
            for number, prefix in enumerate(prefixes)
        ]
        owners = [(problem, prefix.token_ids) for prefix in prefixes]
        families = sampled_and_graded(parts.sampler, parts.task, parts.codec.decode, requests, owners)
        return RolloutGroup(
            problem,
            tuple(
                Rollout(
                    prompt_ids=prompt,
                    response_ids=prefix.token_ids + leaf.token_ids,
                    sampler_logprobs=prefix.logprobs + leaf.logprobs,
                    finish_reason=leaf.finish_reason,
                    text=text,
                    reward=reward,
                )
                for prefix, family in zip(prefixes, families, strict=True)
                for leaf, text, reward in family
            ),
        )

    return sample


def build_tree(settings: Any, parts: CreditParts) -> CreditFn:
    """One sample per edge; the tokens of a prefix have the weight LEAVES."""

    def credit(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        samples: list[TrainingSample] = []
        for group in groups:
            families = [group.rollouts[i : i + LEAVES] for i in range(0, len(group.rollouts), LEAVES)]
            means = [fmean(reward_of(rollout) for rollout in family) for family in families]
            for number, family in enumerate(families):
                advantage = means[number] - fmean(means[:number] + means[number + 1 :])
                first = family[0]
                prefix = replace(
                    first, response_ids=first.response_ids[:PREFIX], sampler_logprobs=first.sampler_logprobs[:PREFIX]
                )
                edge = training_sample(prefix, [advantage] * PREFIX, weights_T=[LEAVES] * PREFIX)
                samples.append(replace(edge, rollout=None))
                for leaf in family:
                    rest = len(leaf.response_ids) - PREFIX
                    own = reward_of(leaf) - fmean(reward_of(other) for other in family if other is not leaf)
                    weights = [0.0] * PREFIX + [1.0] * rest
                    samples.append(training_sample(leaf, [0.0] * PREFIX + [own] * rest, weights_T=weights))
        return samples, {}

    return credit


TREE = Algorithm("tree", "Tree", build_tree, min_group_size=2 * LEAVES, sample=sample_tree)
SHAPE = RolloutConfig(num_problems=4, group_size=4, max_new_tokens=40)


@pytest.fixture(autouse=True)
def tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUILT_IN, "tree", TREE)


def test_a_run_of_a_tree_counts_and_records_every_token_once(tmp_path: Path) -> None:
    summary = train(small_config(tmp_path / "run", "tree", rollouts=SHAPE, learner=LearnerConfig(minibatch_size=8)))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert summary["updates"] == 4 * 2 * 2  # 16 rollouts in minibatches of 8, two epochs, four iterations
    rows = pq.read_table(tmp_path / "run/rollouts/000001.parquet").to_pylist()
    leaves, edges = ([row for row in rows if row["kind"] == kind] for kind in ("rollout", "sample"))
    assert (len(leaves), len(edges)) == (16, 8)
    assert {len(row["response_ids"]) for row in edges} == {PREFIX}
    assert all(row["token_weights"] == [LEAVES] * PREFIX for row in edges)
    sampled = sum(row["num_tokens"] for row in leaves) - 8 * PREFIX  # two leaves share each of 8 prefixes
    assert lines[1]["tokens/rollouts"] == sampled
    masks = 16 * PREFIX + 8 * PREFIX + sum(row["num_tokens"] - PREFIX for row in leaves)
    assert lines[1]["tokens/trained"] == 2 * masks
    assert lines[1]["policy/sampler_logprob_gap"] < 1e-4


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    train(small_config(tmp_path / "whole", "tree", rollouts=SHAPE))
    with pytest.raises(Crash):
        train(small_config(tmp_path / "cut", "tree", rollouts=SHAPE), reporter=CrashAt(3))
    resume(small_config(tmp_path / "cut", "tree", rollouts=SHAPE))
    assert weights_hash(tmp_path / "cut/final") == weights_hash(tmp_path / "whole/final")


def test_groups_of_another_size_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(settings: Any, parts: CreditParts) -> SampleFn:
        whole = sample_tree(settings, parts)
        return lambda problems, iteration: [
            replace(group, rollouts=group.rollouts[:2]) for group in whole(problems, iteration)
        ]

    monkeypatch.setitem(BUILT_IN, "tree", replace(TREE, sample=half))
    with pytest.raises(UserError, match=r"algorithm tree returned 4 groups of \[2\] rollouts for 4 problems") as error:
        train(small_config(tmp_path / "run", "tree", rollouts=SHAPE))
    assert "\n" not in str(error.value)
