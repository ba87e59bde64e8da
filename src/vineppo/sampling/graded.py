"""Sample completions and grade the resulting responses, for rollouts, evaluation and Monte-Carlo (MC) rollouts.

A response is *truncated* if it was cut off by the length limit. A truncated response is graded only if the task says so
(`task.grade_truncated`); otherwise its reward is 0.
"""

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
    """Return the reward of each response. Truncated responses are graded only if `task.grade_truncated` is true.

    Args:
        task: the task that grades the responses.
        problems: the problem of each response.
        texts: the text of each response.
        finished: for each response, False if the response is truncated.
        completion_ids: the token ids of each response; empty if the ids are unknown.
    Returns:
        One reward per response. The reward of a response that is not graded is 0.
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
    """Sample the completions of each request, and grade the response that ends with each completion.

    Args:
        sampler: samples the completions.
        task: grades the responses.
        decode: function that converts token ids to text.
        requests: the requests. The `prompt_ids` of a request are a prompt, which may be followed by the first tokens of
            a response (the response prefix).
        owners: one pair (problem, token ids of the response prefix) per request. A response is the response prefix
            followed by a completion.
    Returns:
        One list per request, with a tuple (completion, text of the whole response, reward) for each completion. The
        reward is None if no reward function applies to the response.
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
    """Return a callback for `Sampler.sample` that passes each response to `task.expect` as soon as the response ends.

    The task can then grade this response while the sampler generates others. The result is None if the task does not
    use this possibility (`task.grades_early` is false).

    Args:
        owners: one pair (problem, token ids of the response prefix) per request, as in `sampled_and_graded`.
    """
    if not task.grades_early:
        return None

    def pass_on(finished: Sequence[tuple[int, Completion]]) -> None:
        """Pass responses that have just ended to the task, except for truncated ones that will not be graded."""
        ended = [(*owners[i], c) for i, c in finished if c.finish_reason == "stop" or task.grade_truncated]
        ids = [prefix + c.token_ids for _, prefix, c in ended]
        task.expect([problem for problem, _, _ in ended], [decode(response) for response in ids], ids)

    return pass_on
