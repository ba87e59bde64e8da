"""`eval.greedy`: greedy accuracy before and after training, against `vineppo eval` and against temperature 0."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import small_config, weights_hash
from vineppo.config.schema import EvalConfig, EvalSpec, ModelConfig, RunConfig, TaskConfig
from vineppo.training.evaluate import evaluate_model
from vineppo.training.loop import resume, train

PROBLEMS = 64


def config_of(run: Path, iterations: int = 2, **evaluation: object):
    """A short run with 64 problems in the evaluations before and after training."""
    settings = EvalConfig(every=0, num_problems=8, final_num_problems=PROBLEMS, **evaluation)
    return small_config(run, "grpo", eval=settings, run=RunConfig(dir=str(run), iterations=iterations))


def greedy_of(path: str) -> float:
    """The greedy accuracy of a model according to `vineppo eval`, on the same problems."""
    spec = EvalSpec(
        model=ModelConfig(path=path),
        task=TaskConfig(num_steps=3),
        split="validation",
        num_problems=PROBLEMS,
        num_samples=1,
        max_new_tokens=40,
    )
    return evaluate_model(spec)["greedy"]["mean"]


def test_greedy_accuracies_are_those_of_eval_and_change_nothing_else(tmp_path: Path) -> None:
    summary = train(config_of(tmp_path / "on", greedy=True))
    assert summary["greedy_before"]["mean"] == greedy_of("embedded:judgement") != summary["accuracy_before"]["mean"]
    assert summary["greedy_after"]["mean"] == greedy_of(str(tmp_path / "on" / "final"))
    assert json.loads((tmp_path / "on" / "summary.json").read_text())["greedy_after"] == summary["greedy_after"]
    without = train(config_of(tmp_path / "off"))
    assert without["greedy_before"] is None and without["greedy_after"] is None
    assert without["accuracy_after"] == summary["accuracy_after"]
    assert weights_hash(tmp_path / "on" / "final") == weights_hash(tmp_path / "off" / "final")


def test_sampling_at_temperature_0_is_greedy(tmp_path: Path) -> None:
    summary = train(config_of(tmp_path / "run", greedy=True, temperature=0.0, num_samples=2))
    assert summary["greedy_before"] == summary["accuracy_before"]
    assert summary["greedy_after"] == summary["accuracy_after"]


def test_a_resumed_run_keeps_the_greedy_accuracy_of_its_start(tmp_path: Path) -> None:
    first = train(config_of(tmp_path / "run", greedy=True))
    longer = resume(config_of(tmp_path / "run", iterations=3, greedy=True))
    assert longer["greedy_before"] == first["greedy_before"]


def test_without_a_final_evaluation_nothing_is_decoded(tmp_path: Path) -> None:
    settings = EvalConfig(every=0, final_num_problems=0, greedy=True)
    summary = train(small_config(tmp_path / "run", "grpo", eval=settings))
    assert summary["greedy_before"] is None and summary["greedy_after"] is None
