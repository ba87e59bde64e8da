"""The command `vineppo show`."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from tests.view.rows import row, run_with
from vineppo.cli.main import main

LINES = ["x=1\n", "y=2\n", "#3"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run with two iterations; the largest fall of the second one is that of its response 2, in step 3."""
    monkeypatch.chdir(tmp_path)
    run_with(Path("run"), row(LINES, 1.0, [0.5, 0.0, 0.75]), row(LINES, 1.0), algorithm="vineppo")
    later = [row(LINES, 1.0, [0.5, 0.25, 0.75]), row(LINES, 0.0, [0.5, 0.75, 0.75]), row(LINES, 0.0, [0.5, 0.5, 0.5])]
    later[2] |= {"finish_reason": "length"}
    run_with(Path("run"), *(columns | {"iteration": 2} for columns in later), iteration=2)
    return "run"


def output(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert main(["show", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_newest_iteration_and_the_largest_fall_are_shown(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, run)
    assert lines[0].startswith("vineppo, iteration 2, response 2, problem train/3, reward 0")
    assert [line for line in lines if line.startswith(">")] == [">3  0.75  -0.75 #3"]
    assert (
        output(capsys, run, "2")
        == lines
        == output(capsys, run, "2", "2")
        == output(capsys, run, "2", "2", "--step", "3")
    )


def test_a_response_and_a_step_can_be_chosen(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, run, "1", "1", "--step", "1")
    assert lines[0].startswith("vineppo, iteration 1, response 1")
    assert any(line.startswith(">1  0.50  -0.50") for line in lines)
    assert "V(prompt) 0.50 - 0.50 + 0.75 + 0.25 = 1.00, the reward" in lines


@pytest.mark.parametrize(
    ("arguments", "head", "places"),
    [
        (["--drops"], "iteration 2: 3 of 3 responses", ["2 2 step 3", "2 3 step 3", "2 1 step 1"]),
        (["all", "--drops"], "2 iterations: 4 of 5 responses", ["2 2 step 3", "1 1 step 1", "2 3 step 3"]),
        (["1", "--lucky"], "iteration 1: 1 of 2 responses", ["1 1 step 1"]),
        (["--truncated"], "iteration 2: 1 of 3 responses", ["2 3 "]),
    ],
)
def test_lists(
    arguments: list[str], head: str, places: list[str], run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = output(capsys, run, *arguments)
    assert lines[0] == head
    assert [line[: len(place)] for line, place in zip(lines[2:], places, strict=False)] == places
    step = f" --step {places[0].split()[-1]}" if "step" in places[0] else ""
    assert lines[-1] == f"show one: vineppo show run {' '.join(places[0].split()[:2])}{step}"


def test_a_list_can_be_limited_or_empty(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, run, "--drops", "--limit", "1")
    assert lines[0] == "iteration 2: 3 of 3 responses, of which the first 1 are listed" and len(lines) == 4
    assert output(capsys, run, "1", "--truncated") == ["iteration 1: none of 2 responses is in this list"]
    assert output(capsys, run, "2", "--disagree") == ["iteration 2: none of 3 responses is in this list"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no RUN is given; give the directory of a run, such as runs/demo"),
        (["nowhere"], "no run directory at nowhere; give a directory that `vineppo train` created"),
        (["run", "3"], "run has no responses of iteration 3; it has 1 to 2"),
        (["run", "two"], "ITERATION is 'two'; it must be a whole number"),
        (["run", "all"], "ITERATION is 'all'; it must be a whole number; `all` is for lists, such as --drops"),
        (["run", "2", "9"], "iteration 2 of run has no response 9; it has the responses 1 to 3"),
        (["run", "2", "0"], "iteration 2 of run has no response 0; it has the responses 1 to 3"),
        (["run", "2", "x"], "ROLLOUT is 'x'; it must be a whole number"),
        (["run", "2", "1", "1"], "unexpected argument 1; usage: vineppo show RUN [ITERATION [ROLLOUT]]"),
        (["run", "--step", "4"], "response 2 of iteration 2 has no step 4; it has the steps 1 to 3"),
        (["run", "--step", "0"], "response 2 of iteration 2 has no step 0; it has the steps 1 to 3"),
        (["run", "--step", "one"], "--step is 'one'; it must be a whole number"),
        (["run", "--drops", "--lucky"], "--drops and --lucky exclude each other; give one of them"),
        (["run", "2", "1", "--drops"], "--drops lists responses, so ROLLOUT has no meaning; remove one of the two"),
        (["run", "--drops", "--step", "1"], "--drops lists responses, so --step has no meaning; remove one of the two"),
        (["run", "--drops", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (
            ["run", "--limit", "3"],
            "--limit is for a list; give it with one of --drops, --lucky, --truncated, --disagree",
        ),
        (["run", "1", "--steps", "1"], "unknown option --steps; did you mean --step?"),
        (["other", "--disagree"], "no response has both credit and Monte-Carlo values of its states"),
    ],
)
def test_mistakes_are_answered_in_one_line(
    arguments: list[str], message: str, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(Path("other"), row(LINES, 1.0))
    assert main(["show", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1


def test_characters_that_standard_output_lacks_are_escaped(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with(Path("run"), row(["漢=1\n", "é"], 1.0, [0.5, 0.25]) | {"iteration": 3}, iteration=3)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["show", run]) == 0
    sys.stdout.flush()
    assert rb"\u6f22=1" in raw.getvalue() and rb"\xe9" in raw.getvalue()
