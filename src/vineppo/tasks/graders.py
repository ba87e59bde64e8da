"""Graders: reward functions by name or from a user's module, and the one place that calls them.

A reward function is fn(prompts, completions, **columns) -> one number per completion; None means "not gradable" and
counts as 0.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from vineppo.types import Problem, RewardFn, UserError

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9])"  # the last form is that of .5
_NUMBER = re.compile(rf"(?P<sign>[-+]?)\$?(?P<inner_sign>[-+]?)(?P<digits>{_DIGITS})(?P<decimals>(?:\.[0-9]+)?)\.?")
_RESERVED = ("prompts", "completions", "answer")


def grade_exact(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the whole response equals the answer, outer white space aside; else 0."""
    return [float(text.strip() == gold.strip()) for text, gold in zip(completions, answer, strict=True)]


def grade_hash(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 where the number after the last `####` of the response equals that of the answer; else 0.

    Both sides are read by `hash_number` and compared exactly. There is no second chance: no last number of the text,
    no tolerance, no factor of 100 for percentages.

    Raises:
        UserError: if an answer has no such number, since every response to it would then be wrong.
    """
    golds = [hash_number(gold) for gold in answer]
    if None in golds:
        raise UserError(no_hash_number(answer[golds.index(None)]))
    return [float(hash_number(text) == gold) for text, gold in zip(completions, golds, strict=True)]


def hash_number(text: str) -> Decimal | None:
    """The number that stands alone between the last `####` and the end of its line; None where there is none.

    Read are: commas between groups of three digits, a sign, a leading `$`, decimals, a trailing period. Anything else
    on the line (a unit, a second number, a fraction, a lone comma) is no number.
    """
    _, mark, rest = text.rpartition("####")
    found = _NUMBER.fullmatch(rest.split("\n", 1)[0].strip()) if mark else None
    if found is None or (found["sign"] and found["inner_sign"]):
        return None
    # Decimal, not float or int: exact, and without int's limit on the number of digits.
    return Decimal(found["sign"] + found["inner_sign"] + found["digits"].replace(",", "") + found["decimals"])


def no_hash_number(answer: str) -> str:
    """The one line that says that the grader `hash` cannot use a reference answer."""
    tail = answer if len(answer) <= 40 else "..." + answer[-40:]
    return f"grader hash: the reference answer {tail!r} has no number after `####`; use exact or module:function"


GRADERS: dict[str, RewardFn] = {"exact": grade_exact, "hash": grade_hash}


def load_grader(spec: str) -> RewardFn:
    """The reward function that a setting names: `exact`, `hash`, or `module:function`.

    Modules are imported as `python -m` would, from the current directory first.

    Raises:
        UserError: if there is no such name, module or function, or the module fails to import.
    """
    if spec in GRADERS:
        return GRADERS[spec]
    module_name, colon, function_name = spec.partition(":")
    if not (colon and module_name and function_name):
        raise UserError(f"no grader {spec!r}; allowed: {', '.join(GRADERS)}, or module:function")
    module = _import_module(spec, module_name)
    function = getattr(module, function_name, None)
    if function is None:
        names = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        near = difflib.get_close_matches(function_name, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"its functions: {', '.join(names) or 'none'}"
        raise UserError(f"grader {spec!r}: module {module_name!r} has no {function_name!r}; {hint}")
    if not callable(function):
        raise UserError(f"grader {spec!r} is a {type(function).__name__}; it must be a function")
    return function


def apply_reward(fn: RewardFn, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
    """Reward of each response text to the problem beside it, by one call of `fn`.

    Columns are gathered over the problems: `answer`, and every further column by its name (None where a problem lacks
    it). Further columns named prompts, completions or answer are not handed over: the names are taken.

    Args:
        fn: the reward function; a None among its rewards counts as 0.
        problems: B problems; one problem stands once for each of its responses.
        texts: B responses.
    Returns:
        B finite rewards.
    Raises:
        UserError: if `fn` raises, or returns anything but one finite number or None per response.
    """
    assert len(problems) == len(texts), f"{len(problems)} problems but {len(texts)} texts"
    if not problems:
        return []
    names = dict.fromkeys(name for problem in problems for name in problem.columns if name not in _RESERVED)
    columns: dict[str, list[Any]] = {name: [problem.columns.get(name) for problem in problems] for name in names}
    columns["answer"] = [problem.answer for problem in problems]
    label = _label(fn)
    try:
        rewards = list(fn(prompts=[problem.prompt for problem in problems], completions=list(texts), **columns))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"reward function {label} failed: {first_line(error)}; it is called as fn(prompts, completions, **columns) "
            f"with columns {', '.join(columns)} and returns a list of numbers"
        ) from error
    if len(rewards) != len(texts):
        raise UserError(f"reward function {label} returned {len(rewards)} rewards for {len(texts)} completions")
    return [_finite(label, index, reward) for index, reward in enumerate(rewards)]


def first_line(error: BaseException) -> str:
    """An error as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _import_module(spec: str, name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        # A missing import *inside* the user's module is a failure of that module, not a missing module.
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"grader {spec!r}: no module {error.name!r} in the current directory or among the installed packages"
            ) from error
        raise UserError(f"grader {spec!r}: importing {name!r} failed: {first_line(error)}") from error


def _label(fn: RewardFn) -> str:
    return f"{getattr(fn, '__module__', '?')}:{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def _finite(label: str, index: int, reward: Any) -> float:
    if reward is None:
        return 0.0
    try:
        value = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        shown = " ".join(repr(reward).split())[:60]
        raise UserError(f"reward function {label}: reward {index} is {shown}; allowed: a finite number or None")
    return value
