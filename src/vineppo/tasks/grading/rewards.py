"""Call reward functions for the judges, await the asynchronous ones, and check the rewards that they return."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vineppo.objects import first_line
from vineppo.types import Failure, Problem, RewardFn, UserError, Verdict

MAX_REWARD = 1e12
"""Largest magnitude of a reward. Squares and sums of weighted rewards must not overflow in single precision; the sum of
the weights is limited too (`config.schema.MAX_WEIGHTS`)."""
_RESERVED = ("prompts", "completions", "completion_ids", "answer")
"""Arguments that every reward function gets. A column of the data set with one of these names is not passed."""


def apply_rewards(
    fns: Sequence[RewardFn],
    problems: Sequence[Problem],
    texts: Sequence[str],
    completion_ids: Sequence[Sequence[int]] = (),
) -> list[Verdict]:
    """Return the verdict on each response to the problem at the same index.

    Let B be the number of responses and F the number of reward functions. Each function is called once, with the
    keyword arguments `prompts`, `completions`, `completion_ids` and `answer`, and one more for each other column of the
    data set. Every argument is a list of length B. If a problem has no value in a column, the list contains None. If
    the prompt is a conversation, prompt and completion are lists of messages, as in TRL.

    Plain functions are called in the current thread and outside any event loop, so they may call `asyncio.run`. If an
    event loop is already running in this thread, as in a notebook, they are called in another thread. Asynchronous
    functions run after the plain ones, concurrently.

    Args:
        fns: F reward functions.
        problems: B problems; a problem is repeated for each response to it.
        texts: B response texts.
        completion_ids: token ids of the B responses; may be empty if they are unknown.
    Returns:
        B verdicts. A verdict is a tuple of F rewards, each a number, or None if the function does not apply to the
        response. If a function returned NaN or a number whose magnitude is above `MAX_REWARD`, it is a Failure.
    Raises:
        UserError: if a function raises, or does not return one number or None per response.
    """
    assert len(problems) == len(texts), f"{len(problems)} problems but {len(texts)} texts"
    if not problems:
        return []
    arguments = _arguments(problems, texts, completion_ids)
    columns = _outside_event_loops(lambda: _call_all(fns, arguments, len(texts)))
    return [_verdict(rewards) for rewards in zip(*columns, strict=True)]


def _verdict(rewards: Sequence[float | Failure | None]) -> Verdict:
    """Return the rewards of one response, or the first failure among them."""
    numbers = []
    for reward in rewards:
        if isinstance(reward, Failure):
            return reward
        numbers.append(reward)
    return tuple(numbers)


_Columns = list[list[float | Failure | None]]


def _outside_event_loops(call: Callable[[], _Columns]) -> _Columns:
    """Call a function and return its result.

    If an event loop is already running in this thread, as in a notebook, the function is called in another thread.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result()


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


def _call_all(fns: Sequence[RewardFn], arguments: dict[str, list[Any]], count: int) -> _Columns:
    """Return one list of `count` rewards per function. Awaitables that functions return are awaited concurrently."""
    returned: dict[int, Any] = {}
    # Plain functions are called first: if one of them fails, no coroutine is left that is never awaited.
    for i in sorted(range(len(fns)), key=lambda i: _is_asynchronous(fns[i])):
        with _failures_of(fns[i], arguments):
            returned[i] = fns[i](**arguments)
    waiting = {i: value for i, value in returned.items() if inspect.isawaitable(value)}

    async def wait(i: int) -> None:
        with _failures_of(fns[i], arguments):
            returned[i] = await waiting[i]

    async def wait_for_all() -> None:
        await asyncio.gather(*map(wait, waiting))

    if waiting:
        asyncio.run(wait_for_all())
    return [_checked_rewards(fns[i], returned[i], arguments, count) for i in range(len(fns))]


def _is_asynchronous(fn: RewardFn) -> bool:
    """Return whether a call of the function returns a coroutine."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def check_signature(fn: RewardFn, name: str = "") -> None:
    """Check that a reward function accepts the keyword arguments that every reward function gets.

    Arguments for further columns of the data set are not checked. A signature that cannot be read is accepted.

    Args:
        name: name of the function in the error message; empty means its module and name.
    Raises:
        UserError: if the function does not accept one of the arguments.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind_partial(**dict.fromkeys(_RESERVED))
    except TypeError as error:
        raise UserError(
            f"reward function {name or _label(fn)} has the signature {_short(str(signature))}, which does not fit "
            f"({error}); it is called as fn(prompts, completions, completion_ids, answer, **columns) and must return a "
            "list of numbers; add **kwargs for the arguments that it does not use"
        ) from None


@contextlib.contextmanager
def _failures_of(fn: RewardFn, arguments: dict[str, list[Any]]) -> Iterator[None]:
    """Convert an exception of a reward function to a UserError whose cause is that exception."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        columns = [column for column in arguments if column not in _RESERVED[:3]]
        raise UserError(
            f"reward function {_label(fn)} failed: {first_line(error)}; it is called as fn(prompts, completions, "
            f"completion_ids, **columns) with columns {', '.join(columns)} and must return a list of numbers"
        ) from error


def _checked_rewards(
    fn: RewardFn, returned: Any, arguments: dict[str, list[Any]], count: int
) -> list[float | Failure | None]:
    """Return the rewards that a function returned, after checking their number and each of them."""
    with _failures_of(fn, arguments):
        rewards = list(returned)
    if len(rewards) != count:
        raise UserError(f"reward function {_label(fn)} returned {len(rewards)} rewards for {count} completions")
    return [_checked_reward(_label(fn), index, reward) for index, reward in enumerate(rewards)]


def _label(fn: RewardFn) -> str:
    """Return the name of a reward function in error messages, such as `my_rewards:length`."""
    return f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def _checked_reward(name: str, index: int, reward: Any) -> float | Failure | None:
    """Convert a returned reward to a float, or keep None. NaN and too large numbers become a Failure.

    Raise UserError if the reward is not a number.

    Args:
        name: name of the reward function in the error message.
        index: index of the response in the error message.
    """
    if reward is None:
        return None
    try:
        value = None if isinstance(reward, str) else float(reward)
    except OverflowError:
        value = math.inf
    except Exception:
        value = None
    if value is not None and abs(value) <= MAX_REWARD:
        return value
    problem = (
        f"reward function {name}: reward {index} is {_shown(reward)}; allowed: a number from -1e12 to 1e12, or None"
    )
    if value is None:
        raise UserError(problem)
    return Failure(problem)


def _shown(reward: Any) -> str:
    """Return at most 60 characters of the `repr` of a reward, as one line."""
    try:
        return _short(repr(reward))
    except Exception:  # for example an integer of more than 4,300 digits
        return f"a value of type {type(reward).__name__} that cannot be shown"


def _short(text: str) -> str:
    """Return at most 60 characters of a text, as one line."""
    return " ".join(text.split())[:60]
