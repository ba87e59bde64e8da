"""Cut responses into reasoning steps with functions that are called splitters.

A splitter receives the T tokens of a response and returns the end of each of the S steps as a number of tokens. For
example, the ends (3, 7) cut a response of 7 tokens into the steps response[0:3] and response[3:7].

A step never ends inside a token. If a step ends after b tokens, the state after the step is prompt + response[:b]. A
state therefore consists of token ids that the policy sampled; no text is tokenized again.

Most splitters first choose cuts in the text, which are character positions. A cut inside a token is then moved to the
end of this token.
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
# The mark of the final answer in GSM8K, and the white space before it.
_ANSWER_LINE = re.compile(r"\s*####")
# Punctuation with closing quotation marks or brackets, if the next word starts like a new sentence.
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s+[A-Z\d$\\(])")
# An abbreviation, whose period does not end a sentence.
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|vs|etc|cf|Fig|Eq|No|approx)|\be\.g|\bi\.e)\.$")
_FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$]+?\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
# A comma, the white space before "and" or "=", or the position before "=". Long sentences are cut there.
_SPLIT_POINT = re.compile(r",(?=\s)|(?<!\s)\s+(?=and\s|=)|(?<![\s<>=!:])(?==)")
_MAX_PIECE = 100
"""Maximum number of characters of a sentence or line; `split_mathematics` cuts longer ones in two."""
_CUTPOINT_EVERY, _CUTPOINT_BELOW = 5, 0.9
"""Default values of N and P in the splitter `cutpoints:N:P` (see `split_at_cutpoints`)."""
_NAMES = ("newline", "math", "tokens", "cutpoints", "regex")
"""First parts of the names of the built-in splitters."""
_SPECS = "newline, math, tokens:N, cutpoints, cutpoints:N:P, regex:PATTERN or module:function"
"""The names of all splitters, for error messages."""


class Splitter(Protocol):
    """Cuts a response into steps."""

    def __call__(self, tokens: Sequence[str], logprobs: Sequence[float] = ()) -> tuple[int, ...]:
        """Return the end of each of the S steps as a number of tokens, shape (S,).

        The ends are strictly increasing, and the last one is T.

        Args:
            tokens: text of each of the T response tokens, decoded alone, shape (T,). Special tokens have the text "".
            logprobs: log-probability of each token under the distribution from which the token was sampled, in nats,
                shape (T,).
        Raises:
            ValueError: if T is 0.
        """
        ...


def build_splitter(spec: str) -> Splitter:
    """Build a splitter from its name.

    The names, and the functions in this module that they select, are:

    - `newline`: `split_at_newlines`.
    - `math`: `split_mathematics`.
    - `tokens:N`: `split_every` with steps of N tokens.
    - `cutpoints:N:P`: `split_at_cutpoints` with these values of N and P. `cutpoints` means `cutpoints:5:0.9`.
    - `regex:PATTERN`: `split_at_matches` with this regular expression.
    - `module:function`: a user-defined function `cut(tokens, logprobs=()) -> ends` or `cut(tokens) -> ends`, with
      arguments and result as in `Splitter`. The returned ends are checked at every call.

    A user-defined function must decide whether a step ends at b from tokens[:b] and logprobs[:b] only. If the decision
    depends on later tokens, the credit is biased.

    Args:
        spec: name of the splitter.
    Raises:
        UserError: if the name is unknown, a number is out of range, the pattern is not a regular expression, or the
            user-defined function cannot be loaded. The returned splitter raises UserError if the user-defined function
            fails or returns invalid ends.
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
    """Return a splitter that calls the user-defined function `module:function` and checks the returned ends."""
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
    """Return a function of (tokens, logprobs) that calls `function` with the arguments that `function` accepts.

    Raises:
        UserError: if `function` accepts neither (tokens, logprobs) nor (tokens).
    """
    try:
        signature = inspect.signature(function)
    except ValueError:
        # Some functions written in C have no signature. They are called with the tokens only.
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
    """Check the ends that a user-defined function returned, and convert them to integers.

    Raises:
        UserError: if the ends are not strictly increasing integers of at least 1, or the last one is not `num_tokens`.
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
    """Return the ends as one line of text for error messages.

    A list of more than 8 ends is shortened to the first five and the last.
    """
    shown = reprlib.repr(ends)
    if isinstance(ends, list):
        items = [reprlib.repr(end) for end in ends]
        shown = f"[{', '.join(items if len(items) <= 8 else [*items[:5], '...', items[-1]])}]"
    return " ".join(shown.split())


def split_at_newlines(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""Make each line of the response a step.

    A step ends after the last visible character of its line. The newline and the white space around the newline belong
    to the next step: the text "x = 1\ny = 2" has the steps "x = 1" and "\ny = 2".

    - A blank line is not a step.
    - A line that begins with `####` (the mark of the final answer) belongs to the step before it.
    - White space and special tokens at the end of the response, such as EOS, belong to the last step.
    - A cut inside a token is moved to the end of that token. For example, the tokens ["x", ".\n", "\n", "y"] give the
      steps "x.\n" and "\ny". The first step includes a newline, because the token ".\n" cannot be divided.
    - A line that lies entirely inside one token is not a separate step.

    Returns:
        The end of each step as a number of tokens, shape (S,). A step is blank only if the whole response is blank.
    """
    text = "".join(tokens)
    return _cut(tokens, text, _newlines(text), answer_lines=False)


def split_mathematics(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""Make each sentence and each line of a mathematical text a step, as the VinePPO paper does for MATH.

    - A sentence does not end inside a formula (`$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin..\end`). A formula that is
      not closed is treated as ordinary text.
    - A line also ends inside a formula, so each line of an `align` environment is a step.
    - A sentence or line of more than 100 characters is cut in two near its middle. Parts that are still too long are
      cut again. Such cuts are made after a comma or before the word "and" outside formulas, or before an equals sign
      outside braces.
    - White space, cuts inside tokens, `####` lines and EOS are treated as in `split_at_newlines`.

    Returns:
        The end of each step as a number of tokens, shape (S,).
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
    """End a step after every match of a regular expression. White space after the match belongs to the next step.

    Cuts inside tokens, blank steps and EOS are treated as in `split_at_newlines`.

    Args:
        pattern: the regular expression. `build_splitter` compiles it so that `^` and `$` match at every line.
        tokens: text of each token, shape (T,).
    Returns:
        The end of each step as a number of tokens, shape (S,).
    """
    text = "".join(tokens)
    return _cut(tokens, text, [match.end() for match in pattern.finditer(text)], answer_lines=True)


def split_at_cutpoints(every: int, below: float, tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[int, ...]:
    """End a step as soon as it contains N uncertain tokens, as in SPO. No step is blank.

    A token is uncertain if the policy sampled it with a probability below P. Whether a step ends at a position depends
    only on the tokens before this position, so the cuts do not bias the credit.

    Args:
        every: N, the number of uncertain tokens per step.
        below: P, the probability below which a token is uncertain.
        tokens: text of each token, shape (T,).
        logprobs: log-probability of each token in nats, shape (T,).
    Returns:
        The end of each step as a number of tokens, shape (S,).
    Raises:
        ValueError: if there are no tokens, or the numbers of tokens and log-probabilities differ.
    """
    _refuse_empty(tokens)
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens but {len(logprobs)} log-probabilities")
    # Index of the last token with visible text. All later tokens are blank, so they belong to the last step.
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
    """Convert cuts in the text to the ends of steps.

    A cut inside a token is moved to the end of that token. A cut is dropped if the step before it would be blank, or if
    only white space and special tokens follow it.

    Args:
        text: text of all tokens.
        cuts: character positions in `text`, in ascending order.
        answer_lines: whether a step may begin with `####`.
    Returns:
        The end of each step as a number of tokens, shape (S,).
    """
    _refuse_empty(tokens)
    # starts[i] is the number of characters before token i.
    starts = list(accumulate(map(len, tokens), initial=0))  # (T + 1,)
    text_end = len(text.rstrip())
    boundaries: list[int] = []
    step_start = 0  # in characters
    for position in cuts:
        boundary = bisect_left(starts, position)
        cut = starts[boundary]
        if cut >= text_end or not text[step_start:cut].strip():
            continue
        # A cut that was moved to the end of a token may now be directly before a `####` line.
        if not answer_lines and _ANSWER_LINE.match(text, cut):
            continue
        boundaries.append(boundary)
        step_start = cut
    return (*boundaries, len(tokens))


def _newlines(text: str) -> list[int]:
    """Return the position at which the white space around each newline begins, except before a `####` line."""
    return [
        blank.start()
        for blank in _BLANK.finditer(text)
        if "\n" in blank.group() and not _ANSWER_LINE.match(text, blank.end())
    ]


def _sentence_ends(text: str, formulas: Sequence[tuple[int, int]]) -> list[int]:
    """Return the positions after the punctuation marks that end a sentence outside formulas.

    Args:
        formulas: (start, end) character positions of the formulas in `text`.
    """
    # No abbreviation is longer than 8 characters, so the search for one begins 8 characters before the mark.
    return [
        match.end()
        for match in _SENTENCE_END.finditer(text)
        if not _inside(match.start(), formulas)
        and not _ABBREVIATION.search(text, max(0, match.start() - 8), match.end())
    ]


def _split_points(text: str, formulas: Sequence[tuple[int, int]]) -> list[int]:
    """Return the positions where a sentence or line that is too long may be cut.

    Args:
        formulas: (start, end) character positions of the formulas in `text`.
    """
    # For each character, the number of braces that are open after it.
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
    """Return the cuts that divide text[start:end] until each part is short enough or contains no split point.

    Each part that is too long is cut at the split point nearest to its middle.

    Args:
        split_points: positions where the text may be cut (see `_split_points`).
    """
    if end - start <= _MAX_PIECE:
        return []
    inside = split_points[bisect_left(split_points, start + 1) : bisect_left(split_points, end)]
    if not inside:
        return []
    middle = min(inside, key=lambda point: abs(2 * point - start - end))
    return [*_bisections(start, middle, split_points), middle, *_bisections(middle, end, split_points)]


def _inside(position: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether a position lies in one of the spans.

    Args:
        spans: (start, end) pairs of positions, in ascending order and without overlap.
    """
    index = bisect_left(spans, (position + 1, 0)) - 1
    return index >= 0 and position < spans[index][1]


def split_every(num_tokens: int, tokens: Sequence[str]) -> tuple[int, ...]:
    """End a step after every `num_tokens` tokens. A step that would be blank is merged into the next one.

    Whether a step ends at a position depends only on the tokens before this position, so the cuts do not bias the
    credit. The last step may be shorter or blank. It is not merged into the step before it, because the end of that
    step would then depend on later tokens.

    Args:
        num_tokens: number of tokens per step.
        tokens: text of each token, shape (T,).
    Returns:
        The end of each step as a number of tokens, shape (S,).
    """
    _refuse_empty(tokens)
    ends, start = [], 0
    for end in range(num_tokens, len(tokens), num_tokens):
        if any(token.strip() for token in tokens[start:end]):
            ends.append(end)
            start = end
    return (*ends, len(tokens))


def merge_steps(boundaries: Sequence[int], max_states: int) -> tuple[int, ...]:
    """Merge neighbouring steps so that at most `max_states` steps remain.

    Each remaining step consists of S / max_states of the S original steps, rounded down or up. The cuts are therefore
    spread evenly over the response.

    Args:
        boundaries: the end of each step as a number of tokens, strictly increasing, shape (S,).
        max_states: maximum number of steps; 0 means no limit. This is also the maximum number of states whose values
            are estimated, because there is one state before each step.
    Returns:
        The end of each remaining step as a number of tokens.
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
    """Return the end of each step of a rollout as a number of response tokens, shape (S,).

    Args:
        splitter: cuts the response into steps.
        token_texts: maps token ids to the text of each token.
        max_states: maximum number of steps; 0 means no limit. If there are more, neighbouring steps are merged.
    """
    return merge_steps(splitter(token_texts(rollout.response_ids), rollout.sampler_logprobs), max_states)


def _refuse_empty(tokens: Sequence[str]) -> None:
    """Raise ValueError if a response has no tokens."""
    if not tokens:
        raise ValueError("a response of 0 tokens has no steps")
