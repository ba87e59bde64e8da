"""Find the ends of sentences and lines in mathematical texts, for the splitter `math` (see `split_mathematics`).

Whether a text may be cut at a place depends only on the text before the place, because the text after it may not have
been sampled yet.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|cf|Fig|Eq|No|approx)|\be\.g|\bi\.e)\.$")
_MATH_MARK = re.compile(
    r"""\\(?:begin|end)\{\w+\*?\} | \$\$? | \\[()\[\]]  # the delimiters of formulas
    | \\[^\w\s]                                         # escaped characters, such as \$ and \,
    | [.!?][.!?"')\]]*                                  # the end of a sentence, with all marks that follow it
    | \n | [{}] | , | (?<=\s)and | (?<![<>=!:])=""",
    re.VERBOSE,
)
_CLOSERS = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]"}
"""The delimiter that closes each kind of formula, except environments."""
_LONG_STEP = 100
"""Number of characters of a step after which it is also cut inside sentences and lines."""


def mathematical_places(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places at which a text may be cut, as pairs (position, n) in ascending order.

    The text is cut at the character position if the step before it has more than n characters. The text is read once
    from left to right, in linear time.
    """
    closer, depth, line_start = "", 0, 0  # the delimiter that ends the formula, and the number of open braces
    for match in _MATH_MARK.finditer(text):
        mark, start = match.group(), match.start()
        if mark == "\n":
            if not text[line_start:start].strip():
                closer, depth = "", 0
            closer = "" if closer in ("$", r"\)") else closer
            line_start = start + 1
            yield line_start, 0
        elif mark in ("{", "}"):
            depth += 1 if mark == "{" else -1
        elif mark == "=":
            if depth <= 0:
                yield start + 1, _LONG_STEP
        elif mark == closer:
            closer = ""
        elif not closer and mark in _CLOSERS:
            closer = _CLOSERS[mark]
        elif not closer and mark.startswith(r"\begin{"):
            closer = mark.replace("begin", "end")
        elif not closer and mark[0] in ".!?,":
            yield from _punctuation_places(text, start, match.end())
        elif not closer and mark == "and":
            yield match.end(), _LONG_STEP


def _punctuation_places(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the place that belongs to the punctuation marks text[start:end], if there is one.

    After a digit or a single letter, marks count only before white space. The place is then after the white space,
    because the text before the white space does not show that it follows.
    """
    mark, before = text[start], text[max(0, start - 2) : start]
    doubtful = before[-1:].isdigit()
    if mark != ",":
        doubtful |= len(before) < 2 or (before[-1].isalnum() and not before.isalpha())
        if (doubtful and mark == "!") or _ABBREVIATION.search(text, max(0, start - 8), start + 1):
            return
    if not doubtful:
        yield start + 1, _LONG_STEP if mark == "," else 0
    elif text[end : end + 1].isspace():
        yield end + 1, _LONG_STEP if mark == "," else 0
