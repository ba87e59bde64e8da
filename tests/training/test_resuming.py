"""Resuming a run under changed settings, extending a finished run, and using a run that did not finish."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers import SilentReporter, small_config, weights_hash
from tests.run.test_lock_and_disk import file_size_limit
from vineppo.cli.main import main
from vineppo.config.schema import Config, EvalConfig, LearnerConfig, LoraConfig, ModelConfig, RunConfig
from vineppo.config.settings import replace
from vineppo.model.lora import merged_weights
from vineppo.model.policy import Policy
from vineppo.run.checkpoint import read_state, save_checkpoint
from vineppo.run.directory import RunDirectory
from vineppo.run.lock import locked
from vineppo.run.shards import WHOLE
from vineppo.statistics import Interval
from vineppo.training.changes import changed_settings
from vineppo.training.evaluate import Measurement
from vineppo.training.loop import resume, train
from vineppo.training.parts import build_parts
from vineppo.training.progress import Progress, is_new_best, with_best_checkpoint
from vineppo.training.resuming import random_state, set_random_state
from vineppo.training.stopping import LastingReporter, graceful_stop
from vineppo.types import UserError


class Crash(Exception):
    """Simulates an error that stops the run."""


class At(SilentReporter):
    """A reporter that calls a function after the metrics of an iteration are logged and before its checkpoint."""

    def __init__(self, iteration: int, call: Callable[[], Any]):
        self.at, self.call = iteration, call

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        if metrics["iteration"] == self.at:
            self.call()


def crash() -> None:
    raise Crash


def config_of(run: Path, iterations: int = 4, algorithm: str = "reinforce", **sections: Any) -> Config:
    limits = RunConfig(dir=str(run), iterations=iterations, checkpoint_every=1)
    evaluation = EvalConfig(every=2, num_problems=8, final_num_problems=8)
    return small_config(run, algorithm, **{"eval": evaluation, "run": limits, **sections})


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = RunDirectory(run, {}).read_metrics()
    return [{key: value for key, value in line.items() if not key.startswith("seconds/")} for line in lines]


def stopped_run(run: Path, at: int = 3, **options: Any) -> Config:
    config = config_of(run, **options)
    with pytest.raises(Crash):
        train(config, recipe="small", reporter=At(at, crash))
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(config_of(run, iterations=2))
    return run


# --- changed settings


def test_a_resumed_run_may_change_settings_of_later_iterations(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Case 15. The changes are announced, and recorded in config.yaml and run.json."""
    config = stopped_run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    changed = replace(
        config,
        learner=replace(config.learner, lr=1e-5, micro_batch_tokens=500),
        run=replace(config.run, dir=str(tmp_path / "moved"), iterations=5, checkpoint_every=2),
        task=replace(config.task, grading=replace(config.task.grading, seconds=3)),
    )
    summary = resume(changed)
    lines = metrics_of(tmp_path / "moved")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 5] and summary["iterations"] == 5
    assert [line["policy/lr"] for line in lines[1:]] == [1e-4, 1e-4, 1e-5, 1e-5, 1e-5]
    settings = {
        "task.grading.seconds": [10.0, 3.0],
        "learner.lr": [0.0001, 1e-05],
        "learner.micro_batch_tokens": [8192, 500],
        "run.iterations": [4, 5],
        "run.checkpoint_every": [1, 2],
    }
    record = json.loads((tmp_path / "moved/run.json").read_text())
    assert record["changes"] == [{"after_iteration": 2, "settings": settings}] and record["recipe"] == "small"
    recorded = yaml.safe_load((tmp_path / "moved/config.yaml").read_text())
    assert (recorded["learner"]["lr"], recorded["run"]["iterations"]) == (1e-5, 5)
    assert [str(warning.message) for warning in recwarn if "changed" in str(warning.message)] == [
        "changed settings from iteration 3 on: task.grading.seconds: 10.0 -> 3.0; learner.lr: 0.0001 -> 1e-05; "
        "learner.micro_batch_tokens: 8192 -> 500; run.iterations: 4 -> 5; run.checkpoint_every: 1 -> 2"
    ]


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--run.seed", "1"], "run.seed: 0 -> 1"),
        (["--task.num_steps", "4", "--learner.lr", "1e-5"], "task.num_steps: 3 -> 4"),
        (["--model.path", "embedded:habit"], "model.path: embedded:judgement -> embedded:habit"),
        (["--rollouts.group_size", "8"], "rollouts.group_size: 4 -> 8"),
        (["--learner.epochs", "2"], "learner.epochs: 1 -> 2"),
        (["--eval.final_num_problems", "9"], "eval.final_num_problems: 8 -> 9"),
        (["--algorithm", "rloo"], "algorithm: reinforce -> rloo"),
    ],
)
def test_a_resumed_run_must_not_change_its_past(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], refused: str
) -> None:
    """Case 15. Refused before a model is loaded; nothing is written."""
    run = RunDirectory.create(tmp_path / "run", config_of(tmp_path / "run"))
    save_checkpoint(run.checkpoints, 1, {})
    before = (run.path / "config.yaml").read_bytes()
    assert main(["train", "--resume", str(run.path), *options]) == 2
    assert capsys.readouterr().err == (
        f"error: --resume {run.path} cannot change the settings of the run ({refused}), because its earlier iterations "
        "depend on them; remove those options, or start a new run with them (settings that may change: learning rate, "
        "limits, memory, evaluation and checkpoint intervals, limits of grading, trackers)\n"
    )
    assert (run.path / "config.yaml").read_bytes() == before and not (run.path / "metrics.jsonl").exists()


def test_a_finished_run_is_extended_with_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """One iteration and then one more are the same as two. Without a higher limit the run stays finished."""
    config = config_of(tmp_path / "extended", iterations=1)
    train(config, recipe="small")
    with pytest.raises(UserError) as error:
        resume(config)
    path = tmp_path / "extended"
    assert str(error.value) == (
        f"run {path} is finished (finish_reason: iterations) and cannot be resumed; to train it for longer, raise its "
        f"limit with --run.iterations N, or start a new run with --model.path {path} and another run.dir"
    )
    assert main(["train", "--resume", str(path), "--run.iterations", "2"]) == 0
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["iterations"], summary["recipe"]) == (2, "small")
    assert "The run ended after 2 iterations (reason: iterations)." in (path / "report.md").read_text()
    lines = metrics_of(path)  # the last iteration of the shorter run was evaluated, too
    assert [lines[0], lines[2]] == [metrics_of(whole)[0], metrics_of(whole)[2]]
    assert weights_hash(path / "final") == weights_hash(whole / "final")


def test_a_finished_run_without_its_checkpoint_is_not_started_again(tmp_path: Path) -> None:
    """A comparison removes the checkpoints of finished runs. A higher limit must not overwrite such a run."""
    config = config_of(tmp_path / "run", iterations=1)
    train(config, recipe="small")
    path = tmp_path / "run"
    before = (path / "metrics.jsonl").read_bytes(), weights_hash(path / "final")
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(UserError) as error:
        resume(replace(config, run=replace(config.run, iterations=2)))
    assert str(error.value) == (
        f"run {path} is finished and has no checkpoint (`vineppo compare` removes those of finished runs "
        f"unless run.keep_checkpoints is set), so it cannot be continued; start a new run with "
        f"--model.path {path} and another run.dir"
    )
    assert ((path / "metrics.jsonl").read_bytes(), weights_hash(path / "final")) == before


def test_the_recipe_survives_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    """Case 18."""
    config = stopped_run(tmp_path / "run", at=0, iterations=1)
    assert resume(config)["recipe"] == "small"


def test_a_run_without_checkpoint_may_change_every_setting(tmp_path: Path) -> None:
    """No iteration depends on the settings yet."""
    config = config_of(tmp_path / "run", iterations=1)
    run = RunDirectory.create(tmp_path / "run", replace(config, rollouts=replace(config.rollouts, max_new_tokens=4000)))
    with pytest.warns(UserWarning, match="^changed settings from iteration 1 on: rollouts.max_new_tokens: 4000 -> 40$"):
        assert resume(config)["iterations"] == 1
    assert RunDirectory.open(run.path).config["rollouts"]["max_new_tokens"] == 40
    other = config_of(tmp_path / "run", algorithm="ppo")
    assert changed_settings(run, other, any_change=True)["algorithm"] == ["reinforce", "ppo"]


def files_of(run: Path) -> dict[str, bytes]:
    """Return the content of all files of a run, except the lock, whose content names the process."""
    paths = (path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def test_a_resume_that_fails_changes_no_file(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    options = ["--run.iterations", "5", "--learner.lr", "1e-5"]
    before = files_of(run)

    def fails(*more: str) -> str:
        assert main(["train", "--resume", str(run), *options, *more]) == 2
        assert files_of(run) == before and "summary.json" in before
        return capsys.readouterr().err

    assert "wandb, which is not installed" in fails("--run.report_to", "wandb")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["vineppo.training.loop"], "build_trackers", refuse_to_start)
        assert fails() == "error: wandb did not start\n"
    with (run / "metrics.jsonl").open("a") as file:
        file.write("no metrics\n")
    before = files_of(run)
    assert "metrics.jsonl is damaged: line 4" in fails()


def refuse_to_start(*_: object) -> None:
    raise UserError("wandb did not start")


def test_a_damaged_summary_does_not_prevent_a_resume(tmp_path: Path, whole: Path) -> None:
    """The run has no iteration left, but its final evaluation is repeated."""
    shutil.copytree(whole, tmp_path / "run")
    expected = (tmp_path / "run/summary.json").read_text()
    (tmp_path / "run/summary.json").write_text(expected[:50])
    assert resume(config_of(tmp_path / "run", iterations=2))["accuracy_after"] == json.loads(expected)["accuracy_after"]


def test_a_run_directory_is_locked_while_a_run_trains_in_it(tmp_path: Path) -> None:
    """Case 14."""
    seen: list[str] = []

    def start_second() -> None:
        with pytest.raises(UserError) as error:
            resume(config)
        seen.append(str(error.value))

    config = config_of(tmp_path / "run", iterations=1)
    train(config, reporter=At(1, start_second))
    assert len(seen) == 1 and seen[0].startswith(f"run directory {tmp_path / 'run'} is in use by process {os.getpid()}")
    with locked(tmp_path / "run"):
        pass


# --- the best checkpoint


def test_the_best_checkpoint_is_the_last_one_with_the_highest_accuracy() -> None:
    progress, best, new_bests = Progress(), [], list[int]()
    for iteration, accuracy in ((0, 0.25), (1, 0.75), (2, 0.75), (3, None), (4, 0.5)):
        progress = Progress(
            **{**vars(progress), "iteration": iteration},
        )
        if accuracy is not None:
            progress = Progress(**{**vars(progress), "evaluated_iteration": iteration, "evaluated_accuracy": accuracy})
        new_bests += [iteration] if is_new_best(progress) else []
        progress = with_best_checkpoint(progress)
        best.append((progress.best_checkpoint, progress.best_checkpoint_accuracy))
    assert best == [(0, 0.25), (1, 0.75), (2, 0.75), (2, 0.75), (2, 0.75)]
    assert new_bests == [0, 1]


def test_the_best_checkpoint_is_saved_after_its_evaluation(tmp_path: Path) -> None:
    """Iteration 1 has the best evaluation, iteration 2 a worse one. Other checkpoints are due after every third."""
    limits = RunConfig(dir=str(tmp_path / "run"), iterations=3, checkpoint_every=3)
    evaluation = EvalConfig(every=1, num_problems=1, final_num_problems=0)
    accuracies = iter([0.0, 1.0, 0.5])
    config = small_config(tmp_path / "run", "reinforce", run=limits, eval=evaluation)
    with pytest.raises(Crash), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurement, "mean_reward", lambda *_: Interval(next(accuracies), 0.0, 1.0))
        train(config, reporter=At(2, crash))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["000001"]


def test_a_run_continues_from_its_best_checkpoint(tmp_path: Path) -> None:
    """Case 15. Updates with a high learning rate ruin the model; its best checkpoint is the one before them."""
    evaluation = EvalConfig(every=1, num_problems=16, final_num_problems=0)
    learner = LearnerConfig(lr=3e-2, minibatch_size=8, epochs=1)
    config = stopped_run(tmp_path / "run", at=4, eval=evaluation, learner=learner)
    accuracies = [line["eval/accuracy"] for line in metrics_of(tmp_path / "run")]
    best = max(range(4), key=lambda i: (accuracies[i], i))
    assert best == 0 and accuracies[0] > 0.5 > accuracies[3]
    run = RunDirectory.open(tmp_path / "run")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["000000", "000003"]

    for choice in ("worst", "2", "0003x"):
        with pytest.raises(UserError) as error:
            resume(config, checkpoint=choice)
        assert str(error.value) == f"--from {choice}: allowed: newest, best, or the iteration of a checkpoint (0, 3)"
    slow = replace(config, learner=replace(learner, lr=1e-6))
    with pytest.raises(Crash):
        resume(slow, checkpoint="best", reporter=At(1, crash))
    lines = metrics_of(run.path)
    assert [line["iteration"] for line in lines] == [0, 1] and lines[1]["eval/accuracy"] > 0.5
    assert [path.name for path in run.checkpoints.iterdir()] == ["000000"]  # the ruined one would be the newest


# --- using a run that did not finish


@pytest.mark.parametrize("lora", [0, 4])
def test_the_model_of_a_run_that_did_not_finish(tmp_path: Path, lora: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Case 15: the newest whole checkpoint, with adapters merged; in `eval`, and as the start of another run."""
    model = ModelConfig(path="embedded:judgement", lora=LoraConfig(r=lora))
    learner = LearnerConfig(lr=1e-2 if lora else 1e-4, minibatch_size=8, epochs=1)
    config = stopped_run(tmp_path / "run", at=2, model=model, learner=learner)
    checkpoint = tmp_path / "run/checkpoints/000001"
    parts = build_parts(config)
    parts.learner.load(checkpoint)
    expected = {name: tensor.clone() for name, tensor in merged_weights(parts.policy.model)}
    loaded = Policy.load(ModelConfig(path=str(tmp_path / "run"))).model
    start = Policy.load(ModelConfig(path="embedded:judgement")).model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys() == start.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert any(not torch.equal(found[name], start[name]) for name in found)
    assert all(parameter.requires_grad for parameter in loaded.parameters())

    assert main(["eval", str(tmp_path / "run"), "--num_problems", "4", "--num_samples", "1"]) == 0
    assert f"{tmp_path / 'run'} has not finished; this is the model after iteration 1\n" in capsys.readouterr().out

    second = config_of(tmp_path / "second", model=ModelConfig(path=str(tmp_path / "run")))
    with pytest.raises(Crash):
        train(second, reporter=At(1, crash))
    recorded = yaml.safe_load((tmp_path / "second/config.yaml").read_text())
    assert recorded["model"]["path"] == str(checkpoint)  # also if the first run goes on
    at_start = read_state(tmp_path / "second/checkpoints/000000" / WHOLE)["policy"]
    assert all(torch.equal(at_start[name], expected[name]) for name in expected)
    checkpoint.rename(tmp_path / "run/checkpoints/000009")
    with pytest.raises(UserError, match="does not exist any more: its run has removed that checkpoint"):
        Policy.load(ModelConfig(path=str(checkpoint)))


def test_a_finished_run_is_its_final_model(whole: Path) -> None:
    loaded = Policy.load(ModelConfig(path=str(whole))).model.state_dict()
    final = Policy.load(ModelConfig(path=str(whole / "final"))).model.state_dict()
    assert all(torch.equal(loaded[name], final[name]) for name in final)


def test_a_run_without_checkpoint_has_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory.create(tmp_path / "run", config_of(tmp_path / "run")).path
    assert main(["eval", str(run)]) == 2
    message = (
        f"error: {run} has no model yet: no checkpoint is complete; continue it with `vineppo train --resume {run}`"
    )
    assert capsys.readouterr().err == message + "\n"
    assert main(["plot", str(run)]) == 2
    assert capsys.readouterr().err == f"error: {run} has no finished iteration yet, so there is nothing to plot\n"


# --- disks, plots, signals, consoles


def test_a_run_on_a_full_disk_stops_and_continues_with_the_same_bits(tmp_path: Path, whole: Path) -> None:
    """Case 17. The checkpoint of iteration 2 does not fit."""
    config = config_of(tmp_path / "run", iterations=2)
    with file_size_limit(1 << 40):  # restores the limit after the run
        import resource

        def fill() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        with pytest.raises(UserError, match=r"the checkpoint of iteration 2 cannot .*: File too large; "):
            train(config, reporter=At(2, fill))
    run = RunDirectory.open(config.run.dir)
    assert list(run.path.rglob("*.tmp")) == [] and "000001" in [path.name for path in run.checkpoints.iterdir()]
    resume(config)
    assert weights_hash(run.final) == weights_hash(whole / "final")
    assert metrics_of(run.path) == metrics_of(whole)


@pytest.mark.usefixtures("drawn_figures")
def test_plots_that_fail_do_not_fail_the_run_and_are_made_by_a_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Case 14."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("vineppo.run.plots.plot_run", lambda path: (run / "absent").read_text())
        assert train(config_of(run, iterations=1))["finish_reason"] == "iterations"
    expected = f"the plots could not be made (FileNotFoundError: [Errno 2] No such file or directory: '{run}/absent'); "
    assert expected + f"make them with `vineppo plot {run}`" in [str(warning.message) for warning in recwarn]
    capsys.readouterr()
    assert main(["plot", str(run)]) == 0
    names = ["accuracy.png", "tokens.png", "seconds.png"]
    assert capsys.readouterr().out.splitlines() == [str(run / "plots" / name) for name in names]
    assert sorted(path.name for path in (run / "plots").iterdir()) == sorted(names)


def test_a_closed_terminal_does_not_stop_a_run() -> None:
    """SIGHUP is ignored inside the block; the handler is restored after it."""
    before = signal.getsignal(signal.SIGHUP)
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_reporter_without_console_is_silent_and_its_other_errors_are_raised() -> None:
    def closed() -> None:
        raise OSError(5, "Input/output error")

    LastingReporter(At(1, closed)).iteration({"iteration": 1})
    with pytest.raises(Crash):
        LastingReporter(At(1, crash)).iteration({"iteration": 1})
    with pytest.raises(FileNotFoundError):
        LastingReporter(At(1, lambda: Path("absent").read_text())).iteration({"iteration": 1})


def test_an_error_of_a_callback_that_looks_like_the_console_s_is_raised(tmp_path: Path) -> None:
    """Only the package's own output is discarded without a console."""

    class Uploads(SilentReporter):
        def start(self, sampler: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        train(config_of(tmp_path / "run"), reporter=Uploads())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_random_numbers_of_gpus_are_restored() -> None:
    state = random_state()
    expected = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
