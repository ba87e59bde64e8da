"""Show a response with its credit in a terminal: one block of lines per step, coloured by the advantages of the tokens.

What a model wrote is hostile: every character that could control the terminal is escaped, and nothing of it is read as
markup. Colours form a scale from orange (negative) over none to blue (positive), which people with the usual forms of
colour blindness can tell apart. Without colours, rows of `+` and `-` under the text take their place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from vineppo.view.explain import one_line, signed, why
from vineppo.view.queues import Entry, step_to_explain
from vineppo.view.response import Response, Step

NEGATIVE = ("#fdd0a2", "#fdae6b", "#f58231")
"""Backgrounds of negative advantages, from small to large."""
POSITIVE = ("#d0e1f2", "#94c4df", "#4a98c9")
"""Backgrounds of positive advantages, from small to large."""
FULL = 0.2
"""Scale of the colours of step advantages from values if all are smaller, because small changes of the value are mostly
noise."""
_NARROW = 64
"""Below this number of columns, the numbers of a step stand on a line of their own."""
_WITH_INTERVAL = 100
"""From this number of columns on, the interval of each value is shown beside it."""
_PROMPT_ROWS = 12
"""Largest number of rows of a prompt that are shown."""


@dataclass(frozen=True)
class _Character:
    """A printed character, or the escape of one that must not be printed."""

    text: str
    shade: int
    """From -3 to 3: how large the advantage of its token is, and its sign."""


def shade_of(advantage: float | None, scale: float) -> int:
    """Return the shade of an advantage: 0 up to 5% of the scale, then 1, 2 and 3 for each third of it, with its sign.

    Args:
        advantage: an advantage; None counts as 0.
        scale: largest absolute advantage of the response.
    """
    share = abs(advantage or 0.0) / scale if scale > 0 else 0.0
    if share <= 0.05:
        return 0
    size = 1 if share <= 1 / 3 else 2 if share <= 2 / 3 else 3
    return size if (advantage or 0.0) > 0 else -size


def show_response(console: Console, response: Response, *, label: str = "", step: Step | None = None) -> None:
    """Print a response with its credit, the subtraction behind one step, and the sum that leads to the reward.

    Args:
        console: the console, whose width and colours are used.
        label: name of the algorithm, or another title.
        step: the step to explain. None: see `queues.step_to_explain`.
    """
    width, colour = max(20, console.width), has_colour(console)
    chosen = step or step_to_explain(response)
    for line in _header(response, label, width):
        _print(console, line)
    largest = max((abs(token.advantage or 0.0) for token in response.tokens), default=0.0)
    scale = max(largest, FULL) if response.credit == "values" else largest
    for line in _steps(response, chosen, scale, width, colour):
        _print(console, line)
    _print(console, Text())
    for text in [_legend(response, largest, colour), *(why(response, chosen) if chosen else [])]:
        for row in _wrapped(text, width):
            _print(console, Text(row))


def show_entries(console: Console, entries: Sequence[Entry]) -> None:
    """Print one line per entry of a queue, with the beginning of the step or of the response."""
    for entry in entries:
        response, step = entry.response, entry.step
        place = f"{response.iteration} {response.number}" + (f" step {step.number}" if step else "")
        reward = "no reward" if response.reward is None else f"reward {response.reward:g}"
        line = f"{place:<16} {reward:<9} {entry.reason}  "
        text = one_line((step.text if step else response.text).strip())
        _print(console, Text(line + _cut(text, max(12, console.width - cell_len(line)))))


def has_colour(console: Console) -> bool:
    """Return whether a console shows colours: it is a terminal that has them, and NO_COLOR is not set."""
    return console.color_system is not None and not console.no_color


def _print(console: Console, line: Text) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _header(response: Response, label: str, width: int) -> Iterator[Text]:
    """Yield the lines above the steps: what the response is, its problem and its prompt."""
    reward = "no reward" if response.reward is None else f"reward {response.reward:g}"
    end = {"length": "cut off", "stop": "complete"}.get(response.finish_reason or "", "")
    parts = [
        one_line(label),
        f"iteration {response.iteration}, response {response.number}" if response.iteration else "",
        f"problem {one_line(response.problem_id)}" if response.problem_id else "",
        reward,
        end,
        "" if response.num_tokens is None else f"{response.num_tokens} tokens",
    ]
    for row in _wrapped(", ".join(part for part in parts if part), width):
        yield Text(row, style="bold")
    rows = [row for line in response.prompt.rstrip().split("\n") for row in _wrapped(one_line(line), width - 2)]
    for row in rows[:_PROMPT_ROWS]:
        yield Text(f"  {row}", style="dim")
    if len(rows) > _PROMPT_ROWS:
        yield Text(f"  ... ({len(rows) - _PROMPT_ROWS} more)", style="dim")
    if response.answer:
        yield Text(_cut(f"  answer: {one_line(response.answer)}", width), style="dim")
    yield Text()


def _steps(response: Response, chosen: Step | None, scale: float, width: int, colour: bool) -> Iterator[Text]:
    """Yield the lines of all steps."""
    has_values = any(step.value is not None for step in response.steps)
    digits = len(str(len(response.steps)))
    wide = has_values and width >= _WITH_INTERVAL and any(step.interval for step in response.steps)
    for step in response.steps:
        mark = ">" if chosen is not None and step.number == chosen.number else " "
        numbers = f"{mark}{step.number:>{digits}} {_numbers(step, has_values, wide)} "
        narrow = width < _NARROW
        if narrow:
            yield Text(numbers.rstrip(), style="bold" if mark == ">" else "")
        indent = 2 if narrow else len(numbers)
        characters = _characters(response, step, scale)
        rows = _rows(characters, max(10, width - indent))
        # If all tokens have the same sign, that of the step says everything.
        marked = not colour and len({(c.shade > 0) - (c.shade < 0) for c in characters if c.text != "\n"}) > 1
        for index, row in enumerate(rows):
            first = " " * indent if narrow or index else numbers
            line = Text().append(first, style="bold" if mark == ">" and not index else "")
            for shade, group in itertools.groupby(row, key=lambda character: character.shade):
                line.append("".join(c.text for c in group), style=_style(shade) if colour else "")
            yield line
            if marked and (marks := _marks(row)).strip():
                yield Text(" " * indent + marks)


def _numbers(step: Step, has_values: bool, wide: bool) -> str:
    """Return the columns with the value of the state before a step, its interval, and the advantage of the step."""
    value = f"{'' if step.value is None else f'{step.value:.2f}':>5} " if has_values else ""
    interval = ""
    if wide:
        bounds = "" if step.interval is None else f"[{step.interval.low:.2f}, {step.interval.high:.2f}]"
        interval = f"{bounds:<13}"
    return f"{value}{interval}{'' if step.advantage is None else signed(step.advantage):>6}"


def _characters(response: Response, step: Step, scale: float) -> list[_Character]:
    """Return the characters of a step. Line breaks stay; other control characters are escaped."""
    tokens = response.tokens[step.start : step.end]
    pairs = [(token.text, token.advantage) for token in tokens]
    if any(text is None for text, _ in pairs):
        # The advantage of the step may be larger than those of the tokens, so only its sign is shown.
        pairs = [(step.text, scale if (step.token_sum or 0.0) > 0 else -scale if step.token_sum else None)]
    characters = [
        _Character(c if c == "\n" else one_line(c), shade_of(advantage, scale))
        for text, advantage in pairs
        for c in text or ""
    ]
    while characters and characters[-1].text == "\n":
        characters.pop()
    return characters or [_Character("(no text)" if not step.text.strip("\n") else step.text, 0)]


def _rows(characters: Sequence[_Character], width: int) -> Iterator[list[_Character]]:
    """Yield the rows of a step, broken at line breaks and at the width in cells."""
    row: list[_Character] = []
    used = 0
    for character in characters:
        size = cell_len(character.text)
        if character.text == "\n" or (used + size > width and row):
            yield row
            row, used = [], 0
        if character.text != "\n":
            row.append(character)
            used += size
    yield row


def _marks(row: Sequence[_Character]) -> str:
    """Return the row of signs under a row of text."""
    return "".join(
        ("+" if character.shade > 0 else "-" if character.shade else " ") * cell_len(character.text)
        for character in row
    ).rstrip()


def _style(shade: int) -> str:
    if shade == 0:
        return ""
    return f"#000000 on {(POSITIVE if shade > 0 else NEGATIVE)[abs(shade) - 1]}"


def _legend(response: Response, scale: float, colour: bool) -> str:
    """Return a line that says what the numbers and the colours are."""
    has_values = any(step.value is not None for step in response.steps)
    columns = "value before the step, " if has_values else ""
    kind = {
        "values": "step advantage",
        "tokens": "sum of the token advantages of the step (no change of value)",
        "response": "advantage of the whole response, repeated",
        "none": "no credit",
    }[response.credit]
    if response.credit == "none" or scale == 0:
        return f"Columns: step, {columns}{kind}."
    if response.credit == "response":
        return f"Columns: step, {columns}{kind}." + (" Text: orange: negative, blue: positive." if colour else "")
    signs = "orange: negative, blue: positive" if colour else "+ and -: sign of the token's advantage"
    return f"Columns: step, {columns}{kind}. Text: {signs}, up to {scale:.2g} per token."


def _wrapped(text: str, width: int) -> list[str]:
    """Return the rows of a line, broken at spaces where possible, so that no row is wider than `width` cells."""
    rows, row = [], ""
    for word in text.split(" "):
        candidate = f"{row} {word}" if row else word
        while cell_len(candidate) > width:
            if row:
                rows.append(row)
                row, candidate = "", word
                continue
            head = _cut(candidate, width, end="")
            rows.append(head)
            candidate = candidate[len(head) :]
        row = candidate
    return [*rows, row]


def _cut(text: str, width: int, end: str = "...") -> str:
    """Return the beginning of a text that has at most `width` cells, with `end` if something was cut off."""
    if cell_len(text) <= width:
        return text
    kept, used = "", cell_len(end)
    for c in text:
        used += cell_len(c)
        if used > width and kept:
            break
        kept += c
    return kept + end
