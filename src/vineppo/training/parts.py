"""Build the objects of a training run (policy, task, sampler, learner and others) from its configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vineppo.config.offline import OfflineConfig
from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.credit.algorithm import Algorithm, CreditParts, SampleFn
from vineppo.learning.learner import TorchLearner
from vineppo.learning.sharding import ONE_RANK, Ranks
from vineppo.model.codec import Codec
from vineppo.model.critic import ValueNetwork
from vineppo.model.policy import Policy, Reference
from vineppo.sampling.build import sampler_line, sampler_of
from vineppo.sampling.ranks import RankSampler
from vineppo.sampling.ray import RaySampler
from vineppo.sampling.version import CurrentSampler
from vineppo.sampling.vllm import VLLMSampler
from vineppo.seeds import derive_seed
from vineppo.tasks import build_task
from vineppo.training.configure import algorithm_settings
from vineppo.training.overlong import fit_prompts, used_problems
from vineppo.training.rollouts import sample_groups, warn_of_few_problems
from vineppo.types import (
    CreditFn,
    Metrics,
    Problem,
    RewardFn,
    RolloutGroup,
    Sampler,
    Split,
    Task,
    TrainingSample,
    UserError,
)


@dataclass(frozen=True)
class Parts:
    """The objects of a training run.

    In each iteration, the training loop calls `sample`, `credit`, `learner.update` and `update_sampler` in this order.
    """

    algorithm: Algorithm
    policy: Policy
    codec: Codec
    task: Task
    sampler: CurrentSampler
    sample_groups: SampleFn
    """Function of the algorithm that samples a group of rollouts for each problem. `sample` calls this function."""
    credit: CreditFn
    """Function of the algorithm that computes training samples from the groups of an iteration."""
    learner: TorchLearner
    group_size: int
    """G, the number of rollouts that each group must have."""
    stop: tuple[str, ...]
    """Strings that end a response, in addition to the end-of-sequence tokens."""
    sampler_line: str
    """One line that says which sampler is used, and why."""
    left_out: Mapping[Split, int]
    """Number of problems of each split that were left out because their prompts are too long."""

    def sample(self, problems: Sequence[Problem], iteration: int) -> tuple[list[RolloutGroup], int]:
        """Sample and grade a group of rollouts for each problem.

        Returns:
            (groups in the order of the problems, number of sampled tokens).
        Raises:
            UserError: if the function `sample` of the algorithm returns a wrong number of groups, or groups of a wrong
                size.
        """
        before = self.sampler.tokens
        groups = self.sample_groups(problems, iteration)
        sizes = {len(group.rollouts) for group in groups}
        if len(groups) != len(problems) or sizes != {self.group_size}:
            raise UserError(
                f"algorithm {self.algorithm.name} returned {len(groups)} groups of {sorted(sizes)} rollouts for "
                f"{len(problems)} problems; it must return one group per problem, with {self.group_size} rollouts each "
                "(rollouts.group_size)"
            )
        return groups, self.sampler.tokens - before

    def update_sampler(self) -> None:
        """Give the learner's current weights to the sampler, with the learner's number of updates as their version."""
        self.sampler.update_weights(self.learner.updates, self.learner.weights)

    def free_sampler_memory(self) -> None:
        """Free the memory of a sampler that shares the learner's GPU, until the next call of the sampler."""
        if isinstance(self.sampler.sampler, VLLMSampler | RankSampler):
            self.sampler.sampler.sleep()


@dataclass(frozen=True)
class InMemory:
    """A model and data sets that are already in memory and are used instead of loading the configured ones."""

    policy: Policy | None = None
    """The policy to train, which is changed in place; None loads the configured model."""
    tables: Mapping[Split, Any] | None = None
    """Split -> table with the problems of the task `dataset`, with a column for prompts and one for answers. None loads
    the configured data."""


BUILD = "build"
"""First announcement of rank 0 to the other ranks of a run, with the configuration."""
NOTHING_IN_MEMORY = InMemory()
"""Loads the configured model and data."""


def build_networks(config: Config, policy: Policy, ranks: Ranks = ONE_RANK) -> tuple[TorchLearner, Sampler | None]:
    """Build the learner of a policy, and the sampler that uses its weights. All ranks must call this function.

    Returns:
        (learner, sampler). With a Ray pool only rank 0 has a sampler; it is None on the other ranks.
    """
    learner = build_learner(config, find_algorithm(config.algorithm), policy, ranks)
    if config.sampler.pool == "ray":
        return learner, build_engine(config, policy) if ranks.rank == 0 else None
    engine = build_engine(config, policy)
    return learner, engine if ranks.count == 1 else RankSampler(engine, ranks)


def build_parts(
    config: Config,
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    in_memory: InMemory = NOTHING_IN_MEMORY,
    ranks: Ranks = ONE_RANK,
) -> Parts:
    """Load and build all objects of a training run. This function writes no files.

    Args:
        config: the settings of the run, with the section of its algorithm.
        reward_fn: one or several functions that replace the task's graders; None uses the configured graders.
        in_memory: a model or data sets that are used instead of loading the configured ones.
        ranks: the processes of the run. This one leads the others, which call `following.follow`.
    Raises:
        UserError: if the algorithm, the model, the data or the graders cannot be used.
    """
    algorithm = find_algorithm(config.algorithm)
    settings = algorithm_settings(config, algorithm)
    ranks.announce(BUILD, config)
    policy = in_memory.policy or Policy.load(config.model)
    task = build_task(config.task, policy.codec.chat_prompt, reward_fn, in_memory.tables)
    limit = config.rollouts.max_new_tokens
    left_out = fit_prompts(task, policy.codec, limit, config.task.overlong, used_problems(config.eval))
    warn_of_few_problems(task, config.rollouts.num_problems)
    learner, engine = build_networks(config, policy, ranks)
    assert engine is not None  # This is rank 0.
    sampler = CurrentSampler(engine, lambda: learner.updates)
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
        save_continuations=config.run.save_continuations if config.run.save_rollouts else 0,
    )
    sample = algorithm.sample(settings, parts) if algorithm.sample else functools.partial(sample_independently, parts)
    credit = checked_credit(algorithm, algorithm.build(settings, parts))
    size, stop = parts.group_size, parts.stop
    line = _sampler_line(policy, config, engine, ranks)
    return Parts(algorithm, policy, policy.codec, task, sampler, sample, credit, learner, size, stop, line, left_out)


def _sampler_line(policy: Policy, config: Config, engine: Sampler, ranks: Ranks) -> str:
    """Return one line that says which sampler is used, and with how many processes."""
    line = engine.line if isinstance(engine, RaySampler) else sampler_line(policy, config.sampler.engine)
    return f"{line}, {ranks.count} processes" if ranks.count > 1 else line


def checked_credit(algorithm: Algorithm, credit: CreditFn) -> CreditFn:
    """Wrap the credit function of an algorithm so that its results are checked.

    Returns:
        A credit function that raises UserError if `credit` does not return a pair (training samples, metrics).
    Raises:
        UserError: if `credit` is not a function.
    """
    if not callable(credit):
        raise UserError(
            f"the function build of algorithm {algorithm.name} returned a {type(credit).__name__}; it must return the "
            "credit function"
        )

    def checked(groups: list[RolloutGroup], iteration: int) -> tuple[list[TrainingSample], Metrics]:
        """Call the credit function and check the types of its result."""
        result: Any = credit(groups, iteration)
        samples, metrics = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
        if not isinstance(metrics, Mapping) or not isinstance(samples, Sequence):
            types = [type(item).__name__ for item in (result if isinstance(result, tuple) else [result])]
            raise UserError(
                f"the credit function of {algorithm.name} returned ({', '.join(types)}); it must return a pair (list "
                "of training samples, dictionary of metrics)"
            )
        wrong = [sample for sample in samples if not isinstance(sample, TrainingSample)]
        if wrong:
            raise UserError(
                f"the credit function of {algorithm.name} returned a {type(wrong[0]).__name__} among its training "
                "samples; build each sample with vineppo.training_sample"
            )
        return samples, metrics  # type: ignore[return-value]

    return checked


def build_learner(config: Config, algorithm: Algorithm, policy: Policy, ranks: Ranks = ONE_RANK) -> TorchLearner:
    """Build the learner that trains a policy.

    The learner gets a reference model if the coefficient of the KL penalty is above 0, and a value network if the
    algorithm needs one.

    Args:
        ranks: the processes that share the work of the learner. All of them must call this function.
    """
    settings = algorithm_settings(config, algorithm) if algorithm.needs_critic else None
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
        max_new_tokens=config.rollouts.max_new_tokens,
        ranks=ranks,
    )


def build_engine(config: Config | OfflineConfig, policy: Policy) -> Sampler:
    """Build the sampler that generates responses: in this process with the weights of a policy, or in a pool.

    `sampling.wrapped.close` ends the processes of a pool.
    """
    if config.sampler.pool == "ray":
        return RaySampler(policy, config.model, config.sampler)
    return sampler_of(policy, config.sampler, config.rollouts)


def sample_independently(parts: CreditParts, problems: Sequence[Problem], iteration: int) -> list[RolloutGroup]:
    """Sample and grade a group of `parts.group_size` independent rollouts for each problem.

    This function is used for algorithms that do not define a function `sample`.
    """
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
    """Return the planned number of updates per iteration: epochs times ceil(rollouts / minibatch size).

    This number does not depend on how many training samples the algorithm creates from the rollouts.
    """
    rollouts = config.rollouts.num_problems * config.rollouts.group_size
    return config.learner.epochs * -(-rollouts // config.learner.minibatch_size)


def total_updates(config: Config) -> int:
    """Return the planned number of updates of a run, at most `run.max_updates`.

    A linear or cosine decay of the learning rate reaches 0 after this number of updates. The run may make more updates,
    because it finishes its last iteration. The learning rate of these further updates is 0.
    """
    updates = config.run.iterations * updates_per_iteration(config)
    return min(updates, config.run.max_updates) if config.run.max_updates else updates
