"""What is printed about a response: columns, colours, narrow terminals and hostile texts."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from tests.view.rows import responses, row
from vineppo.view.queues import drops
from vineppo.view.terminal import NEGATIVE, POSITIVE, shade_of, show_entries, show_response

LINES = ["x=1\n", "y=2\n", "#3"]
SGR = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = "\x1b]0;title\x07\x1b[2J\x1b[31mred\x9b5m\u202egnp.exe\u2066\x00\x08[bold]x[/bold][link=http://a]y\r\tz\u200b"


def shown(response: Any, width: int = 80, colour: bool = False, **arguments: Any) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None, highlight=False
    )
    show_response(console, response, **arguments)
    return file.getvalue()


def background(colour: str) -> str:
    """Return the sequence with which rich starts a background of a colour such as #4a98c9."""
    return "48;2;" + ";".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5)) + "m"


def test_the_columns_of_a_response() -> None:
    [response] = responses(row(LINES, 1.0, [0.5, 0.75, 0.25]))
    lines = shown(response, label="vineppo").splitlines()
    assert lines[0] == "vineppo, iteration 1, response 1, problem train/3, reward 1, complete, 10 tokens"
    assert lines[1:3] == ["  a=1;k?", "  answer: 1"]
    assert lines[4:7] == [" 1  0.50  +0.25 x=1", ">2  0.75  -0.50 y=2", " 3  0.25  +0.75 #3"]
    assert " ".join(lines[8:]).endswith("V(prompt) 0.50 + 0.25 - 0.50 + 0.75 = 1.00, the reward")
    assert "step 3: V after - V before = 1.00 (the reward)" in shown(response, step=response.steps[2])
    wide = shown(response, width=120).splitlines()
    assert wide[4].startswith(" 1  0.50 [0.23, 0.77]  +0.25 x=1")  # Wilson's interval of 4.5 of 9


def test_tokens_with_credit_of_their_own_are_marked_without_colours() -> None:
    [response] = responses(row(["ab\n", "cde\n"], 1.0, advantages=[0.5, 0.0, 0.0, -0.5, -0.3, 0.01, 0.0]))
    lines = shown(response).splitlines()
    assert lines[4:8] == [" 1  +0.50 ab", "          +", ">2  -0.79 cde", "          --"]
    assert not any("+" in line or "--" in line for line in shown(response, colour=True).splitlines()[5:6])


def test_colours_follow_the_sign_and_the_size() -> None:
    [response] = responses(row(["a\n", "b\n", "c\n", "d"], 1.0, advantages=[1.0, 1.0, -0.5, -0.5, 0.02, 0.02, -0.1]))
    text = shown(response, colour=True)
    assert f"{background(POSITIVE[2])}a\x1b[0m" in text and f"{background(NEGATIVE[1])}b\x1b[0m" in text
    assert f"{background(NEGATIVE[0])}d\x1b[0m" in text
    assert re.search(r"\+0\.04 c$", text, re.MULTILINE)  # 2% of the largest: no colour


def test_small_changes_of_the_value_have_pale_colours() -> None:
    [response] = responses(row(LINES, 1.0, [0.97, 0.97, 1.0]))
    text = shown(response, colour=True)
    assert background(POSITIVE[0]) in text and background(POSITIVE[2]) not in text


@pytest.mark.parametrize(
    ("share", "shade"),
    [(0.0, 0), (0.05, 0), (0.06, 1), (1 / 3, 1), (0.4, 2), (0.7, 3), (1.0, 3), (-0.2, -1), (-1.0, -3)],
)
def test_shades(share: float, shade: int) -> None:
    assert shade_of(2 * share, 2.0) == shade and shade_of(share, 0.0) == 0 and shade_of(None, 1.0) == 0


def test_no_colour_is_printed_if_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    [response] = responses(row(["ab\n"], 1.0, advantages=[0.5, 0.0, 0.0]))
    text = shown(response, colour=True)
    assert "48;2" not in text and "          +" in text


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [20, 37, 64, 80, 130])
def test_no_line_is_wider_than_the_terminal(width: int, colour: bool) -> None:
    lines = ["a" * 200 + "\n", "漢字🙂" * 30 + "\n", "word " * 40, HOSTILE]
    [response] = responses(row(lines, 1.0, [0.5, 0.75, 0.25, 0.0], prompt="p" * 90 + "\n\nsecond line of words " * 9))
    text = SGR.sub("", shown(response, width, colour, label="an algorithm with a long name"))
    assert max(cell_len(line) for line in text.splitlines()) <= width
    joined = text.replace("\n", "").replace(" ", "")
    assert joined.count("a" * 8) >= 1 and text.count("漢") == 30  # nothing is lost


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("with_values", [False, True])
def test_hostile_texts_cannot_control_the_terminal(colour: bool, with_values: bool) -> None:
    text = HOSTILE * 2
    values = [0.5, 0.25] if with_values else []
    columns: dict[str, Any] = dict.fromkeys(("prompt", "answer", "problem_id", "finish_reason"), HOSTILE)
    lines = [HOSTILE + "\n", text[:-1] + "\n"]
    advantages = None if with_values else ([0.5, -0.25] * len(text))[: sum(map(len, lines))]
    [response] = responses(row(lines, 1.0, values, advantages=advantages, **columns))
    printed = shown(response, 100, colour, label=HOSTILE)
    rest = SGR.sub("", printed) if colour else printed
    assert all(c == "\n" or c.isprintable() for c in rest)
    assert r"\x1b[31mred" in rest.replace("\n", "") and "[bold]x[/bold][link=http://a]y" in rest
    assert ("\x1b" in printed) <= colour
    if colour:  # only sequences of rich: bold, dim, reset and the colours of this module
        allowed = {"1", "2", "0", "", *(f"38;2;0;0;0;{background(c)[:-1]}" for c in POSITIVE + NEGATIVE)}
        assert {sequence[2:-1] for sequence in SGR.findall(printed)} <= allowed


def test_hostile_texts_in_lists() -> None:
    file = io.StringIO()
    [response] = responses(row([HOSTILE + "\n", "b"], 0.0, [0.5, 0.25]))
    show_entries(Console(file=file, width=200, highlight=False), drops([response]))
    [line] = file.getvalue().splitlines()
    assert all(c.isprintable() for c in line) and line.startswith(
        "1 1 step 1       reward 0  value 0.50 to 0.25 (-0.25)"
    )


def test_a_long_response_is_shown() -> None:
    [response] = responses(row(["x" * 300_000 + "\n", "y"], 1.0, [0.5, 0.25]))
    assert SGR.sub("", shown(response, 100)).count("x") >= 300_000


def test_a_response_without_credit_or_text() -> None:
    nothing, empty = responses(row(["a\n", "b"], None, token_advantages=[]), row([""], 0.0))
    assert "no credit, because it was not trained on or has no reward" not in shown(nothing)
    assert "Columns: step, no credit." in shown(nothing) and "no reward" in shown(nothing)
    assert "0 tokens" in shown(empty)
