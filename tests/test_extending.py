"""The examples of docs/extending.md: its algorithm and splitter work with every command and the trainer."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import Field, PositiveInt

import vineppo
from tests.helpers import ROOT
from vineppo.cli.main import main
from vineppo.config.load import settings_from_layers
from vineppo.config.schema import Config, LearnerConfig, with_sections
from vineppo.config.settings import Settings
from vineppo.training.configure import build_config
from vineppo.types import UserError

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
    assert [name for name, _ in modules] == ["late_grpo.py", "clauses.py"]
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
    code = [line for line in Path("late_grpo.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 28


def test_train(page: str) -> None:
    arguments = ["--algorithm", "late_grpo:late_grpo", "--late_grpo.decay", "0.5", "--run.dir", "runs/mine"]
    assert main(["train", "judgement", *SMALL, "--run.iterations", "1", *arguments]) == 0
    config = Path("runs/mine/config.yaml").read_text()
    assert "algorithm: late_grpo:late_grpo" in config and "late_grpo:\n  decay: 0.5" in config
    assert "vineppo:" not in config.replace("late_grpo:late_grpo", "")
    assert json.loads(Path("runs/mine/summary.json").read_text())["label"] == "Late GRPO"
    for row in rows(Path("runs/mine")):
        advantages = row["token_advantages"]
        assert len(advantages) == row["num_tokens"]
        for earlier, later in itertools.pairwise(advantages):
            assert earlier == pytest.approx(0.5 * later, rel=1e-6)
    assert main(["train", "--resume", "runs/mine"]) == 2  # refused because the run is finished


@pytest.mark.real
@pytest.mark.usefixtures("drawn_figures")
def test_compare(page: str) -> None:
    arguments = ["--algorithms", "late_grpo:late_grpo,grpo", "--late_grpo.decay", "0.9", "--seeds", "1"]
    command = ["compare", "judgement", *SMALL, *arguments, "--budget", "updates=2", "--out", "runs/compared"]
    assert main(command) == 0
    result = json.loads(Path("runs/compared/compare.json").read_text())
    assert list(result["arms"]) == ["late_grpo", "grpo"] and result["missing"] == []
    assert result["arms"]["late_grpo"]["label"] == "Late GRPO"
    assert Path("runs/compared/accuracy_over_updates.png").exists()
    assert "| late_grpo | 1 of 1 |" in Path("runs/compared/table.md").read_text()


RECIPE = """
algorithm: late_grpo:late_grpo
rollouts: {group_size: 4}
late_grpo: {decay: 0.9}
overrides:
  late_grpo: {learner.lr: 2.0e-4}
  other:algorithm: {learner.lr: 5.0e-4}
  grpo: {learner.lr: 3.0e-4}
"""
SHARED_RECIPE = """
rollouts: {group_size: 4}
overrides:
  late_grpo:late_grpo: {late_grpo.decay: 0.9, learner.lr: 2.0e-4}
"""


def test_a_recipe_of_a_users_algorithm_serves_other_algorithms_too(page: str) -> None:
    recipe = yaml.safe_load(RECIPE)
    own: Any = build_config(recipe)
    assert own.late_grpo.decay == 0.9 and own.learner.lr == 2e-4
    other = build_config(recipe, "grpo")
    assert not hasattr(other, "late_grpo") and other.learner.lr == 3e-4
    with pytest.raises(UserError, match=r"late_grpo.decay on the command line is a setting of late_grpo"):
        build_config(recipe, "grpo", {"late_grpo.decay": "0.5"})
    shared: Any = build_config(yaml.safe_load(SHARED_RECIPE), "late_grpo:late_grpo")
    assert shared.late_grpo.decay == 0.9 and shared.learner.lr == 2e-4
    assert build_config(yaml.safe_load(SHARED_RECIPE), "grpo").learner.lr == LearnerConfig().lr


def test_two_algorithms_of_the_same_name(page: str) -> None:
    source = Path("late_grpo.py").read_text()
    Path("second.py").write_text(source.replace("    decay: float", "    extra: int = 0\n    decay: float"))
    second: Any = build_config(yaml.safe_load(RECIPE), "second:late_grpo", {"late_grpo.extra": "5"})
    assert (second.late_grpo.extra, second.late_grpo.decay, second.learner.lr) == (5, 0.9, 2e-4)


@pytest.mark.real
@pytest.mark.usefixtures("drawn_figures")
def test_compare_with_a_recipe_of_a_users_algorithm(page: str) -> None:
    """The compared algorithm has the name of the recipe's one, and a label with characters of Markdown and TeX."""
    Path("mine.yaml").write_text(RECIPE)
    source = Path("late_grpo.py").read_text().replace('"Late GRPO"', '"a|b $x{[/x]"')
    Path("odd_label.py").write_text(source)
    arguments = ["--algorithms", "grpo,odd_label:late_grpo", "--late_grpo.decay", "0.7", "--seeds", "1"]
    command = ["compare", "mine.yaml", *SMALL, *arguments, "--budget", "updates=1", "--out", "out"]
    assert main(command) == 0
    assert "decay: 0.7" in Path("out/runs/late_grpo-seed0/config.yaml").read_text()
    assert "decay" not in Path("out/runs/grpo-seed0/config.yaml").read_text().replace("weight_decay", "").replace(
        "  decay: constant", ""
    )
    assert r"updates to a\|b $x{[/x]'s best" in Path("out/table.md").read_text().splitlines()[0]


def test_evaluation_of_a_run_does_not_need_its_algorithm(page: str) -> None:
    arguments = ["--algorithm", "late_grpo:late_grpo", "--run.dir", "mine", "--run.iterations", "1"]
    assert main(["train", "judgement", *SMALL, *arguments]) == 0
    Path("late_grpo.py").unlink()
    sys.modules.pop("late_grpo", None)
    assert main(["eval", "mine", "--num_problems", "4", "--num_samples", "1"]) == 0


def test_a_configuration_with_a_users_section_can_be_pickled(page: str) -> None:
    config = build_config({}, "late_grpo:late_grpo", {"rollouts.group_size": "4", "late_grpo.decay": "0.9"})
    for original in (config, build_config({}, "reinforce"), Config()):
        copied = pickle.loads(pickle.dumps(original))
        assert copied == original and type(copied) is type(original)


def test_a_resumed_run_of_a_users_algorithm_continues_to_the_same_bit(page: str) -> None:
    common = ["train", "judgement", *SMALL, "--algorithm", "late_grpo:late_grpo", "--run.checkpoint_every", "1"]
    assert main([*common, "--run.iterations", "2", "--run.dir", "whole"]) == 0
    shutil.copytree("whole", "part")
    for path in ("part/summary.json", "part/final"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    shutil.rmtree("part/checkpoints/000002", ignore_errors=True)
    assert main(["train", "--resume", "part"]) == 0
    weights = [Path(run, "final", "model.safetensors").read_bytes() for run in ("whole", "part")]
    assert weights[0] == weights[1]


class Odd(Settings):
    """Settings with every kind of field that a user may choose."""

    width: int = Field(gt=0)
    """A setting without a default."""
    limit: float | None = None
    names: list[str] = []
    pair: tuple[float, float] = (0.0, 1.0)
    sizes: list[PositiveInt] = []
    on: bool = False


def test_settings_of_every_kind() -> None:
    cls = with_sections(odd=Odd)
    build: Any = lambda **values: settings_from_layers(cls, [({"odd": values}, "in mine.yaml")])  # noqa: E731
    made = build(width=1, limit=None, names="a,b", pair=[1, 2]).odd
    assert (made.limit, made.names, made.pair) == (None, ["a", "b"], (1.0, 2.0))
    assert build(width=1, limit="0.5").odd.limit == 0.5
    for values, message in {
        "{}": "odd.width is not set; it must be a whole number",
        "{width: 1, pair: [true, 1]}": "it must be a number",
        "{width: 1, limit: true}": "odd.limit is True in mine.yaml; it must be a number",
        "{width: null}": "odd.width has no value in mine.yaml",
        "{width: 1, sizes: [0]}": "odd.sizes is 0 in mine.yaml; Input should be greater than 0",
        "{width: 1, names: [1]}": "it must be text; put it in quotes",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            build(**yaml.safe_load(values))
    with pytest.raises(UserError, match="unknown key "):
        settings_from_layers(cls, [({"": {"x": 1}, "odd": {"width": 1}}, "in mine.yaml")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "check"}, "algorithm name 'check': it must be an identifier"),
        ({"name": "overrides"}, "algorithm name 'overrides'"),
        ({"name": "_mine"}, "algorithm name '_mine'"),
        ({"name": "copy"}, "algorithm name 'copy'"),
        ({"name": 3}, "algorithm name 3"),
        ({"label": ""}, "label is ''; it must be a text of one line that is not empty"),
        ({"label": "_mine"}, "label is '_mine'"),
        ({"colour": 3}, "colour is 3"),
        ({"check": 3}, "check is 3; it must be a function"),
        ({"colour": "red"}, "colour is 'red'; it must be of the form #RRGGBB, or empty"),
        ({"build": 3}, "build is 3; it must be a function"),
        ({"settings": dict}, "settings must be a subclass of Settings"),
        ({"needs_critic": True}, "settings must be a subclass of CriticConfig because needs_critic is true"),
    ],
)
def test_algorithms_that_cannot_be_built(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        arguments: dict[str, Any] = {"name": "mine", "label": "Mine", "build": print, **values}
        vineppo.Algorithm(**arguments)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[]", "the credit function of bad returned (list); it must return a pair"),
        (
            "([training_sample(r, 1.0) for g in groups for r in g.rollouts], {})",
            "training_sample got 1.0; it needs a list",
        ),
        ("([1], {})", "the credit function of bad returned a int among its training samples"),
        (
            "([training_sample(r, [float('nan')] * len(r.response_ids)) for g in groups for r in g.rollouts], {})",
            "training sample 0 of the credit function has nan in advantages; allowed: finite numbers",
        ),
    ],
)
def test_what_a_credit_function_returns_is_checked(
    page: str, returned: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f"""
from vineppo import Algorithm, training_sample
bad = Algorithm("bad", "Bad | $ bad", lambda settings, parts: lambda groups, iteration: {returned})
"""
    Path("bad_credit.py").write_text(source)
    sys.modules.pop("bad_credit", None)
    assert main(["train", "judgement", *SMALL, "--algorithm", "bad_credit:bad", "--run.iterations", "1"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_splitter(page: str) -> None:
    arguments = ["--vineppo.splitter", "clauses:cut", "--vineppo.num_mc_rollouts", "2", "--run.dir", "runs/split"]
    assert main(["train", "judgement", *SMALL, "--run.iterations", "1", *arguments]) == 0
    assert all(row["step_ends"] == [row["num_tokens"]] for row in rows(Path("runs/split")))  # chains have no commas


def test_the_trainer(page: str) -> None:
    def reward(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        return [float(len(text)) % 2 for text in completions]

    args = vineppo.VinePPOConfig(
        output_dir="runs/trainer",
        algorithm="late_grpo:late_grpo",
        settings={"late_grpo.decay": 0.9},
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
        ("late_gpro:x", "algorithm 'late_gpro:x': no module 'late_gpro'"),
        ("late_grpo:late_gpro", "did you mean 'late_grpo'?"),
        ("late_grpo:build", "algorithm 'late_grpo:build' is a function; it must be a vineppo.Algorithm"),
        (
            "grp",
            "algorithm is 'grp'; did you mean grpo or grpo_lambda? allowed: vineppo, ppo, grpo, rloo, reinforce, "
            "counterfactual, tree, tempo, grpo_lambda, spo_chain, or module:object",
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
    assert main(["train", "--algorithm", "late_grpo:late_grpo", "--late_grpo.decai", "0.5"]) == 2
    assert "unknown key late_grpo.decai on the command line; did you mean late_grpo.decay?" in capsys.readouterr().err
