"""The grader `boxed`: the content of the last `\\boxed{}` of a response against the reference answer."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Sequence
from typing import Any

from vineppo.tasks.grading.answers import Answer, read_answer
from vineppo.tasks.grading.comparison import same_answer
from vineppo.tasks.grading.notation import normal_notation
from vineppo.types import UserError

NO_MATH_VERIFY = "grader boxed needs math-verify; install it with pip install 'vineppo[math]'"
MAX_LENGTH = 1_000
"""Longer answers are compared as text only."""
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])")


def grade_boxed(
    prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""Return 1 if the content of the last `\boxed{}` of the response is mathematically equal to the answer, else 0.

    The answer may be a solution with a `\boxed{}` or the bare answer. Text outside the box is ignored. Usual notations
    are equal: fractions and decimals, intervals and inequalities, lists in any order, units and percent signs that one
    side leaves out. Numbers are compared exactly: 0.33 is not 1/3. An equation that is not solved, such as 3x+1=7 for
    x=2, is wrong, and so is a sum, an integral or a limit if the reference answer has none: both may repeat the
    problem. The reward is None (not applicable) if the texts differ and the reference answer cannot be read.

    Raises:
        UserError: if math-verify, which reads sums, integrals and limits, is needed and not installed.
    """
    return [
        _same_mathematics(last_boxed(text_of(c)), _bare(a if isinstance(a, str) else str(a)))
        for c, a in zip(completions, answer, strict=True)
    ]


def text_of(completion: Any) -> str:
    """Return the text of a completion, which may be a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)


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
    if not gold.strip():
        return None
    if response is None or not response.strip():
        return 0.0
    if response.strip() == gold.strip():
        return 1.0
    if max(len(response), len(gold)) > MAX_LENGTH:
        return 0.0
    golds = _readings(gold)
    if any(same_answer(one, other) for one, other in itertools.product(golds, _readings(response))):
        return 1.0
    if all(answer.kind != "unreadable" for answer in golds):
        return 0.0
    return _by_math_verify(response, gold) if golds[0].unknown_command else None


@functools.lru_cache(maxsize=4096)
def _readings(text: str) -> tuple[Answer, ...]:
    """Return the ways in which an answer can be read: `70,110` is one number, or a list of two."""
    text = normal_notation(text)
    if len(text) > 2 * MAX_LENGTH:
        return (Answer("unreadable", text),)
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return tuple(read_answer(reading) for reading in dict.fromkeys((joined, text)))


def _by_math_verify(response: str, gold: str) -> float | None:
    """Return the verdict of math-verify, for reference answers with sums, integrals and other commands.

    The result is None if the reference answer cannot be parsed, or if one of the two texts is long or has large
    numbers, factorials or nested powers, which may take too long.
    """
    if re.search(r"\d{4}|!|\^\S*\^", gold + " " + response) or max(len(gold), len(response)) > 200:
        return None
    parse, verify, latex = math_verify()
    # The time limits of math-verify use signals. They are switched off, because worker processes have a time limit.
    parsed_gold = parse(f"${gold}$", [latex], parsing_timeout=None)
    if not parsed_gold:
        return None
    parsed_response = parse(f"${response}$", [latex], parsing_timeout=None)
    return float(bool(parsed_response) and verify(parsed_gold, parsed_response, timeout_seconds=None))


@functools.cache
def math_verify() -> tuple[Any, Any, Any]:
    """Import math-verify and return its functions `parse` and `verify` and its configuration for LaTeX."""
    try:
        import math_verify
    except ModuleNotFoundError as error:
        raise UserError(NO_MATH_VERIFY) from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse, math_verify.verify, math_verify.LatexExtractionConfig()


# A worker calls `prepare` before the first response, because importing sympy can take longer than
# the time limit of a response.
grade_boxed.prepare = math_verify  # type: ignore[attr-defined]
