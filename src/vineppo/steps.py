"""Splitters: they cut a response into reasoning steps and return the end of each step as a token index.

A boundary b stands for the state prompt + response[:b]. Cuts are between tokens, so the ids of a state are exactly the
ids that the policy sampled.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, Protocol

from vineppo.objects import first_line, load_object
from vineppo.types import Rollout, UserError

_BLANK = re.compile(r"\s+")
_ANSWER_LINE = re.compile(r"\s*####")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[A-Z\d$\\(])")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|cf|Fig|Eq|No|approx)|\be\.g|\bi\.e)\.$")
_FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$]+?\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
_SPLIT_POINT = re.compile(r",(?=\s)|(?<!\s)\s+(?=and\s|=)|(?<![\s<>=!:])(?==)")
_MAX_PIECE = 100
"""Longer pieces, in characters, are bisected by `split_mathematics`."""
_CUTPOINT_EVERY, _CUTPOINT_BELOW = 5, 0.9
_NAMES = ("newline", "math", "tokens", "cutpoints", "regex")
_SPECS = "newline, math, tokens:N, cutpoints, cutpoints:N:P, regex:PATTERN or module:function"


class Splitter(Protocol):
    """Cuts a response into steps."""

    def __call__(self, tokens: Sequence[str], logprobs: Sequence[float] = ()) -> tuple[int, ...]:
        """The end of each step in tokens, shape (S,): strictly increasing, the last one is T.

        Args:
            tokens: text of each token, decoded alone, shape (T,); special tokens have the text "".
            logprobs: of each token under the distribution that it was sampled from, shape (T,).
        Raises:
            ValueError: if T is 0.
        """
        ...


def build_splitter(spec: str) -> Splitter:
    """Build the splitter that a setting names.

    The names are `newline` (`split_at_newlines`), `math` (`split_mathematics`), `tokens:N` (`split_every`), `cutpoints`
    or `cutpoints:N:P` (`split_at_cutpoints`), `regex:PATTERN` (`split_at_matches`), and `module:function` for a
    user-defined function `cut(tokens, logprobs=()) -> ends` (see `Splitter`) or `cut(tokens) -> ends`, whose result is
    checked at every call.

    Whether a user-defined function ends a step at b must depend on tokens[:b] and logprobs[:b] only. If it depends on
    later tokens, the credit is biased.

    Raises:
        UserError: if the name is unknown, a number is out of range, the pattern is not a regular expression, or the
            function cannot be loaded. The splitter itself raises it if the function fails or returns invalid ends.
    """
    name, colon, rest = spec.partition(":")
    if spec == "newline":
        return lambda tokens, logprobs=(): split_at_newlines(tokens)
    if spec == "math":
        return lambda tokens, logprobs=(): split_mathematics(tokens)
    if name == "tokens" and re.fullmatch("[0-9]{1,9}", rest) and int(rest) >= 1:
        return lambda tokens, logprobs=(): split_every(int(rest), tokens)
    if name == "cutpoints" and not colon:
        return lambda tokens, logprobs=(): split_at_cutpoints(_CUTPOINT_EVERY, _CUTPOINT_BELOW, tokens, logprobs)
    numbers = re.fullmatch(r"([0-9]{1,9}):(0?\.[0-9]+|1(?:\.0*)?)", rest) if name == "cutpoints" else None
    if numbers and int(numbers[1]) >= 1 and float(numbers[2]) > 0:
        every, below = int(numbers[1]), float(numbers[2])
        return lambda tokens, logprobs=(): split_at_cutpoints(every, below, tokens, logprobs)
    if name == "regex" and rest:
        try:
            pattern = re.compile(rest, re.MULTILINE)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"splitter {spec!r}: {rest!r} is not a valid regular expression ({error})") from error
        return lambda tokens, logprobs=(): split_at_matches(pattern, tokens)
    if name not in _NAMES and name and rest:
        return _load_splitter(spec)
    raise UserError(
        f"unknown splitter {spec!r}; allowed: {_SPECS}, with an integer N of at least 1 (tokens:100) and a probability "
        "P above 0 and at most 1 (cutpoints:5:0.9)"
    )


def _load_splitter(spec: str) -> Splitter:
    """A user-defined splitter whose results are checked."""
    function = load_object(spec, "splitter")
    if not callable(function):
        raise UserError(f"splitter {spec!r} is a {type(function).__name__}; it must be a function")
    call = _as_splitter(spec, function)

    def split(tokens: Sequence[str], logprobs: Sequence[float] = ()) -> tuple[int, ...]:
        _refuse_empty(tokens)
        try:
            returned = call(list(tokens), list(logprobs))
            # At most T + 1 ends are read, because a generator may be infinite.
            ends = list(islice(returned, len(tokens) + 1)) if isinstance(returned, Iterable) else returned
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"splitter {spec!r} failed: {first_line(error)}; it is called as cut(tokens, logprobs=()) with the "
                "text and the log-probability of each token and must return the end of each step"
            ) from error
        return _checked_ends(spec, ends, len(tokens))

    return split


def _as_splitter(spec: str, function: Callable[..., Any]) -> Callable[[list[str], list[float]], Any]:
    """A function of (tokens, logprobs) that calls `function` with the arguments that its signature accepts."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return lambda tokens, logprobs: function(tokens)

    def accepts(*arguments: Any, **named: Any) -> bool:
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            return False
        return True

    if accepts([], logprobs=[]):
        return lambda tokens, logprobs: function(tokens, logprobs=logprobs)
    if accepts([]):
        return lambda tokens, logprobs: function(tokens)
    if accepts([], []):
        return function
    raise UserError(f"splitter {spec!r} has the parameters {signature}; allowed: (tokens, logprobs=()) or (tokens)")


def _checked_ends(spec: str, ends: Any, num_tokens: int) -> tuple[int, ...]:
    """The ends that a user-defined splitter returned, as integers.

    Raises:
        UserError: if they are not strictly increasing integers from 1 to `num_tokens`, the last one `num_tokens`.
    """
    try:
        if any(isinstance(end, bool) for end in ends):
            raise TypeError
        integers = tuple(operator.index(end) for end in ends)
    except TypeError:
        integers = ()
    if not integers or integers[0] < 1 or integers[-1] != num_tokens or any(a >= b for a, b in pairwise(integers)):
        raise UserError(
            f"splitter {spec!r} returned {_shortened(ends)} for a response of {num_tokens} tokens; it must return the "
            f"end of each step as integers from 1 to {num_tokens}, strictly increasing, the last one {num_tokens}"
        )
    return integers


def _shortened(ends: Any) -> str:
    """The ends as text on one line; of a long list only the first five and the last one."""
    shown = reprlib.repr(ends)
    if isinstance(ends, list):
        items = [reprlib.repr(end) for end in ends]
        shown = f"[{', '.join(items if len(items) <= 8 else [*items[:5], '...', items[-1]])}]"
    return " ".join(shown.split())


def split_at_newlines(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""Make each line a step. The white space around a newline belongs to the next step.

    Blank lines are not steps, a line that begins with `####` belongs to the previous step, and blank or empty tokens at
    the end (EOS) belong to the last step. A cut inside a token is moved to the end of that token: in
    ["x", ".\n", "\n", "y"] the token ".\n" stays with "x", and the single newline belongs to the step of "y". So a step
    contains every character of its line, and a state ends in white space only if one token contains text and white
    space. A line that lies entirely inside one token is not a separate step.

    Returns:
        The end of each step, shape (S,). No step is blank unless the whole response is.
    """
    text = "".join(tokens)
    return _cut(tokens, text, _newlines(text), answer_lines=False)


def split_mathematics(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""Make each sentence and each line of a mathematical text a step, as the VinePPO paper does for MATH.

    A sentence does not end inside a formula (`$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin..\end`), but the lines of an
    `align` are steps. A piece of more than 100 characters is bisected repeatedly near its middle: after a comma or
    before an "and" outside formulas, or before an equals sign outside braces. An unclosed formula counts as ordinary
    text. White space, cuts inside tokens, `####` lines and EOS are handled as in `split_at_newlines`.
    """
    text = "".join(tokens)
    formulas = [match.span() for match in _FORMULA.finditer(text)]
    cuts = sorted({*_newlines(text), *_sentence_ends(text, formulas)})
    split_points = _split_points(text, formulas)
    edges = [0, *cuts, len(text)]
    for start, end in pairwise(edges):
        cuts += _bisections(start, end, split_points)
    return _cut(tokens, text, sorted(cuts), answer_lines=False)


def split_at_matches(pattern: re.Pattern[str], tokens: Sequence[str]) -> tuple[int, ...]:
    """End a step after every match of a regular expression; white space after the match belongs to the next step.

    Cuts inside tokens, blank steps and EOS are handled as in `split_at_newlines`. `^` and `$` match at each line.
    """
    text = "".join(tokens)
    return _cut(tokens, text, [match.end() for match in pattern.finditer(text)], answer_lines=True)


def split_at_cutpoints(every: int, below: float, tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[int, ...]:
    """End a step after every N-th token that was sampled with a probability below P, as in SPO.

    These are the places where the policy was uncertain. Whether a step ends depends only on the tokens before its end,
    so these cuts leave the credit unbiased. No step is blank.

    Args:
        every: N, number of uncertain tokens per step.
        below: P, probability below which a token is uncertain.
    """
    _refuse_empty(tokens)
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(logprobs)} log-probabilities")
    last = max((i for i, token in enumerate(tokens) if token.strip()), default=0)
    boundaries: list[int] = []
    uncertain, blank = 0, True
    for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        uncertain += logprob < math.log(below)
        blank &= not token.strip()
        if uncertain >= every and not blank and i < last:
            boundaries.append(i + 1)
            uncertain, blank = 0, True
    return (*boundaries, len(tokens))


def _cut(tokens: Sequence[str], text: str, cuts: Iterable[int], *, answer_lines: bool) -> tuple[int, ...]:
    """Ends of steps in tokens from ascending cuts in characters.

    A cut inside a token is moved to the end of the token, a cut that would leave a blank step is dropped, and EOS
    belongs to the last step.

    Args:
        answer_lines: whether a step may begin with `####`.
    """
    _refuse_empty(tokens)
    starts = list(accumulate(map(len, tokens), initial=0))  # (T + 1,), in characters
    text_end = len(text.rstrip())
    boundaries: list[int] = []
    step_start = 0  # in characters
    for position in cuts:
        boundary = bisect_left(starts, position)
        cut = starts[boundary]
        if cut >= text_end or not text[step_start:cut].strip():
            continue
        # Checked again here: moving the cut forward may have placed it at the start of an answer line.
        if not answer_lines and _ANSWER_LINE.match(text, cut):
            continue
        boundaries.append(boundary)
        step_start = cut
    return (*boundaries, len(tokens))


def _newlines(text: str) -> list[int]:
    """Start of the white space around each newline, except for newlines before an answer line."""
    return [
        blank.start()
        for blank in _BLANK.finditer(text)
        if "\n" in blank.group() and not _ANSWER_LINE.match(text, blank.end())
    ]


def _sentence_ends(text: str, formulas: Sequence[tuple[int, int]]) -> list[int]:
    """Positions after the punctuation marks that end sentences outside formulas."""
    return [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not _inside(match.start(), formulas)
        and not _ABBREVIATION.search(text, max(0, match.start() - 8), match.end())
    ]


def _split_points(text: str, formulas: Sequence[tuple[int, int]]) -> list[int]:
    """Positions where a long piece may be bisected."""
    depths = list(accumulate((character == "{") - (character == "}") for character in text))
    positions = []
    for match in _SPLIT_POINT.finditer(text):
        position = match.end() if match.group() == "," else match.start()
        equals = text.startswith("=", match.end())
        if (equals and depths[match.start() - 1 if match.start() else 0] <= 0) or (
            not equals and not _inside(match.start(), formulas)
        ):
            positions.append(position)
    return positions


def _bisections(start: int, end: int, split_points: Sequence[int]) -> list[int]:
    """Cuts that bisect the piece [start, end) until no part is too long or has a split point."""
    if end - start <= _MAX_PIECE:
        return []
    inside = split_points[bisect_left(split_points, start + 1) : bisect_left(split_points, end)]
    if not inside:
        return []
    middle = min(inside, key=lambda point: abs(2 * point - start - end))
    return [*_bisections(start, middle, split_points), middle, *_bisections(middle, end, split_points)]


def _inside(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a character is in one of the spans, which are ascending and disjoint."""
    index = bisect_left(spans, (position + 1, 0)) - 1
    return index >= 0 and position < spans[index][1]


def split_every(num_tokens: int, tokens: Sequence[str]) -> tuple[int, ...]:
    """End a step after every `num_tokens` tokens; blank pieces are merged into the next step.

    A cut depends only on the tokens before it, which keeps the credit unbiased. Therefore the last step may be shorter,
    and may contain only white space or the end-of-sequence token.

    Returns:
        The end of each step, shape (S,).
    """
    _refuse_empty(tokens)
    ends, start = [], 0
    for end in range(num_tokens, len(tokens), num_tokens):
        if any(token.strip() for token in tokens[start:end]):
            ends.append(end)
            start = end
    return (*ends, len(tokens))


def merge_steps(boundaries: Sequence[int], max_states: int) -> tuple[int, ...]:
    """Merge neighbouring steps so that at most `max_states` remain (0: no limit).

    Each merged step contains floor or ceil of S / max_states of the S steps, so the remaining states are spread evenly
    over the response. s_0 and the end always remain, so the step advantages still telescope.

    Args:
        boundaries: the end of each step in tokens, strictly increasing, shape (S,).
        max_states: maximum number of remaining steps, which is the number of states before a step, s_0 included.
    Raises:
        ValueError: if there is no step, or `max_states` is negative.
    """
    num_steps = len(boundaries)
    if not num_steps or max_states < 0:
        raise ValueError(f"cannot merge {num_steps} steps into at most {max_states}")
    if max_states == 0 or num_steps <= max_states:
        return tuple(boundaries)
    return tuple(boundaries[(i + 1) * num_steps // max_states - 1] for i in range(max_states))


def step_ends(
    rollout: Rollout, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> tuple[int, ...]:
    """The end of each step of a rollout in response tokens, at most `max_states` (0: no limit), shape (S,)."""
    return merge_steps(splitter(token_texts(rollout.response_ids), rollout.sampler_logprobs), max_states)


def _refuse_empty(tokens: Sequence[str]) -> None:
    if not tokens:
        raise ValueError("a response of 0 tokens has no steps")
