"""Mistakes on the command line: each is answered by one line that names the culprit, without loading a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vineppo
from vineppo.cli.main import main
from vineppo.config import hub
from vineppo.run.directory import RunDirectory
from vineppo.training.configure import build_config

DATA = ("--task.name", "dataset", "--task.train_path")
OUT = ("--out", "o")

FILES = {
    "broken.yaml": "learner: {lr: 1\n",
    "list.yaml": "- learner\n",
    "twice.yaml": "run: {seed: 1}\nrun: {seed: 2}\n",
    "dotted_twice.yaml": "run: {seed: 1}\nrun.seed: 2\n",
    "section.yaml": "learner: fast\n",
    "tabs.yaml": "learner:\n\tlr: 1\n",
    "wrong_overrides.yaml": "overrides: {dpo: {learner.lr: 1}}\n",
    "text.yaml": "run: {iterations: many}\n",
    "empty.jsonl": "",
    "words.jsonl": "one word\n",
    "numbers.jsonl": "1\n2\n",
    "good.jsonl": '{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "answer": "3"}\n',
    "prompts.jsonl": '{"prompt": "1+1"}\n',
    "question.csv": "question,answer\n1+1,2\n",
    "ragged.csv": "prompt,answer\n1+1\n",
    "raises.py": "raise ValueError('no luck')\n",
    "things.py": "number = 3\ndef cut(tokens):\n    return [len(tokens)]\nclass Grader: pass\n",
    "needs.py": "import a_module_that_is_not_there\n",
    "some_file": "text",
}

MISTAKES: list[tuple[list[str], str]] = [
    # names of commands and options
    (["Train"], "unknown command Train; did you mean train?"),
    (["--algorithm", "grpo"], "unknown option --algorithm"),
    (["run", "judgement"], "unknown command run"),
    (["train", "--learning_rate", "1e-5"], "did you mean --learner.lr?"),
    (["train", "--num_generations", "8"], "unknown option --num_generations; did you mean --rollouts.group_size?"),
    (["train", "--num-generations=8"], "did you mean --rollouts.group_size?"),
    (["train", "--max_completion_length", "64"], "did you mean --rollouts.max_new_tokens?"),
    (["train", "--beta", "0.1"], "did you mean --learner.kl.coefficient?"),
    (["train", "--num_iterations", "2"], "did you mean --learner.epochs?"),
    (["train", "--epsilon", "0.1"], "did you mean --learner.clip_low?"),
    (["train", "--output_dir", "x"], "did you mean --run.dir?"),
    (["train", "--max_steps", "9"], "did you mean --run.max_updates?"),
    (["train", "--per_device_train_batch_size", "9"], "did you mean --learner.minibatch_size?"),
    (["train", "--lora_r", "8"], "did you mean --model.lora.r?"),
    (["train", "--resume_from_checkpoint", "x"], "did you mean --resume?"),
    (["train", "-lr", "3"], "unknown option -lr"),
    (["train", "--learner.Lr", "3"], "unknown option --learner.Lr; did you mean --learner.lr?"),
    (["eval", "embedded:habit", "--max_completion_length", "9"], "unknown option --max_completion_length"),
    (["sft", "--learning_rate", "1", *OUT], "did you mean --lr?"),
    (["plan", "--gpus", "h100"], "unknown option --gpus; did you mean --gpu?"),
    (["compare", "judgement", "--output", "o"], "unknown option --output"),
    (["demo", "--seed", "3"], "unknown option --seed; did you mean --run.seed?"),
    # values
    (["train", "--run.seed", "-1"], "run.seed is '-1' on the command line; it must be at least 0"),
    (["train", "--run.seed", "one"], "run.seed is 'one' on the command line; it must be a whole number"),
    (["train", "--run.iterations", "0"], "run.iterations is '0' on the command line; it must be at least 1"),
    (["train", "--learner.lr", "inf"], "learner.lr is 'inf'"),
    (["train", "--learner.lr", "nan"], "learner.lr is 'nan'"),
    (["train", "--learner.lr", ""], "learner.lr is ''"),
    (["train", "--learner.lr", "1,5e-5"], "learner.lr is '1,5e-5' on the command line; it must be a number"),
    (["train", "--learner.betas", "0.9"], "learner.betas is ['0.9'] on the command line; it must have 2 values"),
    (["train", "--learner.betas", "0.9,1"], "learner.betas is [0.9, 1.0]; each value must be at least 0 and below 1"),
    (["train", "--learner.clip_low", "2"], "learner.clip_low is '2' on the command line; allowed: above 0, at most 1"),
    (["train", "--rollouts.temperature", "0"], "rollouts.temperature is '0'"),
    (["train", "--rollouts.num_problems", "2.5"], "rollouts.num_problems is '2.5'"),
    (
        ["train", "judgement", "--learner.minibatch_size", "999"],
        "learner.minibatch_size is 999 but an iteration has 32 rollouts",
    ),
    (["train", "--run.save_rollouts", "maybe"], "run.save_rollouts is 'maybe' on the command line; it must be true"),
    (["train", "--eval.split", "train"], "eval.split is 'train' on the command line; allowed: validation, test"),
    (
        ["train", "--learner.kl.estimator", "k4"],
        "learner.kl.estimator is 'k4' on the command line; allowed: k1, k2, k3",
    ),
    (["train", "--learner.kl.estimator", "k1", "--learner.kl.coefficient", "1"], "learner.kl.estimator is k1"),
    (["train", "--task.num_steps", "26"], "task.num_steps is 26; it must be at most 25"),
    (["train", "--task.level", "judgment"], "task.level is 'judgment' on the command line; allowed: judgement, habit"),
    (["train", "--task.name", "gsm"], "task.name is 'gsm'; allowed: chain, gsm8k, math, dataset"),
    (["train", "--task.grading.truncated", "true"], "task.grading.truncated is true, but task.name is chain"),
    (["train", "--task.prompt_template", "Solve it."], "task.prompt_template is 'Solve it.'; it must contain {prompt}"),
    (["train", "--guards.max_logprob_gap", "-1"], "guards.max_logprob_gap is '-1'"),
    # devices, data types, models
    (["train", "--model.device", "gpu"], "model.device is 'gpu'; did you mean cuda?"),
    (["train", "--model.device", "0"], "model.device is '0'; did you mean cuda?"),
    (["train", "--model.device", "cuda:x"], "model.device is 'cuda:x'"),
    (["train", "--model.device", "CPU"], "model.device is 'CPU'; did you mean cpu?"),
    (["train", "--model.dtype", "bf16"], "model.dtype is 'bf16' on the command line; allowed: float32, bfloat16"),
    (["train", "--model.dtype", "float16"], "model.dtype is 'float16'"),
    (
        ["train", "--model.path", "embedded:judgment"],
        "the package does not include this model; allowed: embedded:habit",
    ),
    (["train", "--model.path", "judgement"], "model.path 'judgement' does not exist here"),
    (["train", "--model.path", "models/mine/final"], "model.path 'models/mine/final' does not exist"),
    (["train", "--model.path", "some_file"], "model.path 'some_file' is a file"),
    (["train", "--model.path", "a_folder"], "model.path 'a_folder' has no config.json"),
    (["train", "--model.path", "two words"], "model.path 'two words' does not exist"),
    (["train", "--model.path", "org/none"], "model.path 'org/none' does not exist here, and the Hugging Face Hub"),
    (["train", "--model.lora.r", "-4"], "model.lora.r is '-4' on the command line; it must be at least 0"),
    (["train", "--model.lora.targets", ""], "model.lora.targets is empty"),
    # algorithms and splitters
    (["train", "--algorithm", "vine-ppo"], "algorithm is 'vine-ppo'; did you mean vineppo?"),
    (["train", "--algorithm", "grpo", "--vineppo.num_mc_rollouts", "3"], "is a setting of vineppo, but the algorithm"),
    (["train", "--algorithm", "things:absent"], "module 'things' has no 'absent'"),
    (["train", "--algorithm", "things:number"], "algorithm 'things:number' is a int; it must be a vineppo.Algorithm"),
    (["train", "--algorithm", "raises:it"], "importing 'raises' failed: ValueError: no luck"),
    (["train", "--algorithm", "absent:it"], "no module 'absent' in the current directory"),
    (
        ["train", "judgement", "--vineppo.splitter", "newlines"],
        "unknown splitter 'newlines'; allowed: newline, math, tokens:N",
    ),
    (["train", "judgement", "--vineppo.splitter", "tokens:0"], "unknown splitter 'tokens:0'"),
    (
        ["train", "judgement", "--vineppo.splitter", "regex:("],
        "splitter 'regex:(': '(' is not a valid regular expression",
    ),
    (
        ["train", "judgement", "--vineppo.splitter", "things:number"],
        "splitter 'things:number' is a int; it must be a function",
    ),
    (["train", "judgement", "--vineppo.splitter", "needs:cut"], "importing 'needs' failed: ModuleNotFoundError"),
    (["train", "judgement", "--vineppo.max_states", "-1"], "vineppo.max_states is '-1'"),
    (
        ["train", "judgement", "--vineppo.reuse", "false", "--vineppo.alternatives", "true"],
        "vineppo.alternatives is true, but",
    ),
    # recipes
    (["train", "judgment"], "is neither a recipe of the package nor a file; did you mean judgement?"),
    (["train", "my.yaml"], "recipe 'my.yaml' does not exist (a relative path starts at "),
    (["train", "a_folder"], "recipe 'a_folder' is a directory"),
    (["train", "broken.yaml"], "recipe broken.yaml is not valid YAML"),
    (["train", "list.yaml"], "recipe list.yaml contains a list; it must contain keys"),
    (["train", "twice.yaml"], "recipe twice.yaml is not valid YAML in line 2: key run is repeated"),
    (["train", "dotted_twice.yaml"], "run.seed is set twice in recipe dotted_twice.yaml"),
    (["train", "section.yaml"], "learner is 'fast' in recipe section.yaml; it is a section"),
    (["train", "tabs.yaml"], "recipe tabs.yaml is not valid YAML in line 2"),
    (["train", "text.yaml"], "run.iterations is 'many' in recipe text.yaml; it must be a whole number"),
    (["train", "wrong_overrides.yaml"], "unknown algorithm 'dpo' under overrides"),
    (["train", "sft-habit"], "sft-habit is a recipe for `vineppo sft`"),
    # data and rewards
    (["train", "--task.name", "dataset"], "task.train_path is empty"),
    (["train", *DATA, "x.jsonl"], "task.train_path: no such file: x.jsonl"),
    (["train", *DATA, "words.jsonl"], "words.jsonl line 1 is not a JSON object"),
    (["train", *DATA, "numbers.jsonl"], "numbers.jsonl line 1 is a int, not a JSON object"),
    (["train", *DATA, "question.csv"], "has no column 'prompt' (it has: question, answer)"),
    (["train", *DATA, "ragged.csv"], "ragged.csv line 2 does not have the same number of cells as the header"),
    (["train", *DATA, "empty.jsonl"], "task.train_path: empty.jsonl is empty"),
    (["train", *DATA, "good.jsonl", "--task.prompt_column", "promt"], "did you mean 'prompt'? set task.prompt_column"),
    (["train", *DATA, "good.jsonl", "--task.answer_column", "ans"], "has no column 'ans' (it has: prompt, answer)"),
    (
        ["train", *DATA, "question.csv", "--task.prompt_column", "question", "--task.answer_column", "a"],
        "no column 'a'",
    ),
    (
        ["train", *DATA, "prompts.jsonl"],
        "prompts.jsonl has no column 'answer' (it has: prompt); set task.answer_column",
    ),
    (["train", *DATA, "good.jsonl", "--eval.split", "test"], "or use --eval.split validation (the last rows of"),
    (
        ["eval", "embedded:habit", *DATA, "good.jsonl"],
        "split is test, but there is no test split: task.test_path is empty; set task.test_path to a file of problems, "
        "or use --split validation (the last rows of task.train_path)",
    ),
    (
        ["eval", "embedded:habit", *DATA, "good.jsonl", "--task.validation_path", "good.jsonl"],
        "or use --split validation (task.validation_path)",
    ),
    (["train", *DATA, "good.jsonl", "--task.rewards", "exakt"], "'exakt'"),
    (
        ["train", *DATA, "good.jsonl", "--task.rewards", "things:cut"],
        "reward function things:cut has the signature (tokens), which does not fit (got an unexpected keyword argument "
        "'prompts'); it is called as fn(prompts, completions, completion_ids, answer, **columns)",
    ),
    (["train", "--task.rewards", "things:Grader"], "reward function things:Grader has the signature ()"),
    (["train", *DATA, "good.jsonl", "--task.rewards", "things:absent"], "module 'things' has no 'absent'"),
    (["train", *DATA, "good.jsonl", "--task.rewards", "exact", "--task.reward_weights", "1,2"], "has 2 numbers for 1"),
    (
        ["train", "--task.name", "gsm8k"],
        "task.train_path 'openai/gsm8k/main' does not exist here, and the Hugging Face",
    ),
    # places
    (["train", "--run.dir", "/proc/x"], "run directory /proc/x cannot be written"),
    (["train", "--run.dir", "some_file"], "run directory some_file cannot be written"),
    (["train", "--run.dir", "a_folder"], "run directory a_folder already exists and is not empty"),
    (["train", "--run.report_to", "mlflow"], "run.report_to has mlflow; allowed: tensorboard, wandb, trackio"),
    (["train", "--resume", "a_folder"], "a_folder is not a run directory: it has no config.yaml"),
    (["train", "--resume", "some_file"], "no run directory at some_file"),
    (["train", "--resume", "a_run"], "run a_run is finished (finish_reason: iterations) and cannot be resumed"),
    (["train", "--resume", "a_run", "--run.seed", "7"], "cannot change the settings of the run (run.seed: 0 -> 7)"),
    (["train", "--resume", "a_run", "--algorithm", "ppo"], "(algorithm: vineppo -> ppo; "),
    (
        ["train", "--resume", "a_run", "--from", "7"],
        "--from 7: allowed: newest, best, or the iteration of a checkpoint (0, 2)",
    ),
    (["train", "--resume", "a_run", "--from", "\u00b2"], "--from \u00b2: allowed: newest, best, or"),
    (["train", "--resume", "a_run", "--from", "7" * 5000], "allowed: newest, best, or the iteration"),
    (["train", "--resume", "a_run", "--run.dir", "other"], "--run.dir is 'other', but --resume continues the run in"),
    (
        ["train", "--resume", "a_run", "--run.iterations", "999", "--run.report_to", "mlflow"],
        "run.report_to has mlflow; allowed: tensorboard",
    ),
    (["plot", "a_run"], "a_run/metrics.jsonl is damaged: the line of iteration 1 has no number 'updates'; remove that"),
    (["plot", "b_run"], "the plots of b_run cannot be made: b_run/plots: File exists"),
    (["eval", "runs/nothing"], "model.path 'runs/nothing' does not exist"),
    (["eval", "org/none"], "model.path 'org/none' does not exist here, and the Hugging Face Hub cannot be reached"),
    (["eval", "sft-habit"], "sft-habit is a recipe for `vineppo sft`"),
    (["eval", "embedded:habit", "--num_samples", "2", "--k", "3"], "pass@k needs 1 <= k <= num_samples, which is 2"),
    (["sft", "--out", "a_folder"], "out 'a_folder' already exists and is not an empty directory"),
    (["sft", "judgement", "judgement", *OUT], "unexpected argument judgement"),
    (
        ["offline", "--run.dir", "a_folder"],
        "run directory a_folder already exists and is not empty; give another run.dir",
    ),
    (["offline", "--task.name", "dataset"], "task.train_path is empty; task.name dataset needs problems"),
    (
        ["offline", "--method", "dpo_positive", "--restem.rounds", "2"],
        "restem.rounds on the command line is a setting of restem, but method is dpo_positive; remove restem.rounds",
    ),
    (
        ["offline", "--method", "dpo_positive", "--rollouts.group_size", "1"],
        "rollouts.group_size is 1; dpo_positive compares right and wrong responses to one problem and needs at least 2",
    ),
    (["offline", "--model.lora.dropout", "0.1"], "`vineppo offline` trains without dropout"),
    (["offline", "--betas", "0.9,1"], "betas is [0.9, 1.0]; each value must be at least 0 and below 1"),
    (["offline", "--model.path", "absent"], "model.path 'absent' does not exist"),
    (["offline", *DATA, "absent.jsonl"], "absent.jsonl"),
    (["offline", *DATA, "good.jsonl", "--eval.split", "test"], "eval.split is test, but there is no test split"),
    # comparisons and plans
    (["compare", "judgement", *OUT, "--seeds", "0"], "seeds is 0; it must be at least 1"),
    (["compare", "judgement", *OUT, "--jobs", "0"], "jobs is 0; it must be at least 1"),
    (["compare", "judgement", *OUT, "--jobs", "1.5"], "--jobs is '1.5'; it must be a whole number"),
    (["compare", "judgement", *OUT, "--budget", "updates"], "budget is 'updates', but '' is not a number"),
    (["compare", "judgement", *OUT, "--budget", "updates=-3"], "budget is updates=-3; it must be a finite number"),
    (["compare", "judgement", *OUT, "--budget", "updates=1.5"], "the number of updates must be a whole number"),
    (["compare", "judgement", *OUT, "--algorithms", "ppo,ppo"], "the comparison contains ppo more than once"),
    (["compare", "judgement", *OUT, "--algorithms", ""], "algorithm is ''"),
    (
        ["compare", "judgement", *OUT, "--algorithms", "ppo", "--grpo.scale_by_std", "true"],
        "grpo, which is not compared",
    ),
    (["compare", "judgement", *OUT, "--run.iterations", "3"], "run.iterations is set by `vineppo compare`"),
    (["plan", "--response_tokens", "9"], "--response_tokens is 9; it must be above 0 and needs --gpu"),
    (["plan", "--gpu", "h100", "--response_tokens", "-9"], "--response_tokens is -9"),
]


def write_files(folder: Path) -> None:
    """Write the files of FILES, a folder that is not empty, and two finished runs."""
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "a_folder").mkdir()
    (folder / "a_folder" / "note.txt").write_text("text")
    for name in ("a_run", "b_run"):
        run = RunDirectory.create(folder / name, build_config({}, "vineppo", {"model.path": "embedded:habit"}))
        for iteration in (0, 2):
            (run.checkpoints / f"{iteration:06d}").mkdir()
        run.write_summary({"finish_reason": "iterations"})
    (folder / "a_run" / "metrics.jsonl").write_text('{"iteration": 0, "updates": 0}\n{"iteration": 1}\n')
    (folder / "b_run" / "metrics.jsonl").write_text('{"iteration": 1, "updates": 1, "reward/mean": null}\n')
    (folder / "b_run" / "plots").rmdir()
    (folder / "b_run" / "plots").write_text("text")


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[" ".join(argv)[:60] for argv, _ in MISTAKES])
def test_a_mistake_is_answered_by_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases 21 to 23. The Hub counts as unreachable, so that the tests do not depend on the network."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_ask", lambda name, kind: "unreachable")
    monkeypatch.setattr(hub, "_answers", {})
    monkeypatch.setattr(hub, "is_downloaded", lambda name, kind: False)
    for name in ("raises", "things", "needs"):
        sys.modules.pop(name, None)
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__")
    assert main(argv) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), output.err
    assert message in lines[0]
    assert not output.out
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == before


def test_there_are_many_different_mistakes() -> None:
    assert len({tuple(argv) for argv, _ in MISTAKES}) == len(MISTAKES) >= 90


BEFORE_PYTORCH = [
    ["train", "judgement", "--vineppo.splitter", "newlines"],
    ["train", "--run.dir", "some_file"],
    ["train", "--model.device", "gpu"],
    ["train", "--run.report_to", "tensorbord"],
    ["eval", "runs/nothing"],
    ["train", *DATA, "x.jsonl"],
    ["train", *DATA, "good.jsonl", "--task.answer_column", "ans"],
    ["train", *DATA, "good.jsonl", "--task.rewards", "things:cut"],
    ["train", *DATA, "good.jsonl", "--eval.split", "test"],
    ["eval", "embedded:habit", *DATA, "good.jsonl"],
    ["train", "--resume", "a_run"],
    ["train", "--resume", "a_run", "--run.seed", "7"],
    ["train", "--resume", "a_run", "--algorithm", "ppo"],
    ["train", "--resume", "a_run", "--from", "7"],
    ["train", "--resume", "a_run", "--run.iterations", "999", "--run.report_to", "mlflow"],
    ["train", "--resume", "a_run", "--run.iterations", "999", "--model.path", "absent"],
    ["offline", "--run.dir", "some_file"],
    ["offline", "--model.device", "gpu"],
    ["offline", "--method", "dpo"],
    ["WORLD_SIZE=2", "offline"],
    ["WORLD_SIZE=2", "train"],
    ["WORLD_SIZE=2", "train", "--resume", "a_run", "--run.iterations", "999"],
    ["WORLD_SIZE=2", "sft", "--model.path", "embedded:habit", *OUT],
    ["WORLD_SIZE=2", "eval", "embedded:habit"],
    ["WORLD_SIZE=2", "compare", "--out", "comparison"],
    ["WORLD_SIZE=2", "demo"],
]
"""Mistakes for which PyTorch is not imported. A first word with `=` is a variable of the environment."""
RUN_ALL = """
import contextlib, io, json, os, sys
from vineppo.cli.main import main

results = []
for argv in json.loads(sys.argv[1]):
    variable, is_set, value = argv[0].partition("=")
    if is_set:
        os.environ[variable] = value
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = main(argv[1:] if is_set else argv)
    os.environ.pop("WORLD_SIZE", None)
    imported = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
    results.append([code, len(error.getvalue().splitlines()), imported])
print(json.dumps(results))
"""


def test_a_mistake_is_reported_before_pytorch_is_imported(tmp_path: Path) -> None:
    """Case 23: importing PyTorch and transformers takes longer than finding the mistake. All in one process."""
    write_files(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(vineppo.__file__).parents[1])}
    command = [sys.executable, "-c", RUN_ALL, json.dumps(BEFORE_PYTORCH)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    results = json.loads(process.stdout)
    assert dict(zip(map(" ".join, BEFORE_PYTORCH), results, strict=True)) == {
        " ".join(argv): [2, 1, []] for argv in BEFORE_PYTORCH
    }
