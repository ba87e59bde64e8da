"""Read conversations and tools from the cells of a table, and check their form.

The contents are passed to the chat template as they are in the table, with every key that a message has. In Parquet
files and tables of `datasets`, a key without value is the same as a missing key, so it is left out.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from vineppo.tasks.arrow import ArrowRow, without_nulls
from vineppo.tasks.cells import cell
from vineppo.tasks.rows import Row
from vineppo.types import UserError

TOOLS_COLUMN = "tools"
"""Column with the tools that the chat template describes in the prompt, as in TRL."""
_CONVERSATION = re.compile(r"\[?\s*\{.*\}[\s,]*\]?", re.DOTALL)
"""One mapping, or a list of mappings, in JSON or Python."""


def conversation_of(row: Row, column: str) -> list[Any] | None:
    """Return the cell of a prompt column as a list, or None if it is not a list, a tuple or an array of NumPy.

    Tables of pandas contain arrays in place of lists. In a row of an Arrow table, keys of messages without value are
    left out, apart from `content`.
    """
    value = _without_arrays(cell(row, column))
    if not isinstance(value, list | tuple):
        return None
    if not isinstance(row, ArrowRow):
        return list(value)
    return [_without_empty_keys(message) for message in value]


def _without_empty_keys(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    # Templates read `content` of every message, so a message without content keeps the key.
    return {key: without_nulls(value) for key, value in message.items() if value is not None or key == "content"}


def messages_of(where: str, column: str, value: list[Any]) -> tuple[Mapping[str, Any], ...]:
    """Check that a list in the prompt column is a conversation, and return its messages unchanged.

    Every message must be a mapping with the text `role`, and with `content`: text, or a list of text parts
    `{"type": "text", "text": ...}`. A message of the assistant needs no content if it has other keys, such as
    `tool_calls`, unless it is the last message, which the response continues.

    Args:
        where: location of the row for error messages.
        column: name of the column, for error messages.
    Raises:
        UserError: if the list is not a conversation.
    """
    place = f"{where}: column {column!r}"
    if not value or not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value):
        raise UserError(f"{place} is a list; allowed: text, or messages with role and content")
    for number, message in enumerate(value):
        _check_content(f"{place} message {number} (role {message['role']})", message)
    if value[-1]["role"] == "assistant" and value[-1].get("content") is None:
        raise UserError(
            f"{place} ends with a message of the assistant without content, which a response cannot continue; end it "
            "with a message of the user or of a tool"
        )
    return tuple(value)


def _check_content(place: str, message: Mapping[str, Any]) -> None:
    """Raise UserError if the content of a message is neither text nor a list of text parts.

    Args:
        place: location of the message for the error message.
    """
    content = message.get("content")
    if isinstance(content, str):
        return
    if content is None:
        others = [key for key, value in message.items() if key not in ("role", "content") and value]
        if message["role"] == "assistant" and others:
            return
        raise UserError(f"{place} has no content; allowed: text, a list of text parts, or tool_calls of the assistant")
    if not isinstance(content, list | tuple):
        raise UserError(f"{place} has content of type {type(content).__name__}; allowed: text, or a list of text parts")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f'{place} has a part of type {kind!r}; allowed: {{"type": "text", "text": ...}}, because the models '
                "that are trained read only text"
            )


def check_no_conversation(where: str, column: str, text: str) -> None:
    """Raise UserError if a prompt is a conversation that was written as text, in JSON or as Python prints it.

    pandas writes conversations to CSV files in this form. The model would read the text as code.

    Args:
        where: location of the row for error messages.
        column: name of the column, for error messages.
    """
    # Arrays of NumPy are printed without commas between the messages, which neither JSON nor Python can parse.
    if _CONVERSATION.fullmatch(text.strip()) and all(
        re.search(rf"""(["']){key}\1\s*:""", text) for key in ("role", "content")
    ):
        raise UserError(
            f"{where}: column {column!r} is a conversation that was written as text; store it as a list of messages, "
            "in JSON lines or Parquet"
        )


def tools_of(where: str, row: Row) -> tuple[Mapping[str, Any], ...]:
    """Return the tools in the column `tools` of a row, which is a list of JSON schemas or the JSON text of one.

    The result is empty if the row has no such column, or the cell is empty.

    Args:
        where: location of the row for error messages.
    Raises:
        UserError: if the cell contains anything else.
    """
    value = _without_arrays(row.get(TOOLS_COLUMN))
    if isinstance(row, ArrowRow):
        value = without_nulls(value)
    if isinstance(value, str):
        # Text that is not JSON remains text, which is reported below.
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value) if value.strip() else None
    if not value or value != value:  # pandas writes NaN in an empty cell
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(
            f"{where}: column {TOOLS_COLUMN!r} is passed to the chat template, so it must be a list of JSON schemas of "
            "tools, or the JSON text of such a list; rename the column if it is something else"
        )
    return tuple(value)


def _without_arrays(value: Any) -> Any:
    """Replace the arrays of NumPy in a value, at any depth, by lists."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(item) for item in value]
    return value
