"""Where a response is cut into reasoning steps: boundaries in token indices, from the texts of the tokens.

A boundary b stands for the state prompt + response[:b], so a cut never passes through a token: the ids of a state are
exactly the ids that the policy sampled.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from vineppo.types import UserError

Splitter = Callable[[Sequence[str]], tuple[int, ...]]
"""Per-token texts of a response, shape (T,) -> the end of each step in tokens, shape (S,): strictly increasing, the
last one is T. Each token is decoded alone; special tokens have the text "". Raises ValueError where T is 0."""

_BLANK = re.compile(r"\s+")
_ANSWER_LINE = re.compile(r"\s*####")


def build_splitter(spec: str) -> Splitter:
    """The splitter that a setting names: `newline` (`split_at_newlines`) or `tokens:N` (`split_every`).

    Raises:
        UserError: for any other name, and for an N that is no whole number of at least 1.
    """
    if spec == "newline":
        return split_at_newlines
    name, _, count = spec.partition(":")
    if name == "tokens" and re.fullmatch("[0-9]{1,9}", count) and int(count) >= 1:
        return lambda tokens: split_every(int(count), tokens)
    raise UserError(
        f"no step splitter {spec!r}; allowed: newline, or tokens:N with a whole N of at least 1 (tokens:100)"
    )


def split_at_newlines(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""A step per line; the white space around a newline goes to the front of the next step.

    Blank lines are never steps of their own, a line that begins with `####` belongs to the step before it, and blank
    or empty tokens at the end (EOS) belong to the last step. A cut is snapped forward to the next token start: in
    ["x", ".\n", "\n", "y"] the token ".\n" stays with "x" and the lone newline leads "y". So a step keeps every
    character of its line, and a state ends in white space only where one token holds both. A line that lies wholly
    inside such a token has no step of its own.

    Returns:
        The end of each step, shape (S,). No step is blank unless the whole response is.
    """
    _refuse_empty(tokens)
    text = "".join(tokens)
    starts = list(accumulate(map(len, tokens), initial=0))  # (T + 1,), in characters
    text_end = len(text.rstrip())
    boundaries: list[int] = []
    step_start = 0  # in characters
    for blank in _BLANK.finditer(text):
        boundary = bisect_left(starts, blank.start())
        cut = starts[boundary]
        # The second test is for a cut that was snapped past a short line to the front of an answer line.
        is_answer = _ANSWER_LINE.match(text, blank.end()) or _ANSWER_LINE.match(text, cut)
        if "\n" not in blank.group() or is_answer or cut >= text_end or not text[step_start:cut].strip():
            continue
        boundaries.append(boundary)
        step_start = cut
    return (*boundaries, len(tokens))


def split_every(num_tokens: int, tokens: Sequence[str]) -> tuple[int, ...]:
    """A step every `num_tokens` tokens, whatever their text; the last one may be shorter. Returns ends, shape (S,)."""
    _refuse_empty(tokens)
    return (*range(num_tokens, len(tokens), num_tokens), len(tokens))


def merge_steps(boundaries: Sequence[int], max_states: int) -> tuple[int, ...]:
    """Merge neighbouring steps so that at most `max_states` remain (0: all stay).

    Of S steps the merged ones hold floor or ceil of S / max_states each, so the states that remain lie evenly along
    the response; s_0 and the end always remain, which keeps the step advantages telescoping.

    Args:
        boundaries: the end of each step in tokens, strictly increasing, shape (S,).
        max_states: number of states before a step that remain, s_0 included.
    Raises:
        ValueError: if there is no step, or `max_states` is negative.
    """
    num_steps = len(boundaries)
    if not num_steps or max_states < 0:
        raise ValueError(f"cannot merge {num_steps} steps into at most {max_states}")
    if max_states == 0 or num_steps <= max_states:
        return tuple(boundaries)
    return tuple(boundaries[(i + 1) * num_steps // max_states - 1] for i in range(max_states))


def _refuse_empty(tokens: Sequence[str]) -> None:
    if not tokens:
        raise ValueError("a response of 0 tokens has no steps")
