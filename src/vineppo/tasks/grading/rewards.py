"""Call reward functions for the judges, await the asynchronous ones, and check the rewards that they return."""

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
"""Arguments that every reward function gets. A column of the data set with one of these names is not passed."""


def apply_rewards(
    fns: Sequence[RewardFn],
    problems: Sequence[Problem],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]] = (),
) -> list[tuple[float | None, ...]]:
    """Return the rewards of each response to the problem at the same index.

    Let B be the number of responses and F the number of reward functions. Each function is called once, with the
    keyword arguments `prompts`, `completions`, `completion_ids` and `answer`, and one more for each other column of the
    data set. Every argument is a list of length B. If a problem has no value in a column, the list contains None. If
    the prompt is a conversation, prompt and completion are lists of messages, as in TRL. Asynchronous functions run
    concurrently.

    Args:
        fns: F reward functions.
        problems: B problems; a problem is repeated for each response to it.
        texts: B response texts.
        completion_ids: token ids of the B responses; may be empty if they are unknown.
    Returns:
        B tuples of F rewards, each a finite number, or None if the function does not apply to the response.
    Raises:
        UserError: if a function raises, or does not return one finite number or None per response.
    """
    assert len(problems) == len(texts), f"{len(problems)} problems but {len(texts)} texts"
    if not problems:
        return []
    arguments = _arguments(problems, texts, completion_ids)
    return list(zip(*_run(_call_all(fns, arguments, len(texts))), strict=True))


def _run(coroutine: Coroutine[Any, Any, list[list[float | None]]]) -> list[list[float | None]]:
    """Run a coroutine to completion and return its result.

    If an event loop is already running in this thread, as in a notebook, the coroutine runs in another thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, coroutine).result()


def _arguments(
    problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
) -> dict[str, list[Any]]:
    """Return the keyword arguments of the reward functions, as lists with one entry per response."""
    names = dict.fromkeys(name for problem in problems for name in problem.columns if name not in _RESERVED)
    return {
        "prompts": [list(problem.messages) or problem.prompt for problem in problems],
        "completions": [_response(problem, text) for problem, text in zip(problems, texts, strict=True)],
        "completion_ids": [list(ids) for ids in completion_ids] or [[] for _ in texts],
        **{name: [problem.columns.get(name) for problem in problems] for name in names},
        "answer": [problem.answer if problem.reference is None else problem.reference for problem in problems],
    }


def _response(problem: Problem, text: str) -> Any:
    """Return the response as text, or as a list with one assistant message if the prompt is a conversation."""
    return [{"role": "assistant", "content": text}] if problem.messages else text


async def _call_all(fns: Sequence[RewardFn], arguments: dict[str, list[Any]], count: int) -> list[list[float | None]]:
    """Return one list of `count` rewards per function. Asynchronous functions are awaited concurrently."""
    return list(await asyncio.gather(*(_call(fn, arguments, count) for fn in fns)))


async def _call(fn: RewardFn, arguments: dict[str, list[Any]], count: int) -> list[float | None]:
    """Call one reward function and return its `count` rewards, each a finite number or None.

    Raises:
        UserError: if the function raises an exception or returns anything else.
    """
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
            f"completion_ids, **columns) with columns {', '.join(columns)} and must return a list of numbers"
        ) from error
    if len(rewards) != count:
        raise UserError(f"reward function {name} returned {len(rewards)} rewards for {count} completions")
    return [_checked_reward(name, index, reward) for index, reward in enumerate(rewards)]


def _label(fn: RewardFn) -> str:
    """Return the name of a reward function in error messages, such as `my_rewards:length`."""
    return f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def _checked_reward(name: str, index: int, reward: Any) -> float | None:
    """Convert a returned reward to a float, or keep None. Raise UserError if it is not a finite number.

    Args:
        name: name of the reward function in the error message.
        index: index of the response in the error message.
    """
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
