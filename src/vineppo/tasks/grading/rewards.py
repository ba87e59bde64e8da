"""The one place that calls reward functions: columns gathered, awaited where asynchronous, every number checked."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vineppo.objects import first_line
from vineppo.types import Problem, RewardFn, UserError

_RESERVED = ("prompts", "completions", "completion_ids", "answer")


def apply_rewards(
    fns: Sequence[RewardFn],
    problems: Sequence[Problem],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]] = (),
) -> list[tuple[float | None, ...]]:
    """Rewards of each response text to the problem beside it, by one call of each function.

    Columns are gathered over the problems: `answer`, and every further column by its name (None where a problem lacks
    it). Further columns named like the other arguments are not handed over: the names are taken. Where prompts are
    conversations, prompts and completions are lists of messages, as in TRL. Asynchronous functions run at the
    same time.

    Args:
        fns: F reward functions.
        problems: B problems; one problem stands once for each of its responses.
        texts: B responses.
        completion_ids: their B lists of token ids; empty where they are unknown.
    Returns:
        B times F finite rewards, or None where a function said that it does not apply.
    Raises:
        UserError: if a function raises, or returns anything but one finite number or None per response.
    """
    assert len(problems) == len(texts), f"{len(problems)} problems but {len(texts)} texts"
    if not problems:
        return []
    arguments = _arguments(problems, texts, completion_ids)
    return list(zip(*_run(_gathered(fns, arguments, len(texts))), strict=True))


def _run(called: Coroutine[Any, Any, list[list[float | None]]]) -> list[list[float | None]]:
    """Await in a loop of our own; a notebook has one running in this thread, so there it is in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(called)
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(asyncio.run, called).result()


def _arguments(
    problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for problem in problems for name in problem.columns if name not in _RESERVED)
    return {
        "prompts": [list(problem.messages) or problem.prompt for problem in problems],
        "completions": [_response(problem, text) for problem, text in zip(problems, texts, strict=True)],
        "completion_ids": [list(ids) for ids in completion_ids] or [[] for _ in texts],
        **{name: [problem.columns.get(name) for problem in problems] for name in names},
        "answer": [problem.answer if problem.reference is None else problem.reference for problem in problems],
    }


def _response(problem: Problem, text: str) -> Any:
    """A response as text, or as an assistant's message where the prompt was a conversation."""
    return [{"role": "assistant", "content": text}] if problem.messages else text


async def _gathered(fns: Sequence[RewardFn], arguments: dict[str, list[Any]], count: int) -> list[list[float | None]]:
    """F lists of B rewards. What can be awaited is awaited together."""
    return list(await asyncio.gather(*(_called(fn, arguments, count) for fn in fns)))


async def _called(fn: RewardFn, arguments: dict[str, list[Any]], count: int) -> list[float | None]:
    name = _label(fn)
    try:
        rewards: Any = fn(**arguments)
        if inspect.isawaitable(rewards):
            rewards = await rewards
        rewards = list(rewards)
    except UserError:
        raise
    except Exception as error:
        columns = [column for column in arguments if column not in _RESERVED[:3]]
        raise UserError(
            f"reward function {name} failed: {first_line(error)}; it is called as fn(prompts, completions, "
            f"completion_ids, **columns) with columns {', '.join(columns)} and returns a list of numbers"
        ) from error
    if len(rewards) != count:
        raise UserError(f"reward function {name} returned {len(rewards)} rewards for {count} completions")
    return [_finite(name, index, reward) for index, reward in enumerate(rewards)]


def _label(fn: RewardFn) -> str:
    return f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def _finite(name: str, index: int, reward: Any) -> float | None:
    if reward is None:
        return None
    try:
        value = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        shown = " ".join(repr(reward).split())[:60]
        raise UserError(f"reward function {name}: reward {index} is {shown}; allowed: a finite number or None")
    return value
