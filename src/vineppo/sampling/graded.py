"""Functions that sample and grade responses, including responses that the length limit truncates."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vineppo.types import Completion, OnFinished, Problem, Sampler, SampleRequest, Task


def grade_finished(
    task: Task,
    problems: Sequence[Problem],
    texts: Sequence[str],
    finished: Sequence[bool],
    completion_ids: Sequence[Sequence[int]] = (),
) -> list[float | None]:
    """Return the reward of each response, or None if no reward function applies to the response.

    A response that was truncated by the length limit is graded only if `task.grade_truncated` is true. Otherwise its
    reward is 0.

    Args:
        problems: problem of each response.
        texts: response texts.
        finished: for each response, whether it ended before the length limit.
        completion_ids: token ids of each response; optional.
    """
    gradable = [i for i, done in enumerate(finished) if done or task.grade_truncated]
    rewards: list[float | None] = [0.0] * len(texts)
    if gradable:
        ids = [completion_ids[i] for i in gradable] if completion_ids else ()
        graded = task.grade([problems[i] for i in gradable], [texts[i] for i in gradable], ids)
        for i, reward in zip(gradable, graded, strict=True):
            rewards[i] = None if reward is None else float(reward)
    return rewards


def sampled_and_graded(
    sampler: Sampler,
    task: Task,
    decode: Callable[[Sequence[int]], str],
    requests: Sequence[SampleRequest],
    owners: Sequence[tuple[Problem, tuple[int, ...]]],
) -> list[list[tuple[Completion, str, float | None]]]:
    """Sample the completions of each request, and grade the resulting responses.

    Args:
        owners: the problem and the response prefix of each request. A response is this prefix followed by a completion.
    Returns:
        For each request, a list of (completion, text of the response, reward). The reward is None if no reward function
        applies to the response.
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
    """Return a callback that passes responses to `task.expect` as soon as they end.

    The result is None if `task.grades_early` is false.
    """
    if not task.grades_early:
        return None

    def pass_on(finished: Sequence[tuple[int, Completion]]) -> None:
        ended = [(*owners[i], c) for i, c in finished if c.finish_reason == "stop" or task.grade_truncated]
        ids = [prefix + c.token_ids for _, prefix, c in ended]
        task.expect([problem for problem, _, _ in ended], [decode(response) for response in ids], ids)

    return pass_on
