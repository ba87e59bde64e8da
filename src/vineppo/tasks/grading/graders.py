"""Define the built-in reward functions `exact`, `hash` and `boxed`, and load any reward function by its name.

A grader is a reward function that has a name in the settings. As in TRL, a reward function is called as
fn(prompts, completions, completion_ids, **columns), where the completions are responses. It returns one number per
completion, the reward. None instead of a number means that the function does not apply to the completion.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from vineppo.objects import load_object
from vineppo.tasks.cells import is_blank, is_number, number_text
from vineppo.tasks.grading.boxed import NO_MATH_VERIFY, grade_boxed, text_of
from vineppo.types import RewardFn, UserError

_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9])"  # the last alternative is for numbers such as .5
_NUMBER = re.compile(rf"(?P<sign>[-+]?)\$?(?P<inner_sign>[-+]?)(?P<digits>{_DIGITS})(?P<decimals>(?:\.[0-9]+)?)\.?")
"""A number as described in `hash_number`. The sign may be before or after the dollar sign."""


def grade_exact(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """Return 1 for each response that equals its reference answer, except for white space at both ends; else 0.

    The reward is None (not applicable) if there is no reference answer: an empty response would be right.
    """
    golds = [_gold(a).strip() for a in answer]
    return [float(text_of(c).strip() == gold) if gold else None for c, gold in zip(completions, golds, strict=True)]


def grade_hash(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 for each response that has the same number after its last `####` as its reference answer; else 0.

    Both numbers are read by `hash_number` and compared exactly. There is no tolerance, no factor of 100 for
    percentages, and no fallback to the last number of the text.

    Raises:
        UserError: if `hash_number` finds no number in a reference answer. Without this error, every response to the
            problem would be graded as wrong.
    """
    golds = [hash_number(_gold(gold)) for gold in answer]
    if None in golds:
        raise UserError(no_hash_number(_gold(answer[golds.index(None)])))
    return [float(hash_number(text_of(c)) == gold) for c, gold in zip(completions, golds, strict=True)]


def _gold(answer: Any) -> str:
    """Return a reference answer as text; empty if it is missing."""
    if isinstance(answer, str):
        return answer
    if is_blank(answer):
        return ""
    return number_text(answer) if is_number(answer) else str(answer)


def hash_number(text: str) -> Decimal | None:
    """Return the number between the last `####` and the end of its line, or None if this text is not a single number.

    The number may have commas between groups of three digits, a sign, a leading `$`, decimals and a trailing period. If
    the text contains anything else (a unit, a second number, a fraction, a misplaced comma), the result is None.
    """
    _, mark, rest = text.rpartition("####")
    match = _NUMBER.fullmatch(rest.split("\n", 1)[0].strip()) if mark else None
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    # Decimal is exact, unlike float, and has no limit on the number of digits, unlike int.
    return Decimal(match["sign"] + match["inner_sign"] + match["digits"].replace(",", "") + match["decimals"])


def no_hash_number(answer: str) -> str:
    """Return the error message for a reference answer that the grader `hash` cannot use."""
    tail = answer if len(answer) <= 40 else "..." + answer[-40:]
    return f"grader hash: the reference answer {tail!r} has no number after `####`; use exact or module:function"


GRADERS: dict[str, RewardFn] = {"exact": grade_exact, "hash": grade_hash, "boxed": grade_boxed}
"""Name -> built-in reward function."""
QUICK = ("exact", "hash")
"""Names of the built-in reward functions that need no grader process, because they are fast and safe."""


def load_grader(spec: str) -> RewardFn:
    """Load a reward function by name: `exact`, `hash`, `boxed`, or `module:function`.

    The module of `module:function` is searched first in the current directory, as with `python -m`.

    Raises:
        UserError: if the name, module or function does not exist, or importing the module fails.
    """
    if spec == "boxed" and importlib.util.find_spec("math_verify") is None:
        raise UserError(NO_MATH_VERIFY)
    if spec in GRADERS:
        return GRADERS[spec]
    module, colon, name = spec.partition(":")
    if not (colon and module and name):
        raise UserError(f"unknown grader {spec!r}; allowed: {', '.join(GRADERS)}, or module:function")
    function: RewardFn = load_object(spec, "grader")
    if not callable(function):
        raise UserError(f"grader {spec!r} is a {type(function).__name__}; it must be a function")
    return function
