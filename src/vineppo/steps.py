"""Where a response is cut into reasoning steps: boundaries in token indices, from the texts of the tokens.

A boundary b stands for the state prompt + response[:b], so a cut never passes through a token: the ids of a state are
exactly the ids that the policy sampled.
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
_BREAK = re.compile(r",(?=\s)|(?<!\s)\s+(?=and\s|=)|(?<![\s<>=!:])(?==)")
_LONGEST = 100
"""Characters of a piece that is not bisected."""
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
            ValueError: where T is 0.
        """
        ...


def build_splitter(spec: str) -> Splitter:
    """The splitter that a setting names.

    `newline` (`split_at_newlines`), `math` (`split_mathematics`), `tokens:N` (`split_every`), `cutpoints`, or with
    other than the usual numbers `cutpoints:N:P` (`split_at_cutpoints`), `regex:PATTERN` (`split_at_matches`), or
    `module:function` for a function of the user's, `cut(tokens, logprobs=()) -> ends` as `Splitter` says, or
    `cut(tokens) -> ends`. What it returns is checked at every call.

    A function must decide each cut by the tokens before the step's end: whether a step ends at b may depend on
    tokens[:b] and logprobs[:b] only. Where a cut depends on later tokens, the credit is biased.

    Raises:
        UserError: for any other name, numbers out of range, a pattern that is no regular expression, and a function
            that cannot be loaded. The splitter raises it where the function fails or returns other than such ends.
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
    found = re.fullmatch(r"([0-9]{1,9}):(0?\.[0-9]+|1(?:\.0*)?)", rest) if name == "cutpoints" else None
    if found and int(found[1]) >= 1 and float(found[2]) > 0:
        every, below = int(found[1]), float(found[2])
        return lambda tokens, logprobs=(): split_at_cutpoints(every, below, tokens, logprobs)
    if name == "regex" and rest:
        try:
            pattern = re.compile(rest, re.MULTILINE)
        except (re.error, OverflowError, RecursionError) as error:
            raise UserError(f"no step splitter {spec!r}: {rest!r} is no regular expression ({error})") from error
        return lambda tokens, logprobs=(): split_at_matches(pattern, tokens)
    if name not in _NAMES and name and rest:
        return _users_splitter(spec)
    raise UserError(
        f"no step splitter {spec!r}; allowed: {_SPECS}, with a whole N of at least 1 (tokens:100) and a probability P "
        "above 0, at most 1 (cutpoints:5:0.9)"
    )


def _users_splitter(spec: str) -> Splitter:
    """A function of the user's with its ends checked."""
    function = load_object(spec, "splitter")
    if not callable(function):
        raise UserError(f"splitter {spec!r} is a {type(function).__name__}; it must be a function")
    call = _as_splitter(spec, function)

    def split(tokens: Sequence[str], logprobs: Sequence[float] = ()) -> tuple[int, ...]:
        _refuse_empty(tokens)
        try:
            returned = call(list(tokens), list(logprobs))
            # No more than T + 1 of them: a generator may be endless.
            ends = list(islice(returned, len(tokens) + 1)) if isinstance(returned, Iterable) else returned
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"splitter {spec!r} failed: {first_line(error)}; it is called as cut(tokens, logprobs=()) with the "
                "text and the log-probability of each token and returns the end of each step"
            ) from error
        return _checked_ends(spec, ends, len(tokens))

    return split


def _as_splitter(spec: str, function: Callable[..., Any]) -> Callable[[list[str], list[float]], Any]:
    """The function as one of tokens and log-probabilities, which it need not take."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have none
        return lambda tokens, logprobs: function(tokens)

    def takes(*arguments: Any, **named: Any) -> bool:
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            return False
        return True

    if takes([], logprobs=[]):
        return lambda tokens, logprobs: function(tokens, logprobs=logprobs)
    if takes([]):
        return lambda tokens, logprobs: function(tokens)
    if takes([], []):
        return function
    raise UserError(f"splitter {spec!r} takes {signature}; it must take (tokens, logprobs=()) or (tokens)")


def _checked_ends(spec: str, ends: Any, num_tokens: int) -> tuple[int, ...]:
    """Ends of steps from what a function of the user's returned."""
    try:
        if any(isinstance(end, bool) for end in ends):
            raise TypeError
        whole = tuple(operator.index(end) for end in ends)
    except TypeError:
        whole = ()
    if not whole or whole[0] < 1 or whole[-1] != num_tokens or any(a >= b for a, b in pairwise(whole)):
        raise UserError(
            f"splitter {spec!r} returned {_shortened(ends)} for a response of {num_tokens} tokens; allowed: the end of "
            f"each step as whole numbers from 1 to {num_tokens}, strictly increasing, the last one {num_tokens}"
        )
    return whole


def _shortened(ends: Any) -> str:
    """What a function returned, on one line; of a long list the first ends and the last."""
    shown = reprlib.repr(ends)
    if isinstance(ends, list):
        items = [reprlib.repr(end) for end in ends]
        shown = f"[{', '.join(items if len(items) <= 8 else [*items[:5], '...', items[-1]])}]"
    return " ".join(shown.split())


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
    text = "".join(tokens)
    return _cut(tokens, text, _newlines(text), answer_lines=False)


def split_mathematics(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""A step per sentence and per line of a mathematical text, as the VinePPO paper cuts MATH.

    Formulas (`$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin..\end`) hold no sentence ends, but the lines of an `align`
    are steps. A piece of more than 100 characters is halved, again and again, near its middle: behind a comma or before
    an "and" outside of formulas, or before an equals sign outside of braces. A formula that does not close protects
    nothing. White space, snapping, `####` lines and EOS are as for `split_at_newlines`.
    """
    text = "".join(tokens)
    formulas = [match.span() for match in _FORMULA.finditer(text)]
    cuts = sorted({*_newlines(text), *_sentence_ends(text, formulas)})
    breaks = _breaks(text, formulas)
    edges = [0, *cuts, len(text)]
    for start, end in pairwise(edges):
        cuts += _halved(start, end, breaks)
    return _cut(tokens, text, sorted(cuts), answer_lines=False)


def split_at_matches(pattern: re.Pattern[str], tokens: Sequence[str]) -> tuple[int, ...]:
    """A step ends behind every match of a regular expression; white space behind it leads the next step.

    Snapping, blank steps and EOS are as for `split_at_newlines`. `^` and `$` stand for lines.
    """
    text = "".join(tokens)
    return _cut(tokens, text, [match.end() for match in pattern.finditer(text)], answer_lines=True)


def split_at_cutpoints(every: int, below: float, tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[int, ...]:
    """A step ends behind every N-th token that had a probability below P: where the policy was in doubt (SPO's cuts).

    Whether a step ends depends on what stands before its end only, never on what follows, so these cuts leave the
    credit unbiased. No step is blank.

    Args:
        every: N, uncertain tokens to a step.
        below: P.
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
    """Ends of steps in tokens from ascending cuts in characters: snapped forward, none blank, EOS in the last.

    Args:
        answer_lines: whether a step may begin with `####`.
    """
    _refuse_empty(tokens)
    starts = list(accumulate(map(len, tokens), initial=0))  # (T + 1,), in characters
    text_end = len(text.rstrip())
    boundaries: list[int] = []
    step_start = 0  # in characters
    for wanted in cuts:
        boundary = bisect_left(starts, wanted)
        cut = starts[boundary]
        if cut >= text_end or not text[step_start:cut].strip():
            continue
        # Once more behind the snapping: a cut may have passed a short line to the front of an answer line.
        if not answer_lines and _ANSWER_LINE.match(text, cut):
            continue
        boundaries.append(boundary)
        step_start = cut
    return (*boundaries, len(tokens))


def _newlines(text: str) -> list[int]:
    """Where the white space around each newline begins, but for newlines before an answer line."""
    return [
        blank.start()
        for blank in _BLANK.finditer(text)
        if "\n" in blank.group() and not _ANSWER_LINE.match(text, blank.end())
    ]


def _sentence_ends(text: str, formulas: Sequence[tuple[int, int]]) -> list[int]:
    """Behind the marks that end sentences, outside of formulas."""
    return [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not _inside(match.start(), formulas)
        and not _ABBREVIATION.search(text, max(0, match.start() - 8), match.end())
    ]


def _breaks(text: str, formulas: Sequence[tuple[int, int]]) -> list[int]:
    """Where a long piece may be halved."""
    depths = list(accumulate((character == "{") - (character == "}") for character in text))
    places = []
    for match in _BREAK.finditer(text):
        place = match.end() if match.group() == "," else match.start()
        equals = text.startswith("=", match.end())
        if (equals and depths[match.start() - 1 if match.start() else 0] <= 0) or (
            not equals and not _inside(match.start(), formulas)
        ):
            places.append(place)
    return places


def _halved(start: int, end: int, breaks: Sequence[int]) -> list[int]:
    """Cuts of the piece [start, end) that leave no longer one than allowed, as far as there are breaks."""
    if end - start <= _LONGEST:
        return []
    inside = breaks[bisect_left(breaks, start + 1) : bisect_left(breaks, end)]
    if not inside:
        return []
    middle = min(inside, key=lambda place: abs(2 * place - start - end))
    return [*_halved(start, middle, breaks), middle, *_halved(middle, end, breaks)]


def _inside(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a character lies in one of the spans, which are ascending and apart."""
    place = bisect_left(spans, (position + 1, 0)) - 1
    return place >= 0 and position < spans[place][1]


def split_every(num_tokens: int, tokens: Sequence[str]) -> tuple[int, ...]:
    """A step every `num_tokens` tokens; the last one may be shorter, and white space alone is part of the next step.
    Returns ends, shape (S,).

    A cut depends only on what stands before it, which keeps the credit exact: so the end may be a step of its own, with
    no more than white space or the end-of-sequence token.
    """
    _refuse_empty(tokens)
    ends, start = [], 0
    for end in range(num_tokens, len(tokens), num_tokens):
        if any(token.strip() for token in tokens[start:end]):
            ends.append(end)
            start = end
    return (*ends, len(tokens))


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


def step_ends(
    rollout: Rollout, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> tuple[int, ...]:
    """The end of each step of a rollout in response tokens, at most `max_states` of them (0: all), shape (S,)."""
    return merge_steps(splitter(token_texts(rollout.response_ids), rollout.sampler_logprobs), max_states)


def _refuse_empty(tokens: Sequence[str]) -> None:
    if not tokens:
        raise ValueError("a response of 0 tokens has no steps")
