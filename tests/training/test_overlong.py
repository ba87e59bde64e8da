"""Prompts that do not fit into the model's context are found before the first iteration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import small_config
from vineppo.cli.main import main
from vineppo.config.schema import Config, EvalConfig, RolloutConfig, RunConfig, TaskConfig
from vineppo.config.settings import replace
from vineppo.training.loop import train
from vineppo.training.parts import build_parts
from vineppo.types import UserError

SHORT, LONG = "a=7;b=a*3;b?\n", "a=7;b=a*3;" * 60 + "b?\n"


def config_of(tmp_path: Path, lines: dict[int, str], overlong: str = "error") -> Config:
    """Return the configuration of a run on a file of 1,000 problems, with other prompts in some lines."""
    rows = [{"prompt": lines.get(number, SHORT), "answer": "1"} for number in range(1, 1001)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return small_config(
        tmp_path / "run",
        "grpo",
        task=TaskConfig(name="dataset", train_path=str(path), rewards=("exact",), overlong=overlong),
        rollouts=RolloutConfig(num_problems=2, group_size=4, max_new_tokens=40),
        eval=EvalConfig(every=1, num_problems=4, final_num_problems=0),
        run=RunConfig(dir=str(tmp_path / "run"), iterations=1),
    )


def test_an_overlong_prompt_is_reported_with_its_line_before_the_run(tmp_path: Path) -> None:
    """Case 16. The last 100 of 1,000 rows are the validation problems."""
    config = config_of(tmp_path, {613: LONG})
    with pytest.raises(UserError) as error:
        train(config)
    assert str(error.value) == (
        f"{tmp_path}/train.jsonl line 613: the prompt has 603 tokens; with a response of 40 (max_new_tokens) that is "
        "more than the model's context of 512 (1 of 900 train problems are too long); shorten the prompts, lower "
        "max_new_tokens, or leave such problems out with task.overlong drop"
    )
    assert not (tmp_path / "run").exists()


def test_overlong_prompts_are_left_out_and_counted(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Case 16. The other problems keep their ids, from which their seeds are derived."""
    config = config_of(tmp_path, {1: LONG, 613: LONG, 901: LONG}, overlong="drop")
    parts = build_parts(config)
    assert (parts.task.size("train"), parts.task.size("validation")) == (898, 99)
    ids = [parts.task.problem("train", index).id for index in (0, 610, 611, 897)]
    assert ids == ["train/1", "train/611", "train/613", "train/899"]
    assert parts.task.problem("validation", 0).id == "validation/1"
    assert [str(warning.message) for warning in recwarn if "overlong" in str(warning.message)] == [
        f"task.overlong drop: {count} {split} problems are left out, because their prompts are too long for the "
        f"model's context of 512 tokens (the first: {tmp_path}/train.jsonl line {line})"
        for count, split, line in (("2 of 900", "train", 1), ("1 of 100", "validation", 901))
    ]
    assert train(config)["problems_left_out"] == {"train": 2, "validation": 1}


def test_only_used_validation_problems_are_refused(tmp_path: Path) -> None:
    """The evaluation uses the first four of the 100 validation problems."""
    build_parts(config_of(tmp_path, {905: LONG}))
    with pytest.raises(UserError, match=r"train\.jsonl line 904: .*1 of 4 validation problems are too long"):
        build_parts(config_of(tmp_path, {904: LONG}))


def test_if_all_prompts_are_overlong_nothing_is_dropped(tmp_path: Path) -> None:
    config = config_of(tmp_path, {}, overlong="drop")
    config = replace(config, rollouts=replace(config.rollouts, max_new_tokens=510))
    with pytest.raises(UserError, match=r"900 of 900 train problems are too long\); .*, or use another model"):
        build_parts(config)


def test_a_generated_task_has_no_problems_to_drop(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task.overlong", "drop"]) == 2
    message = "task.overlong is drop, but task.name is chain, which generates its problems; remove task.overlong"
    assert capsys.readouterr().err == f"error: {message}\n"


def test_eval_reports_an_overlong_prompt_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, {3: LONG})
    task = ["--task.name", "dataset", "--task.train_path", config.task.train_path, "--split", "train"]
    assert main(["eval", "embedded:judgement", *task, "--num_problems", "5"]) == 2
    assert f"error: {tmp_path}/train.jsonl line 3: the prompt has 603 tokens; " in capsys.readouterr().err
