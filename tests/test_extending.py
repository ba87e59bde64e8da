"""The examples of docs/extending.md: its algorithm and splitter work with every command and the trainer."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import vineppo
from tests.helpers import ROOT
from vineppo.cli.main import main

SMALL = [
    "--task.num_steps",
    "2",
    "--rollouts.num_problems",
    "2",
    "--rollouts.group_size",
    "4",
    "--rollouts.max_new_tokens",
    "30",
    "--learner.minibatch_size",
    "8",
    "--eval.every",
    "1",
    "--eval.num_problems",
    "4",
    "--eval.final_num_problems",
    "4",
]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the two modules of the page to the current directory; returns the text of the page."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    modules = re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in modules] == ["grpo_lambda.py", "clauses.py"]
    for name, source in modules:
        (tmp_path / name).write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return text


def rows(run: Path) -> list[dict[str, Any]]:
    table: list[dict[str, Any]] = pq.read_table(run / "rollouts" / "000001.parquet").to_pylist()
    return table


def test_the_algorithm_is_about_25_lines(page: str) -> None:
    code = [line for line in Path("grpo_lambda.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 28


def test_train(page: str) -> None:
    arguments = ["--algorithm", "grpo_lambda:grpo_lambda", "--grpo_lambda.decay", "0.5", "--run.dir", "runs/mine"]
    assert main(["train", "judgement", *SMALL, "--run.iterations", "1", *arguments]) == 0
    config = Path("runs/mine/config.yaml").read_text()
    assert "algorithm: grpo_lambda:grpo_lambda" in config and "grpo_lambda:\n  decay: 0.5" in config
    assert "vineppo:" not in config.replace("grpo_lambda:grpo_lambda", "")
    assert json.loads(Path("runs/mine/summary.json").read_text())["label"] == "GRPO-lambda"
    for row in rows(Path("runs/mine")):
        advantages = row["token_advantages"]
        assert len(advantages) == row["num_tokens"]
        for earlier, later in itertools.pairwise(advantages):
            assert earlier == pytest.approx(0.5 * later, rel=1e-6)
    assert main(["train", "--resume", "runs/mine"]) == 2  # refused because the run is finished


def test_compare(page: str) -> None:
    arguments = ["--algorithms", "grpo_lambda:grpo_lambda,grpo", "--grpo_lambda.decay", "0.9", "--seeds", "1"]
    command = ["compare", "judgement", *SMALL, *arguments, "--budget", "updates=2", "--out", "runs/compared"]
    assert main(command) == 0
    result = json.loads(Path("runs/compared/compare.json").read_text())
    assert list(result["algorithms"]) == ["grpo_lambda", "grpo"] and result["missing"] == []
    assert result["algorithms"]["grpo_lambda"]["label"] == "GRPO-lambda"
    assert Path("runs/compared/accuracy_over_updates.png").exists()
    assert "| grpo_lambda | 1 of 1 |" in Path("runs/compared/table.md").read_text()


def test_the_splitter(page: str) -> None:
    arguments = ["--vineppo.splitter", "clauses:cut", "--vineppo.num_mc_rollouts", "2", "--run.dir", "runs/split"]
    assert main(["train", "judgement", *SMALL, "--run.iterations", "1", *arguments]) == 0
    assert all(row["step_ends"] == [row["num_tokens"]] for row in rows(Path("runs/split")))  # chains have no commas


def test_the_trainer(page: str) -> None:
    def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        return [float(len(text)) % 2 for text in completions]

    args = vineppo.VinePPOConfig(
        output_dir="runs/trainer",
        algorithm="grpo_lambda:grpo_lambda",
        settings={"grpo_lambda.decay": 0.9},
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        max_steps=1,
        use_cpu=True,
        gradient_checkpointing=False,
    )
    dataset = [{"prompt": "a=1;b=a+1;b?\n", "answer": "2"}] * 4
    trainer = vineppo.VinePPOTrainer(str(embedded()), reward, args, dataset)
    assert trainer.train().global_step == 1
    assert "decay: 0.9" in Path("runs/trainer/config.yaml").read_text()


def embedded() -> Path:
    return Path(vineppo.__file__).parent / "models" / "judgement"


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ("grpo_lamda:x", "algorithm 'grpo_lamda:x': no module 'grpo_lamda'"),
        ("grpo_lambda:grpo_lamda", "did you mean 'grpo_lambda'?"),
        ("grpo_lambda:build", "algorithm 'grpo_lambda:build' is a function; it must be a vineppo.Algorithm"),
        (
            "grp",
            "algorithm is 'grp'; did you mean grpo? allowed: vineppo, ppo, grpo, rloo, reinforce, or module:object",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(
    page: str, algorithm: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "judgement", "--algorithm", algorithm]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_misspelt_setting_of_a_users_algorithm(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--algorithm", "grpo_lambda:grpo_lambda", "--grpo_lambda.decai", "0.5"]) == 2
    assert (
        "unknown key grpo_lambda.decai on the command line; did you mean grpo_lambda.decay?" in capsys.readouterr().err
    )
