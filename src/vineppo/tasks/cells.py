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
_EXACT_FLOATS = {"float16": 2**11, "float32": 2**24}
"""Name of a float type of NumPy -> its limit, as `exact_until` returns it."""
_NOT_A_NUMBER = ("nan", "<na>", "nat")


class InexactFloat(float):
    """A float of a table that is not exactly the number which the table contains.

    It is used as a float everywhere, also by reward functions; only reference answers are made from `text`.

    Args:
        value: the float.
        text: the number as the table has it, in the range of floats. Empty if the table itself may have lost digits.
    """

    text: str

    def __new__(cls, value: float, text: str = "") -> InexactFloat:
        """Create the number. Pickle calls this with `value` only, and restores `text` afterwards."""
        number = super().__new__(cls, value)
        number.text = text
        return number


def exact_until(kind: type) -> int:
    """Return the whole number from which on a float type does not distinguish neighbouring whole numbers."""
    return _EXACT_FLOATS.get(kind.__name__, 2**53)


def written_float(text: str) -> float:
    """Return a number of a JSON file as a float; as an `InexactFloat` if the float has fewer digits than the text.

    Raises:
        ValueError: if the number is outside the range of floats.
    """
    value = float(text)
    if math.isinf(value) or (not value and re.match(r"-?[0.]*[1-9]", text)):
        raise ValueError(f"the number {text} is outside the range of floats; write it as text")
    if not value or Decimal(text) == Decimal(repr(value)):
        return value
    return InexactFloat(value, text)


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
    """Return a finite number in decimal notation without exponent and trailing zeros: 72.0 is `72`, 1e-07 0.0000001.

    Fractions are written as such: 1/3.
    """
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Rational):
        return str(value)
    decimal = value if isinstance(value, Decimal) else Decimal(_shortest(value))
    text = format(decimal, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _shortest(value: Any) -> str:
    """Return the shortest decimal number that is read as this float; NumPy's float32 has fewer digits than a float."""
    if isinstance(value, InexactFloat) and value.text:
        return value.text
    return repr(value) if type(value) is float else str(value)


def _number_cell(where: str, column: str, value: Any) -> str:
    if not math.isfinite(value):
        raise UserError(
            f"{where}: column {column!r} is {value}, which stands for a missing value; every problem needs a reference "
            "answer"
        )
    lost = isinstance(value, InexactFloat) and not value.text
    if lost or (not isinstance(value, numbers.Rational | Decimal) and abs(value) >= exact_until(type(value))):
        raise UserError(
            f"{where}: column {column!r} is the float {float(value)!r}, whose last digits may be lost; store such "
            "answers as text or whole numbers"
        )
    return number_text(value)


def has_floats_of_pandas(values: Sequence[Any]) -> bool:
    """Return whether the cells of a CSV column that are not blank are written as pandas writes a column of floats.

    This is so if all are whole numbers like 72.0, which pandas writes if a cell is missing, or if some have an exponent
    and all others are floats as Python writes them. Decimals such as 0.50 and 72.0 in one column may be meant as they
    are written.
    """
    texts = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    whole = [re.fullmatch(r"-?\d+\.0", text) is not None for text in texts]
    if not any("e" in text for text in texts):
        return bool(texts) and all(whole)
    return all(map(_is_python_float, texts))


def _is_python_float(text: str) -> bool:
    """Return whether a text is a finite float as Python writes it."""
    return re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", text) is not None and repr(float(text)) == text


def float_of_pandas(where: str, column: str, text: str, *, exact: bool) -> str:
    """Return a float of a CSV file in decimal notation: `72.0` is 72, `-0.0` 0, `1e-05` 0.00001.

    Blank text becomes empty text.

    Args:
        exact: whether to refuse a float with an exponent that is so large that its last digits may be lost.
    Raises:
        UserError: if such a float is refused.
    """
    text = text.strip()
    if "e" in text and exact:
        return _number_cell(where, column, float(text))
    return number_text(Decimal(text)) if text else ""


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
