"""Measuring the values of states of any response, with the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import small_config
from vineppo.config.schema import ModelConfig, RolloutConfig, TaskConfig
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler
from vineppo.tasks import build_task
from vineppo.training.rollouts import problem_range, sample_groups
from vineppo.types import RolloutGroup
from vineppo.view.before_after import NUM_MC_ROLLOUTS, before_and_after
from vineppo.view.explain import telescoping
from vineppo.view.measure import Measuring, measured_response, measured_responses


@pytest.fixture(scope="module")
def measuring() -> Measuring:
    policy = Policy.load(ModelConfig(path="embedded:judgement"))
    task = build_task(TaskConfig(num_steps=3), policy.codec.chat_prompt)
    return Measuring(build_sampler(policy), task, policy.codec, num_mc_rollouts=64, max_new_tokens=40, seed=3)


@pytest.fixture(scope="module")
def groups(measuring: Measuring) -> Iterator[list[RolloutGroup]]:
    problems = problem_range(measuring.task, "validation", 4)
    yield sample_groups(
        problems,
        measuring.codec,
        measuring.sampler,
        measuring.task,
        group_size=1,
        max_new_tokens=40,
        temperature=1.0,
        address=(0, "test"),
    )


def test_every_state_has_k_continuations_and_the_values_telescope(
    measuring: Measuring, groups: list[RolloutGroup]
) -> None:
    for response, group in zip(measured_responses(measuring, groups), groups, strict=True):
        assert response.text == group.rollouts[0].text and response.reward == group.rollouts[0].reward
        for step in response.steps:
            rewards = [c.reward or 0.0 for c in response.continuations if c.state == step.start]
            assert len(rewards) == step.num_mc_rollouts == 64
            assert sum(rewards) / 64 == pytest.approx(step.value)
        total = telescoping(response)
        assert total is not None and total.holds


def test_a_response_alone_has_the_same_values(measuring: Measuring, groups: list[RolloutGroup]) -> None:
    """From token ids only; values depend on neither the order nor the other responses."""
    together = measured_responses(measuring, groups)
    for index in (2, 0):
        [rollout] = groups[index].rollouts
        alone = measured_response(measuring, groups[index].problem, rollout.prompt_ids, rollout.response_ids)
        assert [step.value for step in alone.steps] == [step.value for step in together[index].steps]
        assert (alone.reward, alone.text, alone.finish_reason) == (rollout.reward, rollout.text, rollout.finish_reason)
    other = measured_response(replace(measuring, seed=4), groups[0].problem, rollout.prompt_ids, rollout.response_ids)
    assert [c.text for c in other.continuations] != [c.text for c in together[0].continuations]


def test_values_with_reused_continuations_agree_with_new_ones(measuring: Measuring, groups: list[RolloutGroup]) -> None:
    """Two unbiased estimates of the same values, each from 400 continuations: 5 standard errors apart at most."""
    fresh = measured_responses(replace(measuring, num_mc_rollouts=400), groups)
    reused = measured_responses(replace(measuring, num_mc_rollouts=400, reuse=True), groups)
    for first, second in zip(fresh, reused, strict=True):
        assert len(second.continuations) < len(first.continuations)
        for one, other in zip(first.steps, second.steps, strict=True):
            assert one.value is not None and other.value is not None
            assert abs(one.value - other.value) <= 5 * (2 * 0.25 / 400) ** 0.5


def test_a_cut_response_is_recognised(measuring: Measuring, groups: list[RolloutGroup]) -> None:
    [rollout] = groups[0].rollouts
    short = replace(measuring, max_new_tokens=6)
    response = measured_response(short, groups[0].problem, rollout.prompt_ids, rollout.response_ids[:6])
    assert response.finish_reason == "length" and response.reward == 0.0


def test_before_and_after_take_the_first_problem_that_became_right(tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run",
        model=ModelConfig(path="embedded:judgement"),
        rollouts=RolloutConfig(num_problems=4, group_size=1, max_new_tokens=40),
        learner={"minibatch_size": 4},
    )
    policy = Policy.load(config.model)
    policy.save(tmp_path / "same")
    assert before_and_after(config, tmp_path / "same", num_problems=8) is None
    # A model that answers at random is the start, and the embedded model is the one that was trained.
    broken = Policy.load(config.model)
    for parameter in broken.model.parameters():
        parameter.data.mul_(0.5)
    broken.save(tmp_path / "broken")
    start = config.model_copy(update={"model": ModelConfig(path=str(tmp_path / "broken"))})
    pair = before_and_after(start, tmp_path / "same", num_problems=64)
    assert pair is not None
    before, after = pair
    assert before.prompt == after.prompt and (before.reward or 0) < (after.reward or 0) == 1
    for response in pair:
        assert all(step.num_mc_rollouts in (0, NUM_MC_ROLLOUTS) for step in response.steps)
        total = telescoping(response)
        assert total is not None and total.holds
