"""Complete runs: their files, resuming them, and learning with every algorithm."""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import SilentReporter, small_config, weights_hash
from vineppo.config.load import config_to_dict
from vineppo.config.schema import (
    Config,
    EvalConfig,
    EvalSpec,
    KLConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
)
from vineppo.config.settings import replace
from vineppo.credit import BUILT_IN
from vineppo.credit.vineppo import VinePPOSettings
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler
from vineppo.sampling.version import StaleWeights
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.training.loop import resume, train
from vineppo.types import Sampler, UserError, Weights


class Crash(Exception):
    """Simulates a crash of the machine."""


class CrashAt(SilentReporter):
    """A reporter that crashes the run after the metrics of an iteration are logged and before its checkpoint."""

    def __init__(self, iteration: int):
        self.at = iteration

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        if metrics["iteration"] == self.at:
            raise Crash


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_seconds(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("seconds/")}


@pytest.mark.parametrize("algorithm", BUILT_IN)
def test_a_run_writes_all_its_files(tmp_path: Path, algorithm: str, request: pytest.FixtureRequest) -> None:
    if algorithm == "vineppo":
        request.getfixturevalue("drawn_figures")
    run = tmp_path / "run"
    summary = train(small_config(run, algorithm), recipe="small")
    lines = read_lines(run)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["updates"] for line in lines] == [0, 2, 4, 6, 8]  # 16 rollouts, minibatches of 8, one epoch
    assert summary["updates"] == 8 and summary["finish_reason"] == "iterations" and summary["algorithm"] == algorithm
    assert {"mean", "low", "high"} == set(summary["accuracy_before"]) == set(summary["accuracy_after"])
    assert ("eval/accuracy" in lines[2]) and ("eval/accuracy" not in lines[1])
    assert json.loads((run / "summary.json").read_text()) == summary

    rows = [row for i in range(1, 5) for row in pq.read_table(run / f"rollouts/{i:06d}.parquet").to_pylist()]
    assert len(rows) == 4 * 16
    # A token that several leaves of a tree share is sampled once and trained once.
    shared = algorithm == "tree"
    assert (sum(row["num_tokens"] for row in rows) > lines[-1]["tokens/rollouts"]) == shared
    assert shared or sum(row["num_tokens"] for row in rows) == lines[-1]["tokens/rollouts"]
    assert lines[-1]["tokens/trained"] == lines[-1]["tokens/rollouts"] == summary["tokens"]["rollouts"]
    assert (lines[-1]["tokens/mc"] > 0) == (algorithm in ("vineppo", "counterfactual", "spo_chain"))
    assert ("value/explained_variance" in lines[1]) == (algorithm == "ppo")
    for row in rows:
        assert len(row["token_advantages"]) == len(row["sampler_logprobs"]) == row["num_tokens"]
        if algorithm == "vineppo":
            assert "".join(row["step_texts"]) == row["response"]
            total = row["values"][0] + sum(row["step_advantages"])
            assert math.isclose(total, row["reward"], abs_tol=1e-12)  # telescoping

    model = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert model(**tokenizer("a=7;b=a*3;b?\n", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    assert {path.name for path in (run / "plots").iterdir()} == {"accuracy.png", "tokens.png", "seconds.png"}
    drawn = all(path.stat().st_size > 10_000 for path in (run / "plots").iterdir())
    assert drawn == (algorithm == "vineppo") and (run / "config.yaml").exists()


CHEAPER_SETTINGS = {
    "bisection": VinePPOSettings(num_mc_rollouts=3, reuse=False, bisection=True),
    "bisection-reuse": VinePPOSettings(num_mc_rollouts=3, bisection=True),
}


@pytest.mark.parametrize("name", CHEAPER_SETTINGS)
def test_bisection_trains_and_resumes_with_the_same_bits(tmp_path: Path, name: str) -> None:
    run = RunConfig(dir=str(tmp_path / "whole"), iterations=2, checkpoint_every=1)
    whole = small_config(tmp_path / "whole", vineppo=CHEAPER_SETTINGS[name], run=run)
    train(whole)
    cut = replace(whole, run=replace(run, dir=str(tmp_path / "cut")))
    with pytest.raises(Crash):
        train(cut, reporter=CrashAt(2))
    resume(cut)
    assert weights_hash(tmp_path / "cut/final") == weights_hash(tmp_path / "whole/final")
    rows = [row for i in (1, 2) for row in pq.read_table(tmp_path / f"whole/rollouts/{i:06d}.parquet").to_pylist()]
    steps = sum(row["response"].count("\n") for row in rows)
    measured = sum(len(row["values"]) for row in rows)
    assert all("".join(row["step_texts"]) == row["response"] for row in rows)
    assert measured < steps
    line = read_lines(tmp_path / "whole")[-1]
    assert line["credit/rounds"] >= 2 and line["credit/measured_share"] < 1
    assert telescopes(rows)


def telescopes(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether V(s_0) plus the step advantages equals the reward in every row."""
    return all(
        math.isclose(row["values"][0] + sum(row["step_advantages"]), row["reward"], abs_tol=1e-12) for row in rows
    )


@pytest.mark.parametrize("algorithm", ["vineppo", "ppo", "tree"])
def test_truth_7_a_resumed_run_has_the_same_bits(tmp_path: Path, algorithm: str) -> None:
    learner = LearnerConfig(lr=1e-4, minibatch_size=8, decay="linear", warmup_updates=3, kl=KLConfig(coefficient=1e-3))
    whole = small_config(tmp_path / "whole", algorithm, learner=learner)
    train(whole)
    run = RunConfig(dir=str(tmp_path / "cut"), iterations=4, checkpoint_every=2)
    cut = small_config(tmp_path / "cut", algorithm, learner=learner, run=run)
    with pytest.raises(Crash):
        train(cut, reporter=CrashAt(3))
    assert [line["iteration"] for line in read_lines(tmp_path / "cut")] == [0, 1, 2, 3]
    resume(cut)
    assert weights_hash(tmp_path / "cut/final") == weights_hash(tmp_path / "whole/final")
    assert [without_seconds(x) for x in read_lines(tmp_path / "cut")] == [
        without_seconds(x) for x in read_lines(tmp_path / "whole")
    ]


@dataclass
class CopyingEngine(WrappedSampler):
    """Samples from a copy of the policy that only `update_weights` changes, as an engine in another process does."""

    copy: Policy

    def update_weights(self, version: int, weights: Weights) -> None:
        state = {name: tensor.clone() for name, tensor in weights()}
        self.copy.model.load_state_dict(state, strict=True)
        self.sampler.update_weights(version, weights)


def copying_engine(config: Config, policy: Policy) -> Sampler:
    copy = Policy(deepcopy(policy.model), policy.codec)
    return CopyingEngine(build_sampler(copy), copy)


def test_an_engine_with_separate_weights_trains_and_resumes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollouts, MC rollouts and evaluation use the learner's weights after each update and after a resume."""

    def config(name: str) -> Config:
        return small_config(
            tmp_path / name,
            eval=EvalConfig(every=1, num_problems=8, final_num_problems=16, temperature=0.5),
            run=RunConfig(dir=str(tmp_path / name), iterations=3, checkpoint_every=1),
        )

    expected = train(config("shared"))
    monkeypatch.setattr(importlib.import_module("vineppo.training.parts"), "build_engine", copying_engine)
    with pytest.raises(Crash):
        train(config("copied"), reporter=CrashAt(2))
    summary = resume(config("copied"))
    assert [without_seconds(x) for x in read_lines(tmp_path / "copied")] == [
        without_seconds(x) for x in read_lines(tmp_path / "shared")
    ]
    assert weights_hash(tmp_path / "copied/final") == weights_hash(tmp_path / "shared/final")
    assert summary["accuracy_after"] == expected["accuracy_after"] != expected["accuracy_before"]

    # If a run is killed in the last evaluation, the resumed run makes no update and only repeats the evaluation.
    (tmp_path / "copied/summary.json").unlink()
    assert resume(config("copied"))["accuracy_after"] == expected["accuracy_after"]
    (tmp_path / "copied/summary.json").unlink()
    monkeypatch.setattr(importlib.import_module("vineppo.training.parts").Parts, "update_sampler", lambda parts: None)
    with pytest.raises(StaleWeights, match="the weights of update 0 and the learner those of update 6"):
        resume(config("copied"))


def test_resume_before_the_first_checkpoint_starts_from_the_beginning(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    with pytest.raises(Crash):
        train(config, reporter=CrashAt(0))
    (tmp_path / "run" / "checkpoints" / ".000000.tmp").mkdir(parents=True)  # killed while writing its first checkpoint
    summary = resume(config)
    assert summary["updates"] == 8 and [line["iteration"] for line in read_lines(tmp_path / "run")] == [0, 1, 2, 3, 4]


def test_runs_with_the_same_seed_have_the_same_weights(tmp_path: Path) -> None:
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = RunConfig(dir=str(tmp_path / name), iterations=2, seed=seed, checkpoint_every=0)
        train(small_config(tmp_path / name, run=run))
        hashes.append(weights_hash(tmp_path / name / "final"))
    assert hashes[0] == hashes[1] != hashes[2]


def start_cli(run: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vineppo", "train", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SMALL = [
    "judgement",
    "--task.num_steps",
    "3",
    "--rollouts.group_size",
    "4",
    "--rollouts.num_problems",
    "4",
    "--rollouts.max_new_tokens",
    "40",
    "--learner.minibatch_size",
    "8",
    "--eval.num_problems",
    "8",
    "--eval.final_num_problems",
    "8",
    "--eval.every",
    "3",
    "--run.iterations",
    "8",
    "--run.checkpoint_every",
    "2",
]


@pytest.mark.faults
def test_a_run_that_is_killed_at_random_times_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    began = time.monotonic()
    assert start_cli(whole, *SMALL, "--run.dir", str(whole)).wait() == 0
    duration = time.monotonic() - began
    rng = random.Random(int(os.environ.get("VINEPPO_KILL_SEED", "0")))
    process = start_cli(cut, *SMALL, "--run.dir", str(cut))
    for _ in range(3):
        while not (cut / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.4) * duration)
        process.kill()
        process.wait()
        if (cut / "summary.json").exists():
            break
        process = start_cli(cut, "--resume", str(cut))
    output = process.communicate()[0]
    assert (cut / "summary.json").exists(), output
    assert weights_hash(cut / "final") == weights_hash(whole / "final")


def test_ctrl_c_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_cli(run, *SMALL, "--run.iterations", "1000", "--run.checkpoint_every", "0", "--run.dir", str(run))
    while not (run / "metrics.jsonl").exists() or len(read_lines(run)) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finish_reason"] == "interrupted" and "Traceback" not in output and "--resume" in output
    last = read_lines(run)[-1]["iteration"]
    assert summary["iterations"] == last and (run / f"checkpoints/{last:06d}").is_dir()


def test_a_tracker_that_does_not_start_leaves_no_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[object]:
        raise UserError("wandb did not start")

    config = small_config(tmp_path / "run", run=RunConfig(dir=str(tmp_path / "run"), iterations=1))
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("vineppo.training.loop"), "build_trackers", refuse)
        with pytest.raises(UserError, match="wandb did not start"):
            train(config)
    assert not (tmp_path / "run").exists()
    summary = train(config)
    assert summary["seconds"] + summary["seconds_eval"] < summary["seconds_total"]
    assert summary["best_validation_accuracy"] is None or summary["best_validation_accuracy"] >= 0


def test_resuming_a_finished_run_is_an_error(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", run=RunConfig(dir=str(tmp_path / "run"), iterations=1))
    train(config)
    with pytest.raises(UserError, match="finished"):
        resume(config)


def test_limits_end_a_run(tmp_path: Path) -> None:
    tokens = RunConfig(dir=str(tmp_path / "tokens"), iterations=100, max_tokens=3000)
    summary = train(small_config(tmp_path / "tokens", run=tokens))
    lines = read_lines(tmp_path / "tokens")
    assert summary["finish_reason"] == "tokens" and summary["tokens"]["generated"] >= 3000
    assert lines[-2]["tokens/generated"] < 3000
    assert "eval/accuracy" in lines[-1]  # the last iteration is evaluated
    updates = RunConfig(dir=str(tmp_path / "updates"), iterations=100, max_updates=3)
    assert train(small_config(tmp_path / "updates", run=updates))["updates"] == 4  # whole iterations of two updates


def test_a_reward_function_replaces_the_graders(tmp_path: Path) -> None:
    seen: list[str] = []

    def shortness(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        assert len(prompts) == len(completions) == len(answer)
        return [1.0 / (1 + len(text)) for text in completions]

    summary = train(small_config(tmp_path / "run", "grpo"), reward_fn=shortness)
    assert 0 < summary["accuracy_after"]["mean"] < 0.5 and len(seen) >= 64
    row = pq.read_table(tmp_path / "run/rollouts/000001.parquet").to_pylist()[0]
    assert row["reward"] in (1.0 / (1 + len(row["response"])), 0.0)


def test_a_prompt_that_is_too_long_for_the_context_is_an_error(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run")
    config = replace(config, rollouts=replace(config.rollouts, max_new_tokens=510))
    with pytest.raises(
        UserError, match=r"with rollouts\.max_new_tokens 510 that is more than the model's context of 512"
    ):
        train(config)
    assert not (tmp_path / "run").exists()  # the same command can be run again with another value


def test_training_on_a_json_lines_file(tmp_path: Path) -> None:
    lines = [{"q": f"a={i % 10};b=a+2;c=b+5;c?\n", "a": f"#### {(i + 7) % 10}"} for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = TaskConfig(
        name="dataset",
        train_path=str(tmp_path / "train.jsonl"),
        prompt_column="q",
        answer_column="a",
        rewards=("hash",),
    )
    config = small_config(tmp_path / "run", task=task)
    summary = train(config)
    assert summary["updates"] == 8 and summary["accuracy_before"]["mean"] is not None
    rows = pq.read_table(tmp_path / "run/rollouts/000001.parquet").to_pylist()
    assert any(row["reward"] == 1.0 for row in rows) and all(row["answer"].startswith("#### ") for row in rows)


@pytest.mark.real
@pytest.mark.parametrize("algorithm", list(BUILT_IN))
def test_every_algorithm_learns(tmp_path: Path, algorithm: str) -> None:
    """On the level `habit`, a run of seconds raises accuracy significantly, because one habit decides most errors."""
    config = small_config(
        tmp_path / "run",
        algorithm,
        model=ModelConfig(path="embedded:habit"),
        task=TaskConfig(level="habit", num_steps=4),
        rollouts=RolloutConfig(num_problems=8, group_size=8, max_new_tokens=45),
        learner=LearnerConfig(lr=2e-4, warmup_updates=5, minibatch_size=32, advantage_scaling="std"),
        **({"ppo": {"value_lr": 1e-3}} if algorithm == "ppo" else {}),
        eval=EvalConfig(every=0, final_num_problems=1024),
        run=RunConfig(dir=str(tmp_path / "run"), iterations=25, checkpoint_every=0, save_rollouts=False),
    )
    summary = train(config)
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    assert after["low"] > before["high"], f"{algorithm}: {before} -> {after}"


@pytest.mark.real
def test_the_accuracy_of_the_embedded_models_is_as_in_the_readme() -> None:
    """Accuracy on chains of 10 steps is 10-35% before training."""
    from vineppo.training.evaluate import evaluate_model

    for level in ("judgement", "habit"):
        spec = EvalSpec(
            model=ModelConfig(path=f"embedded:{level}"),
            task=TaskConfig(level=level, num_steps=10),
            split="validation",
            num_problems=512,
            num_samples=1,
            max_new_tokens=120,
        )
        result = evaluate_model(spec)
        assert 0.10 <= result["pass@1"]["mean"] <= 0.35, result
        assert result["truncated_share"] < 0.01 and "pass@4" not in result


def test_config_yaml_contains_the_whole_config(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", run=RunConfig(dir=str(tmp_path / "run"), iterations=1))
    train(config)
    import yaml

    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) == config_to_dict(config)
