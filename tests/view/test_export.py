"""Data sets for TRL's trainers, from rows with known numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.view.rows import responses, row, run_with
from vineppo.cli.main import main
from vineppo.view.export import Exported, ExportSettings, export, prefix_pair, split_rows
from vineppo.view.records import responses_of

LINES = ["x=1\n", "y=2\n", "#3"]


def continuation(state: int, shared: int, text: str, reward: float, accepted: int | None = None) -> dict[str, Any]:
    return {
        "state": state, "shared": shared, "accepted": accepted, "num_tokens": len(text), "text": text,
        "reward": reward, "finish_reason": "stop",
    }  # fmt: skip


def labels(*rows: dict[str, Any], **settings: Any) -> list[list[bool]]:
    return [entry["labels"] for entry in export(responses(*rows), "prm", ExportSettings(**settings)).rows]


def test_labels_come_from_the_value_after_the_step() -> None:
    # The values after the three steps are 0.25, 0.75 and the reward.
    right, wrong = row(LINES, 1.0, [0.5, 0.25, 0.75]), row(LINES, 0.0, [0.5, 0.25, 0.75])
    assert labels(right, wrong) == [[False, True, True], [False, True, False]]
    assert labels(right, wrong, threshold=0.75) == [[False, True, True], [False, True, False]]
    assert labels(right, wrong, threshold=0.76) == [[False, False, True], [False, False, False]]
    assert labels(right, wrong, threshold=0.01) == [[True, True, True], [True, True, False]]
    # The step advantages are -0.25, 0.5 and 0.25 or -0.75.
    assert labels(right, wrong, rule="advantage") == [[False, True, True], [False, True, False]]
    assert labels(right, wrong, rule="advantage", tolerance=0.25) == [[True, True, True], [True, True, False]]


def test_prm_rows_have_the_texts_that_trl_joins_with_line_breaks() -> None:
    exported = export(responses(row(LINES, 1.0, [0.5, 0.25, 0.75])), "prm")
    assert exported.rows == [{"prompt": "a=1;k?", "completions": ["x=1", "y=2", "#3"], "labels": [False, True, True]}]
    assert exported.notes == [
        "labels: 2 of 3 steps are true (66.7%): the value after it is at least 0.5",
        "a Monte-Carlo value is not step correctness (arXiv 2501.07301)",
    ]
    # Steps that end elsewhere keep their text, and the user is told.
    exported = export(responses(row(["x=1, ", "y=2\n", "#3"], 1.0, [0.5, 0.25, 0.75])), "prm")
    assert exported.rows[0]["completions"] == ["x=1, ", "y=2\n", "#3"]
    assert exported.notes[-1].startswith("the steps of 1 responses do not end in line breaks: train with PRMConfig(")


def test_prm_leaves_out_what_has_no_monte_carlo_values() -> None:
    values = row(LINES, 1.0, [0.5, 0.25, 0.75])
    rows = [
        values,
        values | {"finish_reason": "length", "reward": 0.0},
        values | {"kind": "sample"},
        values | {"reward": None},
        row(LINES, 1.0),
        values | {"num_mc_rollouts": []},  # predictions of a value network
    ]
    exported = export(responses(*rows), "prm")
    assert len(exported.rows) == 1 and exported.num_responses == 6
    assert exported.left_out == {
        "cut off by the length limit": 1,
        "training samples that are no rollouts": 1,
        "without a reward": 1,
        "without Monte-Carlo values": 2,
    }


def test_pairs_of_whole_responses_use_each_response_once() -> None:
    rows = [
        row(["r1"], 1.0), row(["w1"], 0.0), row(["w2"], 0.0), row(["r2"], 1.0), row(["r3"], 1.0), row(["h"], 0.5),
        row(["w3"], 0.0) | {"finish_reason": "length"}, row(["w4"], 0.0) | {"problem_id": "train/4"},
    ]  # fmt: skip
    exported = export(responses(*rows), "dpo")
    assert [(entry["chosen"], entry["rejected"]) for entry in exported.rows] == [("r1", "w1"), ("r2", "w2")]
    assert {entry["prompt"] for entry in exported.rows} == {"a=1;k?"}
    assert +exported.left_out == {
        "neither right nor wrong": 1,
        "cut off by the length limit": 1,
        "wrong, without a right partner": 1,
        "right, without a wrong partner": 1,
    }
    assert exported.notes == ["pairs: 0 share the text up to the worst step, 2 are whole responses"]
    loose = export(responses(*rows), "dpo", ExportSettings(right=0.5))
    assert [(entry["chosen"], entry["rejected"]) for entry in loose.rows] == [("r1", "w1"), ("r2", "w2")]
    none = export(responses(*rows), "dpo", ExportSettings(pairs="prefix"))
    assert none.rows == [] and none.left_out["right, only for whole pairs"] == 3
    assert none.left_out["wrong, without a right continuation"] == 3


def test_the_same_pair_is_written_once() -> None:
    exported = export(responses(*[row(["r"], 1.0), row(["w"], 0.0)] * 3), "dpo")
    assert len(exported.rows) == 1 and exported.left_out["the same pair again"] == 2


# The worst step is the second one (0.75 to 0): the characters 4 to 7. A token is a character.
WRONG = row(LINES, 0.0, [0.5, 0.75, 0.0])


@pytest.mark.parametrize(
    ("state", "shared", "text", "reward", "chosen"),
    [
        (4, 0, "z=2\n#5", 1.0, "z=2\n#5"),  # starts at the state before the worst step
        (4, 2, "y=5\n#5", 1.0, "y=5\n#5"),  # leaves the response within it
        (0, 6, "x=1\ny=5\n#5", 1.0, "y=5\n#5"),  # starts before it, and passes through the state
        (4, 4, "y=2\n#5", 1.0, None),  # leaves the response behind the step: does not show that it was wrong
        (0, 3, "x=2\ny=5\n#5", 1.0, None),  # never reaches the state
        (8, 0, "#5", 1.0, None),  # starts behind it
        (4, 0, "z=2\n#5", 0.0, None),  # is wrong, too
    ],
)
def test_pairs_share_the_text_up_to_the_worst_step(
    state: int, shared: int, text: str, reward: float, chosen: str | None
) -> None:
    [response] = responses(WRONG | {"continuations": [continuation(state, shared, text, reward)]})
    expected = chosen and {"prompt": "a=1;k?x=1\n", "chosen": chosen, "rejected": "y=2\n#3"}
    assert prefix_pair(response, ExportSettings()) == expected


def test_a_wrong_response_with_a_prefix_pair_is_in_no_whole_pair() -> None:
    entry = WRONG | {"continuations": [continuation(4, 0, "z=2\n#5", 1.0)]}
    found = responses(entry, row(["r"], 1.0), row(["w"], 0.0))
    exported = export(found, "dpo")
    assert [pair["chosen"] for pair in exported.rows] == ["z=2\n#5", "r"]
    assert exported.notes == ["pairs: 1 share the text up to the worst step, 1 are whole responses"]
    whole = export(found, "dpo", ExportSettings(pairs="whole"))
    assert [(pair["chosen"], pair["rejected"]) for pair in whole.rows] == [("r", "x=1\ny=2\n#3")]
    branch = WRONG | {"continuations": [continuation(4, 0, "z=2\n#5", 1.0, accepted=3)]}
    assert prefix_pair(responses(branch)[0], ExportSettings()) is None  # a replaced token, not a continuation


def test_right_responses_are_written_once() -> None:
    rows = [row(["r"], 1.0), row(["r"], 1.0), row(["w"], 0.0), row(["r"], 1.0) | {"prompt": "b"}, row(["h"], 0.5)]
    exported = export(responses(*rows), "sft")
    assert exported.rows == [{"prompt": "a=1;k?", "completion": "r"}, {"prompt": "b", "completion": "r"}]
    assert exported.left_out == {"the same response again": 1, "not right": 2}
    assert len(export(responses(*rows), "sft", ExportSettings(right=0.5)).rows) == 3


def test_a_real_run_gives_pairs_and_labels(vineppo_run: Path) -> None:
    """Every number follows from the saved continuations, which are those of the values."""
    found = [response for number in (1, 2) for response in responses_of(vineppo_run, number)]
    exported = export(found, "prm", ExportSettings(threshold=0.01))
    complete = [response for response in found if response.finish_reason == "stop"]
    assert len(exported.rows) == len(complete) > 3
    for response, entry in zip(complete, exported.rows, strict=True):
        assert "\n".join(entry["completions"]) == response.text.removesuffix("\n")
        if response.continuations:
            for step, label in zip(response.steps[1:], entry["labels"], strict=False):
                reached = [c for c in response.continuations if c.state <= step.start <= c.state + c.shared]
                assert label == any(c.reward for c in reached)
    for response in found:
        pair = prefix_pair(response, ExportSettings())
        if pair is not None:
            assert pair["prompt"] + pair["rejected"] == response.prompt + response.text


def test_the_split_keeps_problems_together() -> None:
    exported = Exported()
    for i in range(400):
        exported.add((f"train/{i // 2}", "the same prompt"), {"n": i})
    first, second = split_rows(exported, 0.25)
    assert len(first) + len(second) == 400 and 60 <= len(second) <= 140
    assert not {entry["n"] // 2 for entry in first} & {entry["n"] // 2 for entry in second}
    assert split_rows(exported, 0.0) == (exported.rows, [])
    # A larger share keeps what was in the second part before.
    assert {entry["n"] for entry in second} <= {entry["n"] for entry in split_rows(exported, 0.5)[1]}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    run_with(Path("run"), row(LINES, 1.0, [0.5, 0.25, 0.75]), WRONG)
    run_with(Path("run"), row(["later"], 1.0, [1.0]) | {"iteration": 2}, iteration=2)
    return "run"


def test_the_command_writes_jsonl_and_parquet(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", run, "--format", "prm"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run/exports/prm.jsonl: 3 rows",
        "from 3 responses of 2 iterations",
        "labels: 4 of 7 steps are true (57.1%): the value after it is at least 0.5",
        "a Monte-Carlo value is not step correctness (arXiv 2501.07301)",
    ]
    assert Path("run/exports/prm.jsonl").read_bytes().splitlines()[0] == (
        b'{"prompt": "a=1;k?", "completions": ["x=1", "y=2", "#3"], "labels": [false, true, true]}'
    )
    for form in ("prm", "dpo", "sft"):
        assert main(["export", run, "--format", form, "--out", f"{form}.parquet"]) == 0
        assert main(["export", run, "--format", form]) == 0
        text = Path(f"run/exports/{form}.jsonl").read_text()
        assert pq.read_table(f"{form}.parquet").to_pylist() == [json.loads(line) for line in text.splitlines()]
    capsys.readouterr()
    assert main(["export", run, "--format", "sft", "--iterations", "2", "--split", "0.5"]) == 0
    assert "left out" not in capsys.readouterr().out
    sizes = [len(Path(f"run/exports/sft{end}.jsonl").read_text().splitlines()) for end in ("", "-test")]
    assert sorted(sizes) == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no format is given; add --format with one of prm, dpo, sft"),
        (["--format", "ppm"], "--format is 'ppm'; did you mean prm?"),
        (["--format", "sft", "--out", "x.csv"], "give the name of a file that ends in .jsonl or .parquet"),
        (["--format", "sft", "--threshold", "0.1"], "--threshold is for prm, not for sft; remove it"),
        (
            ["--format", "prm", "--labels", "value", "--tolerance", "0"],
            "--tolerance has no meaning with --labels value",
        ),
        (["--format", "prm", "--threshold", "0.1", "--tolerance", "0"], "--threshold has no meaning with --labels adv"),
        (["--format", "prm", "--tolerance", "-1"], "--tolerance is -1; it must be at least 0"),
        (["--format", "dpo", "--right", "nan"], "--right is 'nan'; it must be a number"),
        (["--format", "dpo", "--right", "0"], "--right must be larger"),
        (["--format", "dpo", "--pairs", "all"], "allowed: auto, prefix, whole"),
        (["--format", "sft", "--split", "1"], "--split is 1; it must be at least 0 and below 1"),
        (["--format", "sft", "--iterations", "x"], "give a number such as 5, or a range such as 5-9"),
        (["--format", "sft", "--iterations", "7-9"], "none of them is saved; saved are 1 to 2"),
        (["--format", "sft", "--right", "2"], "has nothing to export as sft: of 3 responses are 3 not right"),
    ],
)
def test_mistakes_are_one_line(
    run: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", run, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not Path("run/exports").exists()


def test_damaged_iterations_are_left_out_and_named(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole = Path("run/rollouts/000002.parquet").read_bytes()
    Path("run/rollouts/000002.parquet").write_bytes(whole[: len(whole) // 2])
    Path("run/rollouts/000003.parquet").write_bytes(b"PAR1")
    assert main(["export", run, "--format", "prm"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["run/exports/prm.jsonl: 2 rows", "from 2 responses of 1 iteration"]
    for line, number in zip(lines[2:4], (2, 3), strict=True):
        assert line.startswith(f"left out: run/rollouts/00000{number}.parquet is damaged or not a file of rollouts (")
    assert lines[4] == "left out: 2 iterations that cannot be read"
    # The rows are those of the other iteration alone.
    written = Path("run/exports/prm.jsonl").read_text()
    assert main(["export", run, "--format", "prm", "--iterations", "1"]) == 0
    assert "left out" not in capsys.readouterr().out and Path("run/exports/prm.jsonl").read_text() == written
    assert main(["export", run, "--format", "sft", "--right", "2"]) == 2
    assert "of 2 responses are 2 not right; 2 iterations cannot be read; choose" in capsys.readouterr().err
    assert main(["export", run, "--format", "prm", "--iterations", "2-3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run has no iteration that can be read: run/rollouts/000002.parquet is damaged")
    assert error.count("\n") == 1 and Path("run/exports/prm.jsonl").read_text() == written


def test_a_file_needs_out_and_a_directory_must_be_writable(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run/rollouts/000001.parquet", "--format", "sft"]) == 2
    assert "add --out FILE" in capsys.readouterr().err
    assert main(["export", run, "--format", "sft", "--out", "run/config.yaml/x.jsonl"]) == 2
    assert "run/config.yaml/x.jsonl cannot be written" in capsys.readouterr().err
