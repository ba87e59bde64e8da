"""Build everything that a training needs from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.credit import build_credit
from vineppo.learning.learner import Learner
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy, Reference
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.seeds import derive_seed
from vineppo.tasks import build_task
from vineppo.training.rollouts import sample_groups
from vineppo.types import CreditFn, Problem, RewardFn, RolloutGroup, Sampler, Split, Task


@dataclass(frozen=True)
class Parts:
    """The built parts of a training, by the names of the loop's stages."""

    config: Config
    policy: Policy
    codec: Codec
    task: Task
    sampler: Sampler
    eval_sampler: Sampler
    credit: CreditFn
    learner: Learner


@dataclass(frozen=True)
class Given:
    """What the caller brings along instead of naming it in the configuration."""

    policy: Policy | None = None
    """In the place of `config.model`; it is trained in place."""
    tables: Mapping[Split, Any] | None = None
    """Rows for the task `dataset`, by split."""


NOTHING_GIVEN = Given()


def build_parts(
    config: Config, reward_fn: RewardFn | Sequence[RewardFn] | None = None, given: Given = NOTHING_GIVEN
) -> Parts:
    """Load and bind everything that can be wrong, before anything is written."""
    policy = given.policy or Policy.load(config.model)
    task = build_task(config.task, policy.codec.chat_prompt, reward_fn, given.tables)
    sampler, eval_sampler = build_samplers(config, policy)
    critic = None
    if config.algorithm == "ppo":
        critic = ValueNetwork(policy, derive_seed(config.run.seed, "value head"), config.ppo.value_head_scale)
    learner = Learner(
        policy,
        Reference(policy) if config.learner.kl.coefficient > 0 else None,
        critic,
        config.learner,
        config.ppo,
        temperature=config.rollouts.temperature,
        total_updates=total_updates(config),
    )
    credit = build_credit(config, policy.codec, sampler, task, critic)
    return Parts(config, policy, policy.codec, task, sampler, eval_sampler, credit, learner)


def build_samplers(config: Config, policy: Policy) -> tuple[TorchSampler, TorchSampler]:
    """(of training, of evaluation): they differ in temperature alone."""
    own = config.rollouts
    training, evaluation = (
        TorchSampler(policy, temperature=t, stop=own.stop, max_rows=own.max_rows, kv_memory=int(own.kv_memory * 2**30))
        for t in (own.temperature, config.eval.temperature)
    )
    return training, evaluation


def updates_per_iteration(config: Config) -> int:
    """Optimizer steps between two batches of rollouts."""
    rollouts = config.rollouts.num_problems * config.rollouts.group_size
    return config.learner.epochs * -(-rollouts // config.learner.minibatch_size)


def total_updates(config: Config) -> int:
    """Updates of a whole run: where a linear decay ends."""
    updates = config.run.iterations * updates_per_iteration(config)
    return min(updates, config.run.max_updates) if config.run.max_updates else updates


def sample_rollouts(parts: Parts, problems: Sequence[Problem], iteration: int) -> list[RolloutGroup]:
    """The G graded rollouts of each problem, for an iteration."""
    return sample_groups(
        problems,
        parts.codec,
        parts.sampler,
        parts.task,
        group_size=parts.config.rollouts.group_size,
        max_new_tokens=parts.config.rollouts.max_new_tokens,
        address=(parts.config.run.seed, iteration, "rollouts"),
    )
