"""The command line: help, exit codes, and one line for every user error. No test trains a model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import vineppo
from vineppo.cli.console import (
    ConsoleReporter,
    duration,
    final_report,
    headline,
    progress_line,
    share_before,
    share_done,
    short_number,
    tokens_per_second,
)
from vineppo.cli.demo import _free_directory
from vineppo.cli.main import COMMANDS, main
from vineppo.config.recipes import load_recipe
from vineppo.config.schema import Config, RunConfig
from vineppo.run.checkpoint import save_checkpoint
from vineppo.run.directory import RunDirectory
from vineppo.training.configure import build_config

TRAINING = ("train", "compare")


def user_error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run `vineppo ...`, check that it fails with one line on stderr and exit code 2, and return that line."""
    assert main(argv) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    assert not output.out
    return lines[0].removeprefix("error: ")


# --- help


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_purpose_options_and_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: vineppo {name}")
    assert COMMANDS[name].purpose in text
    assert 2 <= len(COMMANDS[name].examples) <= 4
    for _, line in COMMANDS[name].examples:
        assert line in text and line.startswith(f"vineppo {name}")


@pytest.mark.parametrize("name", TRAINING)
def test_help_contains_the_text_of_nested_fields(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([name, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--learner.kl.coefficient X Weight of the penalty. If it is 0, there is no penalty" in words
    assert "--vineppo.num_mc_rollouts N K: number of continuations sampled from each state. (default: 9)" in words
    assert "--learner.decay {constant,linear,cosine}" in words
    assert "learner.kl: Penalty on the KL divergence from the frozen starting model:" in words


def test_help_of_sft_contains_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sft", "-h"])
    words = " ".join(capsys.readouterr().out.split())
    assert "--out TEXT Directory for the trained model" in words
    assert "--task.prompt_column TEXT dataset, gsm8k, math: column with the text of the problem" in words


def test_the_examples_in_help_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """Each example can be parsed and has only existing keys; files and models are not checked."""
    from vineppo.cli.options import parse_request, parser_of

    for name, command in COMMANDS.items():
        for _, line in command.examples:
            argv = line.split(" | ")[0].split()[2:]
            parse_request(parser_of(name, command), command, argv)


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vineppo {vineppo.__version__}\n"


def test_doctor_prints_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["vineppo"] == vineppo.__version__
    assert rows["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "judgement" in rows["recipes"]
    assert re.match(r"cpu \(\d+ threads?; bfloat16: (fast|slow, use float32)\)", rows["device"])


# --- user errors


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "unknown command trian; did you mean train?"),
        (
            ["zzz"],
            "unknown command zzz; commands: train, sft, offline, eval, plan, show, view, export, report, plot, "
            "compare, tune, values, blame, variance, scaling, demo, doctor",
        ),
        (["--verison"], "unknown option --verison; did you mean --version?"),
        (["train", "--lr", "3"], "unknown option --lr; did you mean --learner.lr?"),
        (["train", "--lr=3"], "unknown option --lr; did you mean --learner.lr?"),
        (["train", "judgement", "--K", "3"], "unknown option --K; did you mean --vineppo.num_mc_rollouts?"),
        (["train", "--resum", "x"], "unknown option --resum; did you mean --resume?"),
        (["doctor", "--what"], "unknown option --what; see `vineppo doctor --help`"),
        (["train", "--learner.lr"], "--learner.lr: expected one argument"),
        (["train", "--learner.lr", "fast"], "learner.lr is 'fast' on the command line; it must be a number"),
        (["train", "--learner.lr", "-1e-4"], "learner.lr is '-1e-4' on the command line; it must be at least 0"),
        (
            ["train", "--learner.epochs", "1.5"],
            "learner.epochs is '1.5' on the command line; it must be a whole number",
        ),
        (["train", "--learner.decay=cubic"], "allowed: constant, linear, cosine"),
        (["train", "--algorithm", "dpo"], "allowed: vineppo, ppo, grpo, rloo, reinforce"),
        (
            ["train", "judgement", "--vineppo.num_mc_rollouts", "0"],
            "vineppo.num_mc_rollouts is '0' on the command line; it must be at least 1",
        ),
        (
            ["train", "--rollouts.group_size", "0"],
            "rollouts.group_size is '0' on the command line; it must be at least 1",
        ),
        (["train", "--algorithm", "grpo", "--rollouts.group_size", "1"], "rollouts.group_size is 1; grpo"),
        (["demo", "--algorithm", "rloo", "--rollouts.group_size", "1"], "rollouts.group_size is 1; rloo"),
        (["train", "judgment"], "recipe 'judgment' is neither"),
        (["train", "absent.yaml"], "recipe 'absent.yaml' does not exist (a relative path starts at "),
        (["eval", "x" * 300], "is too long for a file name"),
        (["train", "judgement", "habit"], "unexpected argument habit; usage: vineppo train [RECIPE]"),
        (["train", "--resume", "absent"], "no run directory at absent"),
        (["train", "judgement", "--resume", "absent"], "no recipe can be given; remove judgement"),
        (["demo", "judgement"], "unexpected argument judgement"),
        (["sft"], "out is empty"),
        (["sft", "--model.path", "new:tiny", "--out", "/dev/null/x"], "out '/dev/null/x' cannot be written (Not a dir"),
        (["train", "--model.device", "tpu:0"], "model.device is 'tpu:0'; "),
        (["compare", "judgement", "--out", "x", "--learner.decay", "linear", "--budget", "seconds=9"], "learner.decay"),
        (["sft", "--learner.lr", "1", "--out", "x"], "unknown option --learner.lr; did you mean --lr?"),
        (["sft", "judgement", "--out", "x"], "judgement is a recipe for `vineppo train`"),
        (["offline", "--method", "dpo"], "method is 'dpo' on the command line; allowed: restem, dpo_positive"),
        (["offline", "--restem.rounds", "0"], "restem.rounds is '0' on the command line; it must be at least 1"),
        (["offline", "--learner.lr", "1"], "unknown option --learner.lr; did you mean --lr?"),
        (["offline", "sft-habit"], "sft-habit is a recipe for `vineppo sft`"),
        (["offline", "--run.dir", "/dev/null/x"], "run directory /dev/null/x cannot be written"),
        (["eval"], "no MODEL is given"),
        (["eval", "m", "--json", "absent/f.json"], "--json absent/f.json cannot be written"),
        (["eval", "m", "--model.path", "n"], "--model.path is not an option of `vineppo eval`"),
        (["eval", "m", "--num_problem", "3"], "unknown option --num_problem; did you mean --num_problems?"),
        (["eval", "m", "--task.num_steps", "99"], "task.num_steps is 99"),
        (["compare"], "no RECIPE is given"),
        (["compare", "judgement"], "--out is not given"),
        (["compare", "judgement", "--out", "o", "--budget", "hours=3"], "budget is 'hours=3'"),
        (["compare", "judgement", "--out", "o", "--algorithms", "ppo,grop"], "did you mean grpo?"),
        (["compare", "judgement", "--out", "o", "--seeds", "x"], "--seeds is 'x'"),
        (["compare", "judgement", "--out", "o", "--run.seed", "1"], "run.seed is set by `vineppo compare`"),
        (["compare", "judgement", "--out", "o", "--rollouts.group_size", "0"], "rollouts.group_size is '0'"),
        (["compare", "absent", "--out", "o"], "recipe 'absent' is neither"),
    ],
)
def test_user_errors_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in user_error(capsys, *argv)
    assert not list(tmp_path.iterdir()), "a failed command created a file"


def test_wrong_keys_in_a_recipe_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learner:\n  learning_rate: 1e-4\n", encoding="utf-8")
    message = user_error(capsys, "train", str(recipe))
    assert message == f"unknown key learner.learning_rate in recipe {recipe}; did you mean learner.lr?"


def test_resume_refuses_changed_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", Config())
    save_checkpoint(run.checkpoints, 1, {})
    message = user_error(capsys, "train", "--resume", str(run.path), "--learner.lr", "2e-4", "--run.seed", "1")
    assert "cannot change the settings of the run (run.seed: 0 -> 1)" in message
    assert "learner.lr" not in message  # later iterations may have another learning rate


def test_error_of_a_damaged_run_contains_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", Config())
    (run.path / "config.yaml").write_text(yaml.safe_dump({"learner": {"speed": 1}}), encoding="utf-8")
    assert f"unknown key learner.speed in {run.path}/config.yaml" in user_error(
        capsys, "train", "--resume", str(run.path)
    )
    assert f"{run.path} has no model yet" in user_error(capsys, "eval", str(run.path))
    run.write_record({"vineppo": "9.9"})
    assert (
        f"unknown key learner.speed in {run.path}/config.yaml (written by vineppo 9.9; this is vineppo "
        in user_error(capsys, "train", "--resume", str(run.path))
    )


def test_eval_takes_task_and_budget_from_a_run_or_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The EvalSpec passed to `evaluate_model`, which is replaced and loads no model."""
    from vineppo.training import evaluate

    config = build_config({}, None, {"task.num_steps": "7", "rollouts.max_new_tokens": "33", "rollouts.stop": "X"})
    run = RunDirectory.create(tmp_path / "run", config)
    run.final.mkdir()
    (run.final / "config.json").write_text("{}")
    specs: list[Any] = []

    class Stop(Exception):
        pass

    def record(spec: Any) -> None:
        specs.append(spec)
        raise Stop

    monkeypatch.setattr(evaluate, "evaluate_model", record)
    for model in (run.path, run.final):
        with pytest.raises(Stop):
            main(["eval", str(model), "--k", "1,2", "--task.level", "habit"])
        spec = specs.pop()
        assert (spec.task.num_steps, spec.task.level, spec.max_new_tokens) == (7, "habit", 33)
        assert (spec.stop, spec.k, spec.model.path) == (("X",), (1, 2), str(run.final))

    # Case 13: adapters are merged into the final model in float32.
    trained = build_config({}, None, {"model.dtype": "bfloat16", "model.lora.r": "8"})
    adapted = RunDirectory.create(tmp_path / "adapted", trained)
    (adapted.final / "adapter").mkdir(parents=True)
    (adapted.final / "config.json").write_text("{}")
    with pytest.raises(Stop):
        main(["eval", str(adapted.path)])
    spec = specs.pop()
    assert (spec.model.dtype, spec.model.lora.r) == ("float32", 0)
    save_checkpoint(adapted.checkpoints, 3, {})
    with pytest.raises(Stop):
        main(["eval", str(adapted.checkpoints / "000003")])
    spec = specs.pop()
    assert (spec.model.dtype, spec.model.lora.r) == ("float32", 0)

    recipe = tmp_path / "mine.yaml"
    content = "model: {path: 'embedded:habit'}\ntask: {num_steps: 5}\nrollouts: {max_new_tokens: 21}\n"
    recipe.write_text(content, encoding="utf-8")
    with pytest.raises(Stop):
        main(["eval", str(recipe), "--task.level", "habit"])
    spec = specs.pop()
    assert (spec.task.num_steps, spec.task.level, spec.max_new_tokens) == (5, "habit", 21)
    assert spec.model.path == "embedded:habit"

    with pytest.raises(Stop):
        main(["eval", "habit"])
    spec = specs.pop()
    assert (spec.model.path, spec.task.level) == ("embedded:habit", "habit"), "case 21: the recipe's starting model"


def test_eval_says_how_many_responses_have_no_reward(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Case 3."""
    from vineppo.training import evaluate

    unknown = {"mean": None, "low": None, "high": None}
    result = {"greedy": unknown, "pass@1": unknown, "num_problems": 4, "num_samples": 2, "truncated_share": 0.0}
    more = {"tokens": 9, "seconds": 1.0, "grader/error_share": 0.0, "grader/not_applicable_share": 0.25}
    monkeypatch.setattr(evaluate, "evaluate_model", lambda spec: {**result, **more})
    assert main(["eval", "embedded:judgement"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "25.0% of responses have no reward, because no reward function applies; they are left out"


# --- processes


def run_vineppo(*argv: str, code: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "vineppo"]), *argv]
    source = str(Path(vineppo.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def test_help_and_user_errors_do_not_import_pytorch() -> None:
    code = """
import sys, vineppo
from vineppo.cli.demo import _free_directory
from vineppo.cli.main import main
assert main(["train", "--help"]) == 0
assert main(["train", "--lr", "1"]) == 2
assert main(["train", "judgement", "--vineppo.num_mc_rollouts", "0"]) == 2
print(sorted({"torch", "transformers", "pyarrow", "matplotlib", "rich"} & set(sys.modules)), file=sys.stderr)
"""
    assert run_vineppo(code=code).stderr.splitlines()[-1] == "[]"


def test_long_error_of_the_module_is_one_line() -> None:
    process = run_vineppo("train", "x" * 300)
    assert (process.returncode, process.stdout) == (2, "")
    assert len(process.stderr.splitlines()) == 1 and "x" * 300 in process.stderr


def test_closed_standard_output_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "vineppo", "train", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(vineppo.__file__).parents[1])}
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=120)
    os.close(writer)
    assert process.stderr == b""


def test_ctrl_c_prints_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(name: str) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr("vineppo.cli.common.load_recipe", interrupt)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_other_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> dict[str, Any]:
        raise ZeroDivisionError

    monkeypatch.setattr("vineppo.cli.common.load_recipe", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_the_demo_ends_with_a_response_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = "--run.iterations 2 --rollouts.num_problems 16 --learner.minibatch_size 16 --learner.lr 1e-3"
    small += " --eval.every 0 --eval.final_num_problems 0 --run.checkpoint_every 0"
    assert main(["demo", "--run.dir", str(run), *small.split()]) == 0
    text = capsys.readouterr().out
    assert f"  report           {run / 'report.html'}" in text.splitlines() and (run / "report.html").exists()
    report = (run / "report.md").read_text()
    assert "| learner.lr | 0.001 | 0.0001 |" in report and "No accuracy was measured." in report
    _, _, after = text.partition("The first of 64 validation problems that the starting model gets wrong")
    if not after:  # possible on a machine with another rounding
        assert "Training improved the response to none of 64 validation problems." in text
        return
    before, _, after = after.partition("After training, problem validation/")
    assert "Before training, problem validation/" in before
    for part, reward in ((before, "0"), (after, "1")):
        assert (
            f"reward {reward}, complete" in part and part.count("V(prompt)") == 1 and "K = 32" in " ".join(part.split())
        )
    assert f"  vineppo show {run}" in text.splitlines()


def test_the_demo_takes_the_next_free_directory(tmp_path: Path) -> None:
    assert _free_directory(tmp_path / "demo").name == "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert _free_directory(tmp_path / "demo").name == "demo-3"


# --- the package


def test_package_exports_functions_and_configs() -> None:
    code = """
import vineppo
import vineppo.training.loop
from vineppo.training.loop import resume
assert callable(vineppo.train) and vineppo.train.__name__ == "train" and callable(resume)
assert vineppo.Config().learner == vineppo.LearnerConfig()
for name in vineppo.__all__:
    getattr(vineppo, name)
try:
    vineppo.nothing
except AttributeError as error:
    print(error)
"""
    process = run_vineppo(code=code)
    assert process.stdout == "module 'vineppo' has no attribute 'nothing'\n", process.stderr
    assert process.stderr == ""


# --- output of a run in the terminal

LINE = {
    "iteration": 10,
    "updates": 20,
    "tokens/generated": 123_456,
    "seconds/train": 41.4,
    "reward/mean": 0.4125,
    "eval/accuracy": 0.45312,
    "eval/accuracy_low": 0.4,
    "eval/accuracy_high": None,
}
SUMMARY = {
    "algorithm": "vineppo",
    "label": "VinePPO",
    "seed": 3,
    "accuracy_before": {"mean": 0.125, "low": 0.09, "high": 0.16},
    "accuracy_after": {"mean": 0.5, "low": 0.45, "high": 0.55},
    "updates": 120,
    "iterations": 60,
    "seconds": 181.0,
    "seconds_eval": 12.34,
    "tokens": {"rollouts": 210_000, "mc": 1_900_000, "generated": 2_110_000, "trained": 420_000},
    "finish_reason": "iterations",
    "final": "final",
}


def test_progress_line() -> None:
    assert progress_line(LINE, 60) == "iteration 10/60  reward 0.412  tokens 123k  41 s  accuracy 45.3%"
    assert progress_line({"iteration": 3, "reward/mean": None}, 1000) == "iteration    3/1000  tokens 0"
    before = {"iteration": 0, "eval/accuracy": 0.1, "eval/accuracy_low": 0.05, "eval/accuracy_high": 0.15}
    assert progress_line(before, 60).split() == ["start", "accuracy", "10.0%", "[5.0,", "15.0]"]


def test_share_done_uses_the_nearest_limit() -> None:
    config = build_config({}, None, {"run.iterations": 1_000_000, "run.max_updates": 80, "run.max_seconds": 100})
    assert share_done(LINE, config) == pytest.approx(0.414)
    assert share_done({"iteration": 0}, config) == 0.0
    assert share_done({"iteration": 60}, Config()) == 1.0
    assert "until 80 updates or 100 seconds" in headline(config)


def test_report_of_a_finished_run() -> None:
    lines = final_report(SUMMARY, Path("runs/demo"))
    assert [" ".join(line.split()) for line in lines] == [
        "VinePPO, seed 3: 60 iterations, 120 updates",
        "wall-clock 3 min 1 s training, 12.3 s evaluation",
        "accuracy before 12.5% [9.0, 16.0]",
        "accuracy after 50.0% [45.0, 55.0] +37.5 points",
        "tokens 210,000 rollouts, 1,900,000 MC rollouts (generated); 420,000 trained",
        "run runs/demo",
        "plots runs/demo/plots",
        "model runs/demo/final",
    ]


def test_report_of_an_interrupted_run_contains_the_command_to_resume() -> None:
    summary = {**SUMMARY, "finish_reason": "interrupted", "accuracy_after": None, "final": None}
    lines = final_report(summary, Path("runs/demo"))
    assert lines[0].endswith("interrupted")
    assert lines[-1].endswith("vineppo train --resume runs/demo")
    assert not any("model" in line or "plots" in line for line in lines)


def test_output_without_terminal_has_one_line_per_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(Config(), live=False)
    reporter.start("sampling with PyTorch")
    reporter.iteration({"iteration": 0, "eval/accuracy": 0.1})
    reporter.iteration(LINE)
    reporter.finish(SUMMARY, Path("runs/a"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        "VinePPO on embedded:judgement, task chain (judgement, 10 steps): 8 problems x 4 responses"
    )
    assert [line.split()[0] for line in lines[1:4]] == ["sampling", "start", "iteration"]
    assert not any("\x1b" in line for line in lines)


def test_start_without_evaluation_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleReporter(Config(), live=False).iteration({"iteration": 0, "updates": 0})
    assert capsys.readouterr().out == ""


def test_terminal_keeps_the_lines_of_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(Config(), live=True)
    reporter.start("sampling with PyTorch")
    reporter.iteration(LINE)
    reporter.close()
    reporter.close()
    assert "accuracy 45.3%" in capsys.readouterr().out


def test_terminal_shows_the_phase_of_an_iteration() -> None:
    """The bar moves within an iteration by the shares that the phases of the iteration before had."""
    reporter = ConsoleReporter(Config(run=RunConfig(iterations=4)), live=True)
    reporter.start("sampling with PyTorch")
    seconds = {"seconds/sample": 1.0, "seconds/credit": 2.0, "seconds/update": 4.0, "seconds/eval": 1.0}
    states = []

    def note() -> None:
        [task] = reporter._bar.tasks
        states.append((task.fields["phase"], task.completed, task.description))

    reporter.phase("eval")
    note()
    reporter.iteration({"iteration": 0, "tokens/generated": 0, "eval/accuracy": 0.25})
    reporter.iteration({"iteration": 1, "tokens/generated": 3000, "reward/mean": 0.5, **seconds})
    for name in ("sample", "credit", "update", "eval"):
        reporter.phase(name)
        note()
    reporter.iteration({"iteration": 2, "tokens/generated": 9000, "reward/mean": 0.75, **seconds, "eval/accuracy": 0.5})
    note()
    reporter.close()
    text = "1/4  reward 0.500  accuracy 25.0%  1k tokens/s"
    assert states == [
        ("evaluating", 0.0, "starting model"),
        ("sampling", 0.25, text),
        ("credit", 0.25 + 0.25 / 8, text),
        ("updating", 0.25 + 0.25 * 3 / 8, text),
        ("evaluating", 0.25 + 0.25 * 7 / 8, text),
        ("evaluating", 0.5, "2/4  reward 0.750  accuracy 50.0%  2k tokens/s"),
    ]


def test_a_pipe_gets_no_phases(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter(Config(), live=False)
    reporter.phase("sample")
    assert capsys.readouterr().out == ""


def test_tokens_per_second_need_two_lines() -> None:
    line = {"tokens/generated": 500, "seconds/sample": 1.0, "seconds/credit": 1.5}
    assert tokens_per_second(line, {"tokens/generated": 100}) == 160
    assert tokens_per_second(line, {}) is None and tokens_per_second({"tokens/generated": 5}, line) is None
    assert share_before("update", {}) == 0 and share_before("unknown", line) == 0
    assert share_before("credit", line) == 0.4


def test_short_numbers_and_durations() -> None:
    assert [short_number(n) for n in (96, 45_600, 1_234_567, 2e9)] == ["96", "45.6k", "1.23M", "2B"]
    assert [duration(s) for s in (None, 5.25, 75.2, 3600)] == ["-", "5.2 s", "1 min 15 s", "1 h 0 min"]


def test_recipe_is_plain_data() -> None:
    assert json.dumps(load_recipe("judgement"))  # raises TypeError for other than JSON types
