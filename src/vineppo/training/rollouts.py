"""Draw problems, and sample and grade groups of rollouts of these problems, for training and evaluation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

from vineppo.model.codec import Codec
from vineppo.sampling.graded import sampled_and_graded
from vineppo.seeds import derive_seed, shuffled_index
from vineppo.types import (
    Completion,
    Problem,
    ProblemSource,
    Rollout,
    RolloutGroup,
    Sampler,
    SampleRequest,
    Split,
    Tally,
    Task,
    TrainingWarning,
    UserError,
)

_MIN_GRADED = 20
"""Number of responses without a reward after which a run stops if there was no response with a reward."""


def draw_problems(task: ProblemSource, seed: int, iteration: int, count: int) -> list[Problem]:
    """Return `count` problems of the split `train` for an iteration.

    If the number of problems is unlimited, the problems have random indices. Otherwise all problems are used in passes
    over the split, and each pass has a new random order.

    Args:
        seed: seed of the run.
        iteration: number of the iteration, counted from 1.
    """
    size = task.size("train")
    if size is None:
        return [task.problem("train", derive_seed(seed, iteration, "problem", i)) for i in range(count)]
    positions = range((iteration - 1) * count, iteration * count)
    return [task.problem("train", shuffled_index(position, size, seed, "problem order")) for position in positions]


def warn_of_few_problems(task: ProblemSource, count: int) -> None:
    """Warn if an iteration draws more problems than the split `train` has, so that problems occur several times.

    Args:
        count: number of problems per iteration.
    """
    size = task.size("train")
    if size is not None and size < count:
        warnings.warn(
            f"rollouts.num_problems is {count}, but the task has only {size} training problem{'s' * (size != 1)}, so "
            "every iteration contains problems several times; add problems, or lower rollouts.num_problems",
            TrainingWarning,
            stacklevel=2,
        )


def sample_groups(
    problems: Sequence[Problem],
    codec: Codec,
    sampler: Sampler,
    task: Task,
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    stop: tuple[str, ...] = (),
    address: Sequence[int | str],
) -> list[RolloutGroup]:
    """Sample and grade a group of rollouts for each problem.

    Args:
        group_size: number of rollouts per problem.
        max_new_tokens: maximum length of a response in tokens.
        temperature: sampling temperature; 0 means greedy decoding.
        stop: strings that end a response, in addition to the end-of-sequence tokens.
        address: values from which the sampling seeds are derived, for example (run seed, iteration, "rollouts"). The
            seed of a group also depends on the id of its problem.
    Returns:
        One group per problem, in the order of the problems.
    Raises:
        UserError: if the tokens of a prompt plus `max_new_tokens` exceed the model's context.
    """
    prompts = [codec.prompt_ids(problem) for problem in problems]
    for problem, prompt_ids in zip(problems, prompts, strict=True):
        check_length(problem.id, len(prompt_ids), max_new_tokens, codec.max_length)
    # A problem of a small data set can occur several times in an iteration. Its groups must have different seeds, so a
    # seed also depends on the number of earlier occurrences.
    seen: Counter[str] = Counter()
    requests = []
    for problem, prompt_ids in zip(problems, prompts, strict=True):
        seed = derive_seed(*address, problem.id, seen[problem.id])
        requests.append(SampleRequest(prompt_ids, group_size, max_new_tokens, seed, temperature=temperature, stop=stop))
        seen[problem.id] += 1
    # The requests contain no tokens of a response, so the response prefixes are empty.
    owners: list[tuple[Problem, tuple[int, ...]]] = [(problem, ()) for problem in problems]
    graded = sampled_and_graded(sampler, task, codec.decode, requests, owners)
    return [
        RolloutGroup(problem, tuple(_rollout(prompt_ids, *sample) for sample in group))
        for problem, prompt_ids, group in zip(problems, prompts, graded, strict=True)
    ]


def check_length(problem_id: str, prompt_tokens: int, max_new_tokens: int, max_length: int) -> None:
    """Check that a prompt and a response of the maximum length fit into the model's context.

    Args:
        problem_id: id of the problem, for the error message.
        prompt_tokens: number of tokens of the prompt.
        max_new_tokens: maximum length of a response in tokens.
        max_length: maximum sequence length of the model in tokens.
    Raises:
        UserError: if `prompt_tokens + max_new_tokens` exceeds `max_length`.
    """
    if prompt_tokens + max_new_tokens > max_length:
        raise UserError(
            f"the prompt of {problem_id} has {prompt_tokens} tokens; with rollouts.max_new_tokens {max_new_tokens} "
            f"that is more than the model's context of {max_length}; lower rollouts.max_new_tokens or shorten "
            "the prompts"
        )


def check_rewards(groups: Sequence[RolloutGroup], total: Tally) -> None:
    """Stop a run whose reward functions have not applied to any response. They are then probably wrong.

    Args:
        groups: the rollouts of an iteration.
        total: statistics of all responses that were graded since the process started.
    Raises:
        UserError: if neither any of the rollouts nor any graded response has a reward, and at least 20 responses were
            graded.
    """
    rewards = [rollout.reward for group in groups for rollout in group.rollouts]
    if all(reward is None for reward in rewards) and total.not_applicable == total.graded >= _MIN_GRADED:
        raise UserError(
            f"every reward function returned None for all {total.graded} responses that were graded so far, so there "
            "is nothing to learn; return a number for each response to which a reward function applies"
        )


def generated_tokens(groups: Sequence[RolloutGroup]) -> int:
    """Return the total number of response tokens of all rollouts."""
    return sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)


def problem_range(task: ProblemSource, split: Split, count: int) -> list[Problem]:
    """Return the first `count` problems of a split, or all problems of the split if there are fewer."""
    size = task.size(split)
    return [task.problem(split, index) for index in range(count if size is None else min(count, size))]


def _rollout(prompt_ids: tuple[int, ...], completion: Completion, text: str, reward: float | None) -> Rollout:
    """Return a rollout whose whole response is one completion."""
    return Rollout(
        prompt_ids=prompt_ids,
        response_ids=completion.token_ids,
        sampler_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        text=text,
        reward=reward,
    )
