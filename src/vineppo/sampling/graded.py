"""Grading of responses that may have been cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.types import Completion, OnFinished, Problem, Sampler, SampleRequest, Task


def grade_finished(
    task: Task,
    problems: Sequence[Problem],
    texts: Sequence[str],
    finished: Sequence[bool],
    completion_ids: Sequence[Sequence[int]] = (),
) -> list[float]:
    """Rewards; a response that was cut off by the length limit has 0 and is never shown to the grader, unless the task
    says otherwise.
    """
    asked = [i for i, done in enumerate(finished) if done or task.grade_truncated]
    rewards = [0.0] * len(texts)
    if asked:
        ids = [completion_ids[i] for i in asked] if completion_ids else ()
        graded = task.grade([problems[i] for i in asked], [texts[i] for i in asked], ids)
        for i, reward in zip(asked, graded, strict=True):
            rewards[i] = float(reward)
    return rewards


def sampled_and_graded(
    sampler: Sampler,
    task: Task,
    decode: Callable[[Sequence[int]], str],
    requests: Sequence[SampleRequest],
    owners: Sequence[tuple[Problem, tuple[int, ...]]],
) -> list[list[tuple[Completion, str, float]]]:
    """Completions of each request with the text and the reward of the responses that they end.

    Args:
        owners: of each request: the problem, and the part of the response that stands before what is sampled.
    """
    completions = sampler.sample(requests, _grades_early(task, decode, owners))
    flat = [(*owner, c) for owner, group in zip(owners, completions, strict=True) for c in group]
    ids = [prefix + c.token_ids for _, prefix, c in flat]
    texts = [decode(response) for response in ids]
    finished = [c.finish_reason == "stop" for _, _, c in flat]
    rewards = grade_finished(task, [problem for problem, _, _ in flat], texts, finished, ids)
    pairs = iter(zip(texts, rewards, strict=True))
    return [[(c, *next(pairs)) for c in group] for group in completions]


def _grades_early(
    task: Task, decode: Callable[[Sequence[int]], str], owners: Sequence[tuple[Problem, tuple[int, ...]]]
) -> OnFinished | None:
    """Passes responses to the task as they end, so that it can begin to grade them; None if it does not grade early."""
    if not task.grades_early:
        return None

    def pass_on(finished: Sequence[tuple[int, Completion]]) -> None:
        ended = [(*owners[i], c) for i, c in finished if c.finish_reason == "stop" or task.grade_truncated]
        ids = [prefix + c.token_ids for _, prefix, c in ended]
        task.expect([problem for problem, _, _ in ended], [decode(response) for response in ids], ids)

    return pass_on
