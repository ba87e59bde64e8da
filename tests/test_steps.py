"""Steps: cuts in token indices, total on any response."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vineppo.steps import build_splitter, merge_steps
from vineppo.types import UserError

newline = build_splitter("newline")

# Crowded with what can go wrong: newlines, answer marks, merged tokens, half characters, special tokens.
PIECES = ["", " ", "\n", "\r\n", "\t", "a", "b.", ".\n", ".\n\n", "\n\n\n", "####", "##", "\n####", "\n#", "a\nb"]
PIECES += ["a\nb\nc", " \n", "\n  x", "\ufffd", "\u00a0", "\u2028"]
responses = st.lists(st.one_of(st.sampled_from(PIECES), st.text("a#\n ", max_size=4)), min_size=1, max_size=30)


def texts_of(tokens: list[str], boundaries: tuple[int, ...]) -> list[str]:
    return ["".join(tokens[start:end]) for start, end in pairwise((0, *boundaries))]


def lines_of(text: str) -> list[str]:
    """The steps as a reader would count them: non-blank lines, answer lines joined to the line before."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.strip() and lines and line.strip().startswith("####"):
            lines[-1] += "\n" + line
        elif line.strip():
            lines.append(line)
    return lines


@settings(deadline=None)
@given(responses)
def test_newline_boundaries_strictly_increase_end_at_t_and_leave_no_blank_step(tokens: list[str]) -> None:
    boundaries = newline(tokens)
    assert boundaries[-1] == len(tokens)
    assert all(start < end for start, end in pairwise((0, *boundaries)))
    steps = texts_of(tokens, boundaries)
    assert "".join(steps) == "".join(tokens)
    assert all(step.strip() for step in steps) or len(steps) == 1
    assert not any(step.lstrip().startswith("####") for step in steps[1:])


@settings(deadline=None)
@given(responses)
def test_newline_state_ends_in_white_space_only_where_one_token_holds_both(tokens: list[str]) -> None:
    for boundary in newline(tokens)[:-1]:
        last = next(token for token in reversed(tokens[:boundary]) if token)
        assert not last[-1].isspace() or last.strip()


@settings(deadline=None)
@given(st.text("a#. \n\r", min_size=1, max_size=60))
def test_newline_steps_of_single_character_tokens_are_the_lines(text: str) -> None:
    steps = texts_of(list(text), newline(list(text)))
    expected = [line.split() for line in lines_of(text)] or [[]]
    assert [step.split() for step in steps] == expected


@settings(deadline=None)
@given(responses)
def test_newline_snaps_each_cut_to_the_first_token_start_at_or_after_it(tokens: list[str]) -> None:
    text = "".join(tokens)
    exact = set(newline(list(text))[:-1]) if text else set()
    starts = list(accumulate(map(len, tokens), initial=0))
    snapped = {next(index for index, start in enumerate(starts) if start >= cut) for cut in exact}
    assert set(newline(tokens)[:-1]) <= snapped


@pytest.mark.parametrize(
    ("tokens", "ends"),
    [
        (["a", "=", "1", "\n", "b", "=", "2", ""], (3, 8)),  # the newline leads the next step; EOS joins the last
        (["x", ".\n\n", "y", "."], (2, 4)),  # merged with the period: the step keeps its period
        (["x", ".\n", "\n", "y"], (2, 4)),  # the rest of the white space goes to the front of the next step
        (["x", "\n\n\n", "y"], (1, 3)),
        (["x", " ", "\n", " ", "\n", "y"], (1, 6)),  # blank lines, and the blank before the newline
        (["x", "\n", "####", " 7", "\n", ""], (6,)),  # the answer line belongs to the step before it
        (["x", "\n", "##", "##", " 7", "\n", "y"], (5, 7)),
        (["#### 7", "\n", "y"], (1, 3)),  # no step before it
        (["\n", "\n", "x"], (3,)),
        (["x", "\n", "", "\n"], (4,)),
        (["\n", "", " "], (3,)),  # blank as a whole
        (["", ""], (2,)),
        (["a\nb\nc", "\n", "d"], (1, 3)),  # lines inside one token cannot be cut apart
        (["a\nb", "\n####", " 7"], (3,)),  # snapped to the front of an answer line: no cut
        (["\ufffd", "\ufffd", "\n", "\ufffd", "\ufffd"], (2, 5)),  # half characters are text
        (["x", "\r\n", "y"], (1, 3)),
    ],
)
def test_newline_by_hand(tokens: list[str], ends: tuple[int, ...]) -> None:
    assert newline(tokens) == ends


def test_newline_is_linear_in_a_long_blank_response() -> None:
    tokens = [" "] * 200_000  # a pattern that backtracks would take minutes
    assert newline(tokens) == (200_000,)


@settings(deadline=None)
@given(responses, st.integers(1, 40))
def test_every_n_tokens(tokens: list[str], num_tokens: int) -> None:
    boundaries = build_splitter(f"tokens:{num_tokens}")(tokens)
    assert boundaries[-1] == len(tokens)
    lengths = [end - start for start, end in pairwise((0, *boundaries))]
    assert all(length == num_tokens for length in lengths[:-1]) and 1 <= lengths[-1] <= num_tokens


def test_every_n_tokens_by_hand() -> None:
    assert build_splitter("tokens:3")(list("abcdefg")) == (3, 6, 7)
    assert build_splitter("tokens:3")(list("abcdef")) == (3, 6)


@pytest.mark.parametrize("spec", ["newline", "tokens:4"])
def test_a_response_without_tokens_has_no_steps(spec: str) -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        build_splitter(spec)([])


@pytest.mark.parametrize("spec", ["", "newlines", "tokens", "tokens:", "tokens:0", "tokens:-1", "tokens:x", "tokens:²"])
def test_unknown_splitters_name_what_is_allowed(spec: str) -> None:
    with pytest.raises(UserError, match="newline, or tokens:N"):
        build_splitter(spec)


@settings(deadline=None)
@given(st.sets(st.integers(1, 200), min_size=1), st.integers(0, 40))
def test_merged_steps_are_even_and_keep_the_end(ends: set[int], max_states: int) -> None:
    boundaries = tuple(sorted(ends))
    merged = merge_steps(boundaries, max_states)
    assert len(merged) == (min(max_states, len(boundaries)) or len(boundaries))
    assert merged[-1] == boundaries[-1]
    positions = [-1, *(boundaries.index(end) for end in merged)]
    sizes = [after - before for before, after in pairwise(positions)]
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_merged_steps_by_hand() -> None:
    boundaries = (2, 5, 9, 10, 14)
    assert merge_steps(boundaries, 0) == boundaries
    assert merge_steps(boundaries, 5) == boundaries
    assert merge_steps(boundaries, 2) == (5, 14)
    assert merge_steps(boundaries, 1) == (14,)
    with pytest.raises(ValueError, match="0 steps"):
        merge_steps((), 3)
    with pytest.raises(ValueError, match="at most -1"):
        merge_steps(boundaries, -1)
