"""The commands that measure credit, on the embedded model with tiny settings, and their user errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vineppo.cli.main import main

TINY = ["--task.num_steps", "3", "--max_new_tokens", "48", "--num_problems", "3", "--group_size", "2"]


@pytest.mark.usefixtures("drawn_figures")
def test_values_writes_tables_json_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "values"
    arguments = ["--gold", "8", "--k", "1,2", "--choices", "2", "--out", str(out)]
    assert main(["values", "embedded:wording", *TINY, *arguments]) == 0
    printed = capsys.readouterr()
    assert "| exact values" in printed.out and "gold: " in printed.err
    result = json.loads((out / "values.json").read_text())
    labels = ["fresh MC, K = 1", "reuse, K = 1", "fresh MC, K = 2", "reuse, K = 2", "TEMPO", "group mean"]
    assert list(result["estimates"]) == labels
    assert result["num_problems"] == 3 and result["num_states"] >= 9 and result["critic"] == ""
    assert {path.name for path in out.iterdir()} == {"values.json", "values.md", "calibration.png", "depth.png"}


def test_the_same_command_gives_the_same_numbers_and_another_seed_others(tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, object]:
        arguments = ["--gold", "4", "--k", "1", "--choices", "0", "--seed", str(seed), "--out", str(tmp_path / name)]
        assert main(["values", "embedded:wording", *TINY, *arguments]) == 0
        result = json.loads((tmp_path / name / "values.json").read_text())
        return {key: value for key, value in result.items() if key not in ("seconds", "command")}

    first = run("a", 0)
    assert run("b", 0) == first
    assert run("c", 1) != first


@pytest.mark.usefixtures("drawn_figures")
def test_blame_and_variance_write_their_results(tmp_path: Path) -> None:
    blame = ["--k", "2", "--score", "4", "--which", "all", "--out", str(tmp_path / "blame")]
    assert main(["blame", "embedded:wording", *TINY, *blame]) == 0
    result = json.loads((tmp_path / "blame" / "blame.json").read_text())
    assert set(result["difference"]) == {"mean", "low", "high"} and result["checked"]["responses"] == 3
    variance = ["--gold", "4", "--k", "1,2", "--repeats", "2", "--out", str(tmp_path / "variance")]
    assert main(["variance", "embedded:wording", *TINY, *variance]) == 0
    result = json.loads((tmp_path / "variance" / "variance.json").read_text())
    assert result["num_responses"] == 6 and "all" in result["by_kind"]
    assert (tmp_path / "variance" / "variance.md").read_text().startswith("# Which K?")


def test_the_token_limit_reduces_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gold", "64", "--max_tokens", "1000", "--choices", "0", "--out", str(tmp_path)]
    assert main(["values", "embedded:wording", *TINY, *arguments]) == 0
    assert "2 of 3 problems" in capsys.readouterr().err
    assert json.loads((tmp_path / "values.json").read_text())["num_problems"] == 2


def test_variance_of_a_model_that_is_never_right_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(f'{{"prompt": "a={n};b=a+3;b?\\n", "answer": "none"}}\n' for n in range(3)))
    paths = [word for split in ("train", "validation", "test") for word in (f"--task.{split}_path", str(problems))]
    sizes = ["--num_problems", "3", "--group_size", "2", "--gold", "4", "--k", "1", "--max_new_tokens", "24"]
    assert main(["variance", "embedded:wording", "--task.name", "dataset", *paths, *sizes, "--out", str(tmp_path)]) == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith(
            "error: all responses and continuations have the same reward, so no advantage varies; give another model"
        )
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["values"], "no MODEL is given"),
        (["blame", "embedded:wording", "--which", "some"], "which is 'some'"),
        (["values", "embedded:wording", "--k", "0,3"], "give numbers of at least 1, such as 1,3,9"),
        (["values", "embedded:wording", "--responses", "9"], "responses must be at most group_size"),
        (["variance", "embedded:wording", "--model.path", "x"], "give the model as the argument MODEL"),
        (["values", "embedded:wording", "--critic", "nowhere"], "nowhere"),
        (["scaling", "--held_out", "11"], "it must be one of steps"),
        (["scaling", "--steps", "10,20", "--held_out", "20"], "steps is 10,20; give at least four different numbers"),
        (["scaling", "--gpus", "v100"], "gpus contains v100; allowed: t4"),
        (["values", "embedded:wording", "--splitter", "lines"], "unknown splitter 'lines'"),
    ],
)
def test_mistakes_are_answered_in_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
