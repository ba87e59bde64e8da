"""Problems to groups of graded rollouts."""

from __future__ import annotations

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
    Task,
    UserError,
)


def draw_problems(task: ProblemSource, seed: int, iteration: int, count: int) -> list[Problem]:
    """The training problems of an iteration: fresh ones of an endless task, shuffled passes over a finite one."""
    size = task.size("train")
    if size is None:
        return [task.problem("train", derive_seed(seed, iteration, "problem", i)) for i in range(count)]
    positions = range((iteration - 1) * count, iteration * count)
    return [task.problem("train", shuffled_index(position, size, seed, "problem order")) for position in positions]


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
    """G graded rollouts of each problem.

    Args:
        temperature: of sampling; 0 is greedy.
        stop: strings that end a response, beside the end-of-sequence tokens.
        address: what the randomness is for, for example (run seed, iteration, "rollouts"); the problem's id and how
            often it came before are added.
    Raises:
        UserError: when a prompt and the response budget do not fit into the model's context.
    """
    prompts = [codec.encode_prompt(problem.prompt) for problem in problems]
    for problem, prompt_ids in zip(problems, prompts, strict=True):
        check_length(problem.id, len(prompt_ids), max_new_tokens, codec.max_length)
    # A small data set can give one problem twice in an iteration: its second group must not repeat the first.
    seen: Counter[str] = Counter()
    requests = []
    for problem, prompt_ids in zip(problems, prompts, strict=True):
        seed = derive_seed(*address, problem.id, seen[problem.id])
        requests.append(SampleRequest(prompt_ids, group_size, max_new_tokens, seed, temperature=temperature, stop=stop))
        seen[problem.id] += 1
    owners: list[tuple[Problem, tuple[int, ...]]] = [(problem, ()) for problem in problems]
    graded = sampled_and_graded(sampler, task, codec.decode, requests, owners)
    return [
        RolloutGroup(problem, tuple(_rollout(prompt_ids, *one) for one in group))
        for problem, prompt_ids, group in zip(problems, prompts, graded, strict=True)
    ]


def check_length(problem_id: str, prompt_tokens: int, max_new_tokens: int, max_length: int) -> None:
    """Refuse a prompt that leaves no room for its response budget in the model's context.

    Raises:
        UserError: one line with the numbers and the setting to change.
    """
    if prompt_tokens + max_new_tokens > max_length:
        raise UserError(
            f"the prompt of {problem_id} has {prompt_tokens} tokens; with rollouts.max_new_tokens {max_new_tokens} "
            f"that is more than the model's context of {max_length}; lower it or shorten the prompts"
        )


def generated_tokens(groups: Sequence[RolloutGroup]) -> int:
    """Response tokens of all rollouts."""
    return sum(len(rollout.response_ids) for group in groups for rollout in group.rollouts)


def problem_range(task: ProblemSource, split: Split, count: int) -> list[Problem]:
    """The first `count` problems of a split, fewer where it has fewer."""
    size = task.size(split)
    return [task.problem(split, index) for index in range(count if size is None else min(count, size))]


def _rollout(prompt_ids: tuple[int, ...], completion: Completion, text: str, reward: float) -> Rollout:
    return Rollout(
        prompt_ids=prompt_ids,
        response_ids=completion.token_ids,
        sampler_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        text=text,
        reward=reward,
    )
