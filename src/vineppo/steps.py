"""Cut responses into reasoning steps with functions that are called splitters.

A splitter receives the T tokens of a response and returns the end of each of the S steps as a number of tokens. For
example, the ends (3, 7) cut a response of 7 tokens into the steps response[0:3] and response[3:7].

A step never ends inside a token. If a step ends after b tokens, the state after the step is prompt + response[:b]. A
state therefore consists of token ids that the policy sampled; no text is tokenized again.

Whether a step ends after a token is decided by this token and the tokens before it, never by later tokens or by the
length of the response. Otherwise the credit would be biased (docs/algorithms.md). An end-of-sequence token can
therefore be a step of its own.

Most splitters first choose cuts in the text, which are character positions. Only the text before a cut decides whether
it is made. A cut inside a token is then moved to the end of this token.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import re
import reprlib
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, Protocol

from vineppo.objects import first_line, load_object
from vineppo.sentences import mathematical_places
from vineppo.types import Rollout, UserError

_VISIBLE = re.compile(r"\S")
_MAX_MATCH = 200
"""Number of characters before a token in which `split_at_matches` looks for the start of a match."""
_CHECKED_RESPONSES = 8
"""Number of responses for which it is checked whether a user-defined splitter depends on later tokens."""
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

        The ends are strictly increasing, and the last one is T. Whether an end b < T is among them depends only on
        tokens[:b] and logprobs[:b].

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
      arguments and result as in `Splitter`. The returned ends are checked at every call. With the first 8 responses it
      is also checked whether the ends depend on later tokens. If they do, a warning is given once, because the credit
      is then biased.

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
    num_unchecked = _CHECKED_RESPONSES

    def ends_of(tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[int, ...]:
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

    def split(tokens: Sequence[str], logprobs: Sequence[float] = ()) -> tuple[int, ...]:
        nonlocal num_unchecked
        _refuse_empty(tokens)
        ends = ends_of(tokens, logprobs)
        if num_unchecked:
            difference = _effect_of_later_tokens(ends_of, tokens, logprobs, ends)
            num_unchecked = 0 if difference else num_unchecked - 1
            if difference:
                warnings.warn(
                    f"splitter {spec!r} decides cuts by later tokens, which biases the credit: {difference}; decide "
                    "whether a step ends at b by tokens[:b] and logprobs[:b] only",
                    stacklevel=2,
                )
        return ends

    return split


def _effect_of_later_tokens(
    ends_of: Callable[[Sequence[str], Sequence[float]], tuple[int, ...]],
    tokens: Sequence[str],
    logprobs: Sequence[float],
    ends: Sequence[int],
) -> str:
    """Return a description of ends that change if later tokens change, or "" if there are none.

    The response is cut off at a few places, and another token is put there. The ends up to the place must not change.

    Args:
        ends_of: returns the ends of a response.
        tokens: text of each token, shape (T,).
        logprobs: log-probability of each token, shape (T,) or empty.
        ends: the ends of the response.
    """
    T = len(tokens)
    places = {*ends[:4], *(i * T // 4 for i in range(1, 4)), T - 1} & set(range(1, T))
    for place, token in itertools.product(sorted(places), ("", "\n", tokens[0])):
        try:
            changed = ends_of([*tokens[:place], token], [*logprobs[:place], -1.0] if logprobs else ())
        except UserError:
            # The function may fail for a response that no policy would write.
            continue
        before, after = ([end for end in some if end <= place] for some in (ends, changed))
        if before != after:
            return (
                f"up to token {place} of a response, the ends are {_shortened(before)} if the next token is "
                f"{tokens[place]!r}, and {_shortened(after)} if the response ends with {token!r} there"
            )
    return ""


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

    A step ends after the first newline that follows visible text: the text "x = 1\n\ny = 2" has the steps "x = 1\n" and
    "\ny = 2".

    - A blank line belongs to the step after it.
    - A cut inside a token is moved to the end of that token. For example, the tokens ["x", ".\n\n", "y"] give the steps
      "x.\n\n" and "y". If a line lies entirely inside one token, that line is not a separate step.
    - If the response ends in a newline and EOS, EOS is a step of its own. A step without visible text can only be the
      last one.
    """
    text = "".join(tokens)
    return _cut(tokens, text, ((match.end(), 0) for match in re.finditer("\n", text)))


def split_mathematics(tokens: Sequence[str]) -> tuple[int, ...]:
    r"""Make each sentence and each line of a mathematical text a step, similar to the VinePPO paper for MATH.

    - A line ends after its newline.
    - A sentence ends after a full stop, question mark or exclamation mark. If the mark follows a digit or a single
      letter, it ends the sentence only if white space follows (3.5 is no end), and the step includes this white space.
      An exclamation mark after a digit or a single letter is a factorial. Common abbreviations do not end a sentence.
    - A sentence does not end inside a formula (`$..$`, `$$..$$`, `\(..\)`, `\[..\]`, `\begin..\end`). A line ends
      inside a formula, too, so each line of an `align` environment is a step. A formula that is not closed ends at the
      next blank line; `$` and `\(` end at the next newline.
    - A step of more than 100 characters also ends after a comma or "and" outside formulas, and after an equals sign
      outside braces. A longer word that begins with "and" counts too, because the text before a cut does not show it.
    - Blank lines, cuts inside tokens and EOS are treated as in `split_at_newlines`.
    """
    text = "".join(tokens)
    return _cut(tokens, text, mathematical_places(text))


def split_at_matches(pattern: re.Pattern[str], tokens: Sequence[str]) -> tuple[int, ...]:
    r"""End a step after each token with which a match of a regular expression is complete.

    After each token, the pattern is searched in the text up to there, so look-ahead, `$` and `\b` do not see later
    tokens: `(?=Step)` ends a step after the word "Step". A match starts after the match before it, at most 200
    characters before the token. Blank steps and EOS are treated as in `split_at_newlines`.

    Args:
        pattern: the regular expression. `build_splitter` compiles it so that `^` and `$` match at every line.
        tokens: text of each token, shape (T,).
    Returns:
        The end of each step as a number of tokens, shape (S,).
    """
    text = "".join(tokens)

    def places() -> Iterator[tuple[int, int]]:
        start = end = 0
        for token in filter(None, tokens):
            start, end = max(start, end - _MAX_MATCH), end + len(token)
            if pattern.search(text, start, end):
                yield end, 0
                start = end

    return _cut(tokens, text, places())


def split_at_cutpoints(every: int, below: float, tokens: Sequence[str], logprobs: Sequence[float]) -> tuple[int, ...]:
    """End a step as soon as it contains N uncertain tokens and visible text, as in SPO.

    A token is uncertain if the policy sampled it with a probability below P. A step ends after an uncertain token, not
    before it: a cut before the token would depend on a later token.

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
    boundaries: list[int] = []
    uncertain, blank = 0, True
    for end, (token, logprob) in enumerate(zip(tokens[:-1], logprobs, strict=False), start=1):
        uncertain += logprob < math.log(below)
        blank &= not token.strip()
        if uncertain >= every and not blank:
            boundaries.append(end)
            uncertain, blank = 0, True
    return (*boundaries, len(tokens))


def _cut(tokens: Sequence[str], text: str, places: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Convert places in the text to the ends of steps.

    A cut inside a token is moved to the end of that token. There is no cut if the step before it would be blank.

    Args:
        text: text of all tokens.
        places: pairs (position, n) in ascending order of the character positions in `text`. The text is cut at a
            position if the step before it has more than n characters.
    Returns:
        The end of each step as a number of tokens, shape (S,).
    """
    _refuse_empty(tokens)
    # starts[i] is the number of characters before token i.
    starts = list(accumulate(map(len, tokens), initial=0))  # (T + 1,)
    boundaries: list[int] = []
    step_start, visible = 0, _next_visible(text, 0)  # in characters
    for position, min_length in places:
        boundary = bisect_left(starts, position)
        if boundary < len(tokens) and visible < position and position - step_start > min_length:
            boundaries.append(boundary)
            step_start = starts[boundary]
            visible = _next_visible(text, step_start)
    return (*boundaries, len(tokens))


def _next_visible(text: str, start: int) -> int:
    """Return the position of the first character from `start` that is not white space."""
    match = _VISIBLE.search(text, start)
    return match.start() if match else len(text)


def split_every(num_tokens: int, tokens: Sequence[str]) -> tuple[int, ...]:
    """End a step after every `num_tokens` tokens. A step that would be blank is merged into the next one.

    The last step may be shorter or blank. It is not merged into the step before it, because the end of that step would
    then depend on later tokens.

    Args:
        num_tokens: number of tokens per step.
        tokens: text of each token, shape (T,).
    Returns:
        The end of each step as a number of tokens, shape (S,).
    """
    _refuse_empty(tokens)
    ends, blank = [], True
    for end in range(num_tokens, len(tokens), num_tokens):
        blank = blank and not any(token.strip() for token in tokens[end - num_tokens : end])
        if not blank:
            ends.append(end)
            blank = True
    return (*ends, len(tokens))


def merge_steps(boundaries: Sequence[int], max_states: int) -> tuple[int, ...]:
    """Merge neighbouring steps so that at most `max_states` steps remain.

    Of the `max_states` - 1 first remaining steps, half (rounded up) are single steps. Half of the others consist of two
    steps each, half of those that are then left of four, and so on. The last remaining step contains all other steps.
    With a maximum of 8, the ends of the steps 1, 2, 3, 4, 6, 8 and 12 remain, and that of the last step. Which ends
    remain does not depend on the number of steps, because this number depends on later tokens.

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
    if max_states == 0:
        return tuple(boundaries)
    remaining: list[int] = []  # numbers of steps, counted from 1
    last, size, num_left = 0, 1, max_states - 1
    while num_left and last < num_steps:
        num_equal = (num_left + 1) // 2
        remaining += range(last + size, last + size * num_equal + 1, size)
        last, size, num_left = last + size * num_equal, 2 * size, num_left - num_equal
    return (*(boundaries[step - 1] for step in remaining if step < num_steps), boundaries[-1])


def step_ends(
    rollout: Rollout, splitter: Splitter, token_texts: Callable[[Sequence[int]], list[str]], max_states: int
) -> tuple[int, ...]:
    """Return the end of each step of a rollout as a number of response tokens, shape (S,).

    Args:
        splitter: cuts the response into steps.
        token_texts: maps token ids to the text of each token.
        max_states: maximum number of steps; 0 means no limit. If there are more, neighbouring steps are merged (see
            `merge_steps`).
    """
    return merge_steps(splitter(token_texts(rollout.response_ids), rollout.sampler_logprobs), max_states)


def _refuse_empty(tokens: Sequence[str]) -> None:
    """Raise ValueError if a response has no tokens."""
    if not tokens:
        raise ValueError("a response of 0 tokens has no steps")
