"""Graders, that is, reward functions: the built-in ones, and `load_grader`, which loads a reward function by name.

As in TRL, a reward function is fn(prompts, completions, completion_ids, **columns) -> one number per completion.
None in place of a number means that the function does not apply to the completion.
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


def grade_exact(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 if the whole response equals the answer, except for leading and trailing white space; else 0."""
    return [float(_text(c).strip() == _gold(a).strip()) for c, a in zip(completions, answer, strict=True)]


def grade_hash(prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> list[float]:
    """Return 1 if the number after the last `####` of the response equals that of the answer; else 0.

    Both numbers are read by `hash_number` and compared exactly. There is no tolerance, no factor of 100 for
    percentages, and no fallback to the last number of the text.

    Raises:
        UserError: if an answer has no such number, because every response would then be graded as wrong.
    """
    golds = [hash_number(_gold(gold)) for gold in answer]
    if None in golds:
        raise UserError(no_hash_number(_gold(answer[golds.index(None)])))
    return [float(hash_number(_text(c)) == gold) for c, gold in zip(completions, golds, strict=True)]


def _text(completion: Any) -> str:
    """Return the text of a completion, which may be a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


def _gold(answer: Any) -> str:
    return answer if isinstance(answer, str) else str(answer)


def hash_number(text: str) -> Decimal | None:
    """Return the number between the last `####` and the end of the line; None if this text is not exactly one number.

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
    """Return 1 if the content of the last `\\boxed{}` of the response is mathematically equal to the answer, else 0.

    The answer may be a solution with a `\\boxed{}` or the bare answer. If the texts differ, they are
    parsed as LaTeX and compared by math-verify. Text outside the box is ignored. The reward is None (not applicable) if
    the texts differ and math-verify cannot parse the reference answer.

    Raises:
        UserError: if math-verify is not installed.
    """
    return [_same_mathematics(last_boxed(_text(c)), _bare(_gold(a))) for c, a in zip(completions, answer, strict=True)]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, `\fbox{...}` or `\boxed x` of a text.

    The result is None if there is no box or its braces are not closed.
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
        escaped = character == "\\" and not escaped  # two backslashes are a line break, not an escape
    return None


def _bare(answer: str) -> str:
    """Return the content of the box in an answer, or the answer if there is no box."""
    boxed = last_boxed(answer)
    return answer if boxed is None else boxed


def _same_mathematics(response: str | None, gold: str) -> float | None:
    """Return the reward for the content of the box in a response, or None if it cannot be compared with `gold`."""
    if response is None or not response.strip():
        return 0.0
    # Percent signs are removed, so that 50 equals 50% but 0.5 does not. math-verify treats 0.5 and 50% as equal.
    response, gold = _without_percent(response), _without_percent(gold)
    if _normal_latex(response) == _normal_latex(gold):
        return 1.0
    parse, verify, latex = _math_verify()
    # The time limits of math-verify use signals. They are switched off, because worker processes have a time limit.
    # Text inside a formula is part of the answer: "(\text{A})" and "A" are the same choice.
    parsed_gold = parse(f"${gold}$", [latex], parsing_timeout=None)
    if not parsed_gold:
        return None
    parsed_response = parse(f"${response}$", [latex], parsing_timeout=None)
    return float(bool(parsed_response) and verify(parsed_gold, parsed_response, timeout_seconds=None))


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
    r"""Remove white space, \left, \right, dollar signs and final periods from LaTeX, and replace \dfrac and \tfrac."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;:! ]|[\s$]", "", text)
    return re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")


# A worker calls `prepare` before the first response, because importing sympy can take longer than
# the time limit of a response.
grade_boxed.prepare = _math_verify  # type: ignore[attr-defined]

GRADERS: dict[str, RewardFn] = {"exact": grade_exact, "hash": grade_hash, "boxed": grade_boxed}
QUICK = ("exact", "hash")
"""Names of graders that are fast and safe, so that they need no worker processes."""


def load_grader(spec: str) -> RewardFn:
    """Load a reward function by name: `exact`, `hash`, `boxed`, or `module:function`.

    Modules are looked up in the current directory first, as with `python -m`.

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
