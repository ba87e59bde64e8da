"""Answers to problems in mathematics: numbers with units, lists, sets, points, intervals, relations, matrices, words.

`read_answer` reads the structure of an answer; `comparison.same_answer` compares two answers.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from vineppo.tasks.grading.formulas import Malformed, Node, UnknownCommand, parse
from vineppo.tasks.grading.units import split_unit

RELATIONS = {r"\le": "<=", r"\ge": ">=", r"\ne": "!=", "<": "<", ">": ">", "=": "=", r"\approx": "="}
FLIPPED = {"<=": ">=", ">=": "<=", "<": ">", ">": "<", "=": "=", "!=": "!="}
_RELATION = re.compile(r"\\(?:le|ge|ne|approx)(?![A-Za-z])|[<>=]")
_SEPARATOR = re.compile(r"[,;]?\s*(?:\\text\{\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))|[,;]")
_BRACKET = re.compile(r"\\begin|\\end|\\[{}]|[()\[\]{}]")
_OPENING = (r"\begin", r"\{", "(", "[", "{")
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\s*\{([pbB]?matrix|array)\}\s*(?:\{[lcr| ]*\})?(.*)\\end\s*\{\1\}\s*[\])]?", re.DOTALL
)
_BUILDER = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*\\reals\s*)?[|:]\s*(.*)\\\}", re.DOTALL)
_OTHER_BASE = re.compile(r"([0-9A-Z]*[0-9][0-9A-Z]*)\s*_\s*\{?\s*(\d+)\s*\}?")
_MEMBER = re.compile(r"(?:[A-Za-z]|\\theta)\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)
_WORD = re.compile(r"\\text\{|[A-Za-z]{4,}|(?<![A-Za-z])(?:yes|no|odd)(?![A-Za-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Answer:
    r"""An answer, or a part of one.

    Kinds: `scalar` (a formula with a unit), `list` (parts in any order), `set`, `row` (parts in order, between
    brackets), `ratio`, `matrix` (rows of scalars), `relation` (parts joined by operators), `or`, `and` (relations),
    `union`, `without` (a set without another), `reals`, `words`, and `unreadable`.
    """

    kind: str
    text: str
    parts: tuple[Answer, ...] = ()
    node: Node = ()
    unit: str = ""
    signs: tuple[str, ...] = ()
    """Operators of a relation; the two brackets of a row."""
    unknown_command: bool = False


def read_answer(text: str) -> Answer:
    """Return the structure of an answer in normal notation. Never raises; the kind may be `unreadable`."""
    text = text.strip()
    if match := _MEMBER.fullmatch(text):
        return read_answer(match[1])
    pieces = _split(text, _SEPARATOR)
    texts = [piece for piece in pieces[::2] if piece.strip()]
    if len(texts) > 1:
        items = tuple(_read_item(piece) for piece in texts)
        relations = all(item.kind == "relation" and item.signs != ("=",) for item in items)
        words = [re.sub(r"[^a-z]|text", "", separator) for separator in pieces[1::2]]
        if relations and words[0] in ("or", "and") and len(set(words)) == 1:
            return Answer(words[0], text, items)
        return Answer("list", text, tuple(_flat(items)))
    return _read_item(texts[0] if texts else text)


def _flat(items: Sequence[Answer]) -> Iterator[Answer]:
    """Yield the items, and the two values of an item with a plus-minus sign."""
    for item in items:
        yield from item.parts if item.kind == "list" else (item,)


def _read_item(text: str) -> Answer:
    text = text.strip()
    if text == r"\reals":
        return Answer("reals", text)
    if text == r"\emptyset":
        return Answer("set", text)
    if match := _BUILDER.fullmatch(text):
        return read_answer(match[2])
    for command, kind in ((r"\\cup", "union"), (r"\\setminus", "without")):
        pieces = _split(text, re.compile(command + r"(?![A-Za-z])"))[::2]
        if len(pieces) > 1:
            return Answer(kind, text, tuple(read_answer(piece) for piece in pieces))
    pieces = _split(re.sub(r"^\\approx(?![A-Za-z])", "", text), _RELATION)
    if len(pieces) > 1:
        return _read_relation(text, pieces)
    if re.search(r"\\[pm][pm](?![A-Za-z])", text) and not text.startswith(r"\{"):
        signs = ((r"\pm", "+"), (r"\mp", "-")), ((r"\pm", "-"), (r"\mp", "+"))
        variants = [functools.reduce(lambda t, s: t.replace(*s), pair, text) for pair in signs]
        return Answer("list", text, tuple(_read_item(variant) for variant in variants))
    return _read_brackets(pieces[0]) or _read_scalar(pieces[0])


def _read_relation(text: str, pieces: list[str]) -> Answer:
    if re.search(r"\\pm(?![A-Za-z])", text):
        variants = (text.replace(r"\pm", sign) for sign in "+-")
        return Answer("list", text, tuple(_read_item(variant) for variant in variants))
    if not all(piece.strip() for piece in pieces[::2]):
        return Answer("unreadable", text)
    return Answer(
        "relation", text, tuple(_read_item(p) for p in pieces[::2]), signs=tuple(RELATIONS[p] for p in pieces[1::2])
    )


def _read_brackets(text: str) -> Answer | None:
    """Return a matrix, a set, a point, an interval or a ratio; None if the text is something else."""
    if match := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\", match[2]) if row.strip()]
        cells = [Answer("row", row, tuple(_read_item(cell) for cell in row.split("&"))) for row in rows]
        return Answer("matrix", text, tuple(cells))
    if text.startswith(r"\{") and text.endswith(r"\}") and _closes_at_end(text):
        inside = text[2:-2].strip()
        if not inside:
            return Answer("set", text)
        answer = read_answer(inside)
        return Answer("set", text, answer.parts if answer.kind == "list" else (answer,))
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and _closes_at_end(text):
        texts = _split(text[1:-1], re.compile("[,;]"))[::2]
        if len(texts) > 1:
            return Answer("row", text, tuple(_read_item(t) for t in texts), signs=(text[0], text[-1]))
    texts = _split(text, re.compile(":"))[::2]
    if len(texts) > 1 and not _WORD.search(text):
        return Answer("ratio", text, tuple(_read_item(t) for t in texts))
    return None


def _read_scalar(text: str) -> Answer:
    if match := _OTHER_BASE.fullmatch(text.strip()):
        return Answer("scalar", text, node=("opaque", match[1], ("number", Fraction(match[2]))))
    number, unit = split_unit(text)
    unknown = False
    if not _WORD.search(re.sub(r"\\(?!text)[A-Za-z]+", " ", number)):
        try:
            return Answer("scalar", text, node=parse(number), unit=unit)
        except UnknownCommand:
            unknown = True
        except Malformed:
            pass
    kind = "words" if _WORD.search(re.sub(r"\\(?!text)[A-Za-z]+", " ", text)) else "unreadable"
    return Answer(kind, text, unknown_command=unknown)


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split a text at separators outside brackets. The separators are the items with odd indices."""
    pieces, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if bracket := _BRACKET.match(text, position):
            depth += 1 if bracket[0] in _OPENING else -1
            position = bracket.end()
        elif depth == 0 and (match := separator.match(text, position)):
            pieces += [text[start:position], match[0]]
            start = position = match.end()
        else:
            position += 1
    return [*pieces, text[start:]]


def _closes_at_end(text: str) -> bool:
    """Return whether the first bracket of a text is closed by its last one."""
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += 1 if match[0] in _OPENING else -1
        if depth == 0:
            return match.end() == len(text)
    return False
