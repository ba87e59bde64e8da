"""The value network of a run predicts what the run's learner predicts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import small_config
from vineppo.config.settings import replace
from vineppo.measure.critics import has_critic, load_critic, lost_critic
from vineppo.run.checkpoint import latest_checkpoint
from vineppo.training.loop import train
from vineppo.training.parts import build_parts
from vineppo.training.rollouts import problem_range
from vineppo.types import UserError
from vineppo.values import State


def test_the_critic_of_a_run_is_that_of_its_learner(tmp_path: Path) -> None:
    config = small_config(tmp_path / "ppo", "ppo")
    config = replace(config, run=replace(config.run, checkpoint_every=1))
    train(config)
    assert has_critic(tmp_path / "ppo") and not has_critic(tmp_path)
    parts = build_parts(config)
    parts.learner.load(latest_checkpoint(tmp_path / "ppo" / "checkpoints"))
    parts.update_sampler()
    problems = problem_range(parts.task, "test", config.rollouts.num_problems)
    rollouts = [r for group in parts.sample(problems, 1)[0] for r in group.rollouts][:3]
    expected = parts.learner.predict_values(rollouts)
    critic = load_critic(tmp_path / "ppo", parts.policy)
    for rollout, row in zip(rollouts, expected, strict=True):
        ids = rollout.response_ids
        states = [State(problems[0], rollout.prompt_ids, ids[:t]) for t in range(len(ids))]
        assert critic(states) == pytest.approx(row, abs=1e-5)
    assert not lost_critic(tmp_path / "ppo")
    shutil.rmtree(tmp_path / "ppo" / "checkpoints")
    assert lost_critic(tmp_path / "ppo") and not has_critic(tmp_path / "ppo")
    with pytest.raises(
        UserError, match=r"has no complete checkpoint .`vineppo compare` removes those of finished runs"
    ):
        load_critic(tmp_path / "ppo", parts.policy)


def test_a_run_without_a_value_network_is_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path / "grpo", "grpo")
    train(replace(config, run=replace(config.run, checkpoint_every=1)))
    with pytest.raises(UserError, match="has no value network; give a run of an algorithm with one"):
        load_critic(tmp_path / "grpo", build_parts(config).policy)
