"""Cells of a table: find a column, also inside a column, and read text and numbers without changing them."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from vineppo.types import UserError

MISSING = object()
"""The value of a column that a row does not have."""
_EXACT_FLOATS = 2**53
"""From here on, floats do not distinguish neighbouring whole numbers."""
_NOT_A_NUMBER = ("nan", "<na>", "nat")


def cell(row: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, or MISSING.

    `reward_model.ground_truth` is the column of this name, or else the entry `ground_truth` in the column
    `reward_model`.
    """
    if column in row:
        return row[column]
    for end in (match.start() for match in re.finditer(r"\.", column)):
        inner = row.get(column[:end])
        if isinstance(inner, Mapping) and (value := cell(inner, column[end + 1 :])) is not MISSING:
            return value
    return MISSING


def check_unicode(place: str, text: str) -> None:
    """Raise UserError if a text has unpaired surrogates. JSON escapes can contain them; tokenizers cannot encode them.

    Args:
        place: location of the text for the error message.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{place} contains an unpaired surrogate; it must be valid Unicode text")


def text_cell(where: str, row: Mapping[str, Any], setting: str, column: str) -> str:
    """Return the value of the prompt, answer or demonstration column of a row as text.

    Raises:
        UserError: if the column is missing or its value is not text; answers may be numbers.
    """
    value = cell(row, column)
    if value is MISSING:
        raise UserError(_no_column(where, row, setting, column))
    if isinstance(value, str):
        check_unicode(f"{where}: column {column!r}", value)
        return value
    # If a prompt is a number, the setting almost certainly names a wrong column.
    if setting == "answer_column" and is_number(value):
        return _number_cell(where, column, value)
    kind = "null" if value is None else f"a {type(value).__name__}"
    allowed = "text or a number" if setting == "answer_column" else "text"
    raise UserError(f"{where}: column {column!r} is {kind}; it must be {allowed} (task.{setting} names the column)")


def answer_cell(where: str, row: Mapping[str, Any], column: str, may_be_blank: bool = False) -> str:
    """Return the reference answer of a row as text. A number becomes its usual decimal notation: 72.0 is `72`.

    Raises:
        UserError: if there is no answer; every response would be wrong, or an empty response right.
    """
    text = text_cell(where, row, "answer_column", column)
    if not may_be_blank and is_blank(text):
        shown = f"{text.strip()!r}, which stands for a missing value" if text.strip() else "blank"
        raise UserError(
            f"{where}: column {column!r} is {shown}; every problem needs a reference answer (or reward functions of "
            "your own that need none: task.rewards module:function)"
        )
    return text


def is_number(value: Any) -> bool:
    """Return whether a value is a number, but not true or false. Numbers of NumPy and decimals are included."""
    is_bool = isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
    return isinstance(value, numbers.Real | Decimal) and not is_bool


def is_blank(value: Any) -> bool:
    """Return whether a value stands for a missing answer: None, NaN, text without characters, or `nan`."""
    if isinstance(value, str):
        return not value.strip() or value.strip().lower() in _NOT_A_NUMBER
    return value is None or (is_number(value) and not math.isfinite(value))


def number_text(value: Any) -> str:
    """Return a finite number in decimal notation without exponent and trailing zeros: 72.0 is `72`, 1e-07 0.0000001."""
    if isinstance(value, numbers.Integral):
        return str(int(value))
    decimal = value if isinstance(value, Decimal) else Decimal(_shortest(value))
    text = format(decimal, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _shortest(value: Any) -> str:
    """Return the shortest decimal number that is read as this float; NumPy's float32 has fewer digits than a float."""
    return repr(value) if type(value) is float else str(value)


def _number_cell(where: str, column: str, value: Any) -> str:
    if not math.isfinite(value):
        raise UserError(
            f"{where}: column {column!r} is {value}, which stands for a missing value; every problem needs a reference "
            "answer"
        )
    if not isinstance(value, numbers.Integral | Decimal) and abs(value) >= _EXACT_FLOATS:
        raise UserError(
            f"{where}: column {column!r} is the float {value!r}, whose last digits may be lost; store such answers as "
            "text or whole numbers"
        )
    return number_text(value)


def whole_number_texts(values: Sequence[Any]) -> bool:
    """Return whether all cells of a CSV column that are not blank are written like floats of pandas: 72.0.

    pandas writes a column of whole numbers in this form if a cell is missing.
    """
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    return bool(texts) and all(re.fullmatch(r"\s*-?\d+\.0\s*", text) for text in texts)


def _no_column(where: str, row: Mapping[str, Any], setting: str, column: str) -> str:
    known = {name.strip().lower(): name for name in row}
    near = known.get(column.strip().lower()) or next(iter(difflib.get_close_matches(column, row, n=1)), None)
    head = column.partition(".")[0]
    inside = row.get(head) if head != column else None
    if isinstance(inside, Mapping):
        hint = f"{head!r} has: {', '.join(map(str, inside)) or 'nothing'}; "
    else:
        hint = f"did you mean {near!r}? " if near else ""
    return f"{where} has no column {column!r} (it has: {', '.join(row) or 'none'}); {hint}set task.{setting}"
