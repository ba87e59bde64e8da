"""Graders: reward functions by name or from a user's module.

A reward function is fn(prompts, completions, completion_ids, **columns) -> one number per completion, as in TRL; None
means "not applicable".
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from vineppo.objects import load_object
from vineppo.types import RewardFn, UserError

_NO_MATH_VERIFY = "grader boxed needs math-verify: pip install 'vineppo[math]'"
_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9])"  # the last form is that of .5
_NUMBER = re.compile(rf"(?P<sign>[-+]?)\$?(?P<inner_sign>[-+]?)(?P<digits>{_DIGITS})(?P<decimals>(?:\.[0-9]+)?)\.?")


def grade_exact(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the whole response equals the answer, outer white space aside; else 0."""
    return [float(_text(c).strip() == _gold(a).strip()) for c, a in zip(completions, answer, strict=True)]


def grade_hash(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """1 where the number after the last `####` of the response equals that of the answer; else 0.

    Both sides are read by `hash_number` and compared exactly. There is no second chance: no last number of the text,
    no tolerance, no factor of 100 for percentages.

    Raises:
        UserError: if an answer has no such number, since every response to it would then be wrong.
    """
    golds = [hash_number(_gold(gold)) for gold in answer]
    if None in golds:
        raise UserError(no_hash_number(_gold(answer[golds.index(None)])))
    return [float(hash_number(_text(c)) == gold) for c, gold in zip(completions, golds, strict=True)]


def _text(completion: Any) -> str:
    """What the assistant said, where a completion is a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


def _gold(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer)


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


def grade_boxed(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """1 where what the last `\\boxed{}` of the response holds is mathematically the answer, by math-verify; else 0.

    An answer may be a solution with a `\\boxed{}` of its own or the bare answer. Equal text is equal; else both sides
    are parsed as LaTeX and compared. What stands outside of the box never counts. It is None where math-verify cannot
    read the reference answer and the texts differ: that is no verdict.

    Raises:
        UserError: where math-verify is not installed.
    """
    return [_same_mathematics(last_boxed(_text(c)), _bare(_gold(a))) for c, a in zip(completions, answer, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""What the last `\boxed{...}` (or `\fbox{...}`, or `\boxed x`) of a text holds; None where there is none, or its
    braces do not close.
    """
    start = max(text.rfind(r"\boxed"), text.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("boxed" if text.startswith(r"\boxed", start) else "fbox", 1)[1]
    inside = rest.lstrip()
    if not inside.startswith("{"):
        word = re.match(r" ([^\s$]+)", rest)
        return word[1] if word else None
    depth, escaped = 0, False
    for position, character in enumerate(inside):
        depth += (character == "{") * (not escaped) - (character == "}") * (not escaped)
        if depth == 0:
            return inside[1:position]
        escaped = character == "\\" and not escaped  # two backslashes are a new line, and escape nothing
    return None


def _bare(answer: str) -> str:
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def _same_mathematics(given: str | None, gold: str) -> float | None:
    if given is None or not given.strip():
        return 0.0
    # The printed number counts: 50 and 50% are the same, 0.5 and 50% are not, which math-verify takes for equal.
    given, gold = _without_percent(given), _without_percent(gold)
    if _normal_latex(given) == _normal_latex(gold):
        return 1.0
    parse, verify, latex = _math_verify()
    # Without time limits of their own, which need signals: grading has one for everything, and kills.
    # Text that stands in a formula is part of the answer; "(\text{A})" and "A" are the same choice.
    wanted = parse(f"${gold}$", [latex], parsing_timeout=None)
    if not wanted:
        return None
    found = parse(f"${given}$", [latex], parsing_timeout=None)
    return float(bool(found) and verify(wanted, found, timeout_seconds=None))


def _without_percent(text: str) -> str:
    return re.sub(r"\\?%", "", text)


@functools.cache
def _math_verify() -> tuple[Any, Any, Any]:
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise UserError(_NO_MATH_VERIFY) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse, math_verify.verify, math_verify.LatexExtractionConfig()


def _normal_latex(text: str) -> str:
    r"""The same for notations of one thing: white space, \left, \right, \dfrac and \tfrac, dollars, a last period."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]|[\s$]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


# What a worker does before its first response: importing sympy may take longer than a response may.
grade_boxed.prepare = _math_verify  # type: ignore[attr-defined]

GRADERS: dict[str, RewardFn] = {"exact": grade_exact, "hash": grade_hash, "boxed": grade_boxed}
QUICK = ("exact", "hash")
"""Graders of bounded time and no imports: they need no process of their own."""


def load_grader(spec: str) -> RewardFn:
    """The reward function that a setting names: `exact`, `hash`, `boxed`, or `module:function`.

    Modules are imported as `python -m` would, from the current directory first.

    Raises:
        UserError: if there is no such name, module or function, or the module fails to import.
    """
    if spec == "boxed" and importlib.util.find_spec("math_verify") is None:
        raise UserError(_NO_MATH_VERIFY)
    if spec in GRADERS:
        return GRADERS[spec]
    module, colon, name = spec.partition(":")
    if not (colon and module and name):
        raise UserError(f"no grader {spec!r}; allowed: {', '.join(GRADERS)}, or module:function")
    function: RewardFn = load_object(spec, "grader")
    if not callable(function):
        raise UserError(f"grader {spec!r} is a {type(function).__name__}; it must be a function")
    return function
