"""Builds the parts of a training run from its configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.credit.algorithm import Algorithm, CreditParts, SampleFn
from vineppo.learning.learner import TorchLearner
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy, Reference
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.version import CurrentSampler
from vineppo.seeds import derive_seed
from vineppo.tasks import build_task
from vineppo.training.configure import own_settings
from vineppo.training.rollouts import sample_groups
from vineppo.types import CreditFn, Problem, RewardFn, RolloutGroup, Split, Task, UserError


@dataclass(frozen=True)
class Parts:
    """The parts of a training run. `sample` and `credit` are named after the stages of the loop."""

    algorithm: Algorithm
    policy: Policy
    codec: Codec
    task: Task
    sampler: CurrentSampler
    sample_groups: SampleFn
    credit: CreditFn
    learner: TorchLearner
    group_size: int
    """Number of rollouts that each group must have."""

    def sample(self, problems: Sequence[Problem], iteration: int) -> tuple[list[RolloutGroup], int]:
        """Sample and grade a group of rollouts for each problem; returns the groups and the number of sampled tokens.

        Raises:
            UserError: if the algorithm's own sampling returns another number of groups or rollouts than configured.
        """
        before = self.sampler.tokens
        groups = self.sample_groups(problems, iteration)
        sizes = {len(group.rollouts) for group in groups}
        if len(groups) != len(problems) or sizes != {self.group_size}:
            raise UserError(
                f"algorithm {self.algorithm.name} returned {len(groups)} groups of {sorted(sizes)} rollouts for "
                f"{len(problems)} problems; it must return one group per problem, of rollouts.group_size "
                f"{self.group_size} rollouts"
            )
        return groups, self.sampler.tokens - before

    def update_sampler(self) -> None:
        """Send the learner's weights and their version to the sampler."""
        self.sampler.update_weights(self.learner.updates, self.learner.weights)


@dataclass(frozen=True)
class InMemory:
    """A model or data that is already in memory, so that it is not loaded as configured."""

    policy: Policy | None = None
    """Used instead of `config.model`, and trained in place."""
    tables: Mapping[Split, Any] | None = None
    """Rows for the task `dataset`, by split."""


NOTHING_IN_MEMORY = InMemory()


def build_parts(
    config: Config, reward_fn: RewardFn | Sequence[RewardFn] | None = None, in_memory: InMemory = NOTHING_IN_MEMORY
) -> Parts:
    """Load and build all parts. Nothing is written to disk, so a failure leaves no files behind.

    Raises:
        UserError: if the model, the data or the graders cannot be used.
    """
    algorithm = find_algorithm(config.algorithm)
    settings = own_settings(config, algorithm)
    policy = in_memory.policy or Policy.load(config.model)
    task = build_task(config.task, policy.codec.chat_prompt, reward_fn, in_memory.tables)
    learner = build_learner(config, algorithm, policy)
    sampler = CurrentSampler(build_engine(config, policy), lambda: learner.updates)
    parts = CreditParts(
        sampler=sampler,
        task=task,
        codec=policy.codec,
        predict_values=learner.predict_values,
        run_seed=config.run.seed,
        group_size=config.rollouts.group_size,
        max_new_tokens=config.rollouts.max_new_tokens,
        temperature=config.rollouts.temperature,
        stop=config.rollouts.stop,
    )
    sample = algorithm.sample(settings, parts) if algorithm.sample else functools.partial(sample_independently, parts)
    credit = algorithm.build(settings, parts)
    return Parts(algorithm, policy, policy.codec, task, sampler, sample, credit, learner, parts.group_size)


def build_learner(config: Config, algorithm: Algorithm, policy: Policy) -> TorchLearner:
    """Build the learner of a policy, with a reference and a value network if they are needed."""
    settings = own_settings(config, algorithm) if algorithm.needs_critic else None
    critic = None
    if settings is not None:
        critic = ValueNetwork(policy, derive_seed(config.run.seed, "value head"), settings.value_head_scale)
    return TorchLearner(
        policy,
        Reference(policy) if config.learner.kl.coefficient > 0 else None,
        critic,
        config.learner,
        settings,
        temperature=config.rollouts.temperature,
        total_updates=total_updates(config),
        seed=config.run.seed,
    )


def build_engine(config: Config, policy: Policy) -> TorchSampler:
    """Build the engine that samples from a policy in this process."""
    return TorchSampler(policy, max_rows=config.rollouts.max_rows, kv_memory=int(config.rollouts.kv_memory * 2**30))


def sample_independently(parts: CreditParts, problems: Sequence[Problem], iteration: int) -> list[RolloutGroup]:
    """Sample G independent rollouts of each problem. The default for algorithms that do not define `sample`."""
    return sample_groups(
        problems,
        parts.codec,
        parts.sampler,
        parts.task,
        group_size=parts.group_size,
        max_new_tokens=parts.max_new_tokens,
        temperature=parts.temperature,
        stop=parts.stop,
        address=(parts.run_seed, iteration, "rollouts"),
    )


def updates_per_iteration(config: Config) -> int:
    """Planned number of updates per iteration; it does not depend on the number of training samples."""
    rollouts = config.rollouts.num_problems * config.rollouts.group_size
    return config.learner.epochs * -(-rollouts // config.learner.minibatch_size)


def total_updates(config: Config) -> int:
    """Planned number of updates of a whole run, after which a linear decay of the learning rate reaches 0."""
    updates = config.run.iterations * updates_per_iteration(config)
    return min(updates, config.run.max_updates) if config.run.max_updates else updates
