"""Define the built-in reward functions `exact`, `hash` and `boxed`, and load any reward function by its name.

A grader is a reward function that has a name in the settings. As in TRL, a reward function is called as
fn(prompts, completions, completion_ids, **columns), where the completions are responses. It returns one number per
completion, the reward. None instead of a number means that the function does not apply to the completion.
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

_NO_MATH_VERIFY = "grader boxed needs math-verify; install it with pip install 'vineppo[math]'"
_DIGITS = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9])"  # the last alternative is for numbers such as .5
_NUMBER = re.compile(rf"(?P<sign>[-+]?)\$?(?P<inner_sign>[-+]?)(?P<digits>{_DIGITS})(?P<decimals>(?:\.[0-9]+)?)\.?")
"""A number as described in `hash_number`. The sign may be before or after the dollar sign."""


def grade_exact(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 for each response that equals its reference answer, except for white space at both ends; else 0."""
    return [float(_text(c).strip() == _gold(a).strip()) for c, a in zip(completions, answer, strict=True)]


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
    return [float(hash_number(_text(c)) == gold) for c, gold in zip(completions, golds, strict=True)]


def _text(completion: Any) -> str:
    """Return the text of a completion, which may be a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


def _gold(answer: Any) -> str:
    """Return a reference answer as text."""
    return answer if isinstance(answer, str) else str(answer)


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


def grade_boxed(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    """Return 1 for each response in which the last `\\boxed{}` is mathematically equal to the reference answer; else 0.

    The reference answer may be a solution with a `\\boxed{}`, or the answer alone. If the two texts differ, math-verify
    parses both as LaTeX and compares them. Text outside the boxes is ignored. The reward is None (not applicable) if
    the texts differ and math-verify cannot parse the reference answer.

    Raises:
        UserError: if math-verify is not installed.
    """
    return [_same_mathematics(last_boxed(_text(c)), _bare(_gold(a))) for c, a in zip(completions, answer, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, `\fbox{...}` or `\boxed x` of a text.

    The result is None if there is no box, or if the braces of the last box are not closed.
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
        # A backslash escapes the next character. Two backslashes are a line break in LaTeX and escape nothing.
        escaped = character == "\\" and not escaped
    return None


def _bare(answer: str) -> str:
    """Return the content of the last box in a reference answer, or the whole answer if it has no box."""
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def _same_mathematics(response: str | None, gold: str) -> float | None:
    """Return 1 if two LaTeX texts are mathematically equal, else 0; None if math-verify cannot parse `gold`.

    Args:
        response: content of the last box of a response, or None if the response has no box.
        gold: the reference answer without its box.
    """
    if response is None or not response.strip():
        return 0.0
    # math-verify treats 0.5 and 50% as equal. Without percent signs, 50% equals 50 and does not equal 0.5.
    response, gold = _without_percent(response), _without_percent(gold)
    if _normal_latex(response) == _normal_latex(gold):
        return 1.0
    parse, verify, latex = _math_verify()
    # The time limits of math-verify, which use signals, are switched off: grader processes have a time limit anyway.
    # math-verify also parses the text in `\text{...}`, so that the choices "(\text{A})" and "A" are equal.
    parsed_gold = parse(f"${gold}$", [latex], parsing_timeout=None)
    if not parsed_gold:
        return None
    parsed_response = parse(f"${response}$", [latex], parsing_timeout=None)
    return float(bool(parsed_response) and verify(parsed_gold, parsed_response, timeout_seconds=None))


def _without_percent(text: str) -> str:
    r"""Remove all percent signs, written as % or \%."""
    return re.sub(r"\\?%", "", text)


@functools.cache
def _math_verify() -> tuple[Any, Any, Any]:
    """Import math-verify. Return (its function `parse`, its function `verify`, settings with which it parses LaTeX).

    Raises:
        UserError: if math-verify is not installed.
    """
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise UserError(_NO_MATH_VERIFY) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse, math_verify.verify, math_verify.LatexExtractionConfig()


def _normal_latex(text: str) -> str:
    r"""Remove differences that have no mathematical meaning from LaTeX.

    White space, commands for spaces, \left, \right, dollar signs and final periods are removed; \dfrac and \tfrac
    become \frac.
    """
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]|[\s$]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


# If a reward function has the attribute `prepare`, a grader process calls it before the first response. Here it imports
# math-verify and sympy, which can take longer than the time limit for grading one response.
grade_boxed.prepare = _math_verify  # type: ignore[attr-defined]

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
        raise UserError(_NO_MATH_VERIFY)
    if spec in GRADERS:
        return GRADERS[spec]
    module, colon, name = spec.partition(":")
    if not (colon and module and name):
        raise UserError(f"unknown grader {spec!r}; allowed: {', '.join(GRADERS)}, or module:function")
    function: RewardFn = load_object(spec, "grader")
    if not callable(function):
        raise UserError(f"grader {spec!r} is a {type(function).__name__}; it must be a function")
    return function
