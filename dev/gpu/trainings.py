"""Trainings: on the GPU and on the CPU, killed and resumed, and the default recipe."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml
from dev.gpu.part import GIB, Cells, Part

import vineppo
from vineppo.config.load import config_to_dict
from vineppo.config.schema import Config
from vineppo.training.loop import resume

COMPARED = (
    "reward/mean",
    "policy/loss",
    "policy/grad_norm",
    "kl/ref",
    "policy/kl_old",
    "policy/entropy",
    "policy/sampler_logprob_gap",
    "response/length_mean",
    "tokens/generated",
)
"""Metrics that `trainings` shows side by side."""


def check_trainings(part: Part) -> None:
    """Train three iterations on the GPU and on the CPU with VinePPO and GRPO."""
    for algorithm in ("vineppo", "grpo"):
        part.check(5)
        with tempfile.TemporaryDirectory() as folder:
            runs = {"GPU": Path(folder) / "gpu", "CPU": Path(folder) / "cpu"}
            for name, run in runs.items():
                vineppo.train(_short_training(part, algorithm, run, part.device if name == "GPU" else "cpu"))
                part.clear()
            lines = {name: _read_lines(run)[1:] for name, run in runs.items()}
            responses = {
                name: pq.read_table(run / "rollouts" / "000001.parquet")["response"].to_pylist()
                for name, run in runs.items()
            }
        equal = [a == b for a, b in zip(responses["GPU"], responses["CPU"], strict=True)]
        part.facts[f"{algorithm}: share of equal responses in iteration 1"] = sum(equal) / len(equal)
        _add_iterations(part, algorithm, lines)


def _short_training(part: Part, algorithm: str, run: Path, device: str) -> Config:
    problems, group = (16, 1) if algorithm == "vineppo" else (4, 4)
    overrides: Cells = {
        "model.device": device,
        "rollouts.num_problems": problems // 4 if part.small else problems,
        "rollouts.group_size": group,
        "learner.minibatch_size": 4,
        "learner.warmup_updates": 0,
        "eval.every": 0,
        "eval.final_num_problems": 0,
        "run.iterations": 2 if part.small else 3,
        "run.checkpoint_every": 0,
        "run.dir": str(run),
    }
    if part.small:
        overrides |= {"task.num_steps": 3, "rollouts.max_new_tokens": 40}
    return vineppo.build_config(vineppo.load_recipe("judgement"), algorithm, overrides)


def _add_iterations(part: Part, algorithm: str, lines: Mapping[str, list[Cells]]) -> None:
    for gpu, cpu in zip(lines["GPU"], lines["CPU"], strict=True):
        iteration = {"algorithm": algorithm, "iteration": gpu["iteration"]}
        for metric in (name for name in COMPARED if name in gpu):
            cells = {"metric": metric, "GPU": gpu[metric], "CPU": cpu[metric], "difference": gpu[metric] - cpu[metric]}
            name = "iteration 1" if gpu["iteration"] == 1 else "later iterations, after different samples"
            part.row(name, {**iteration, **cells})
        seconds = {
            f"{phase}, {name}": round(line[f"seconds/{phase}"], 3)
            for phase in ("sample", "credit", "update")
            for name, line in (("GPU", gpu), ("CPU", cpu))
        }
        part.row("seconds", {**iteration, **seconds})


def _read_lines(run: Path) -> list[Cells]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# resume


def check_resume(part: Part) -> None:
    """Kill a run after its first checkpoint and resume it; compare it, and a second unbroken run, with a first one."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again, cut = (Path(folder) / name for name in ("whole", "again", "cut"))
        process = _start(_interrupted_run(part, cut))
        try:
            while not (cut / "checkpoints" / "000001").exists() and process.poll() is None:
                time.sleep(0.01)
                part.check()
            time.sleep(0.1)
        finally:
            process.kill()  # SIGKILL
        output = process.communicate()[0]
        if process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the run ended before it was killed: {output[-600:]}")
        part.facts["iterations of the killed run"] = _read_lines(cut)[-1]["iteration"]
        part.facts["its checkpoint"] = max(path.name for path in (cut / "checkpoints").iterdir() if path.name.isdigit())
        vineppo.train(_interrupted_run(part, whole))
        resume(_interrupted_run(part, cut))
        part.row("against an unbroken run", {"run": "killed and resumed", **_difference(whole, cut)})
        part.check(2)
        vineppo.train(_interrupted_run(part, again))
        part.row("against an unbroken run", {"run": "unbroken again", **_difference(whole, again)})


def _interrupted_run(part: Part, run: Path) -> Config:
    overrides: Cells = {
        "model.device": part.device,
        "rollouts.num_problems": 4 if part.small else 16,
        "learner.minibatch_size": 4,
        "eval.every": 0,
        "eval.final_num_problems": 0,
        "run.iterations": 4,
        "run.checkpoint_every": 1,
        "run.dir": str(run),
    }
    if part.small:
        overrides |= {"task.num_steps": 3, "rollouts.max_new_tokens": 40}
    return vineppo.build_config(vineppo.load_recipe("judgement"), None, overrides)


def _start(config: Config) -> subprocess.Popen[str]:
    """Start a training in another process."""
    path = Path(config.run.dir).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    source, threads = Path(str(vineppo.__file__)).resolve().parents[1], torch.get_num_threads()
    python_path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "vineppo", "train", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _difference(whole: Path, other: Path) -> Cells:
    """Return whether two runs have the same metrics and weights, and the first metric that differs."""
    first, largest, lines = "", 0.0, _read_lines(whole)
    for one, two in zip(lines, _read_lines(other), strict=True):
        for key in (key for key in one if not key.startswith("seconds/")):
            if one[key] != two.get(key):
                first = first or f"iteration {one['iteration']}, {key}: {one[key]} and {two.get(key)}"
                largest = max(largest, abs(one[key] - two.get(key, 0.0)) / max(abs(one[key]), 1e-12))
    hashes = [hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest() for run in (whole, other)]
    return {
        "iterations": lines[-1]["iteration"],
        "same metrics": not first,
        "same weights": hashes[0] == hashes[1],
        "first difference": first,
        "largest relative difference": largest,
    }


# learning


class InTime:
    """A reporter that records the accuracies, and ends the run in time for the last evaluation."""

    def __init__(self, part: Part):
        self.part = part
        self.began = self.evaluation = 0.0

    def start(self, sampler: str) -> None:
        """Note the time at which the first evaluation starts."""
        self.began = time.perf_counter()

    def phase(self, name: str) -> None:
        """Do nothing."""

    def before_iteration(self, iteration: int) -> None:
        """Do nothing."""

    def saved(self, iteration: int) -> None:
        """Do nothing."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Record the accuracy, if the iteration has one."""
        if metrics["iteration"] == 0:
            self.evaluation = time.perf_counter() - self.began
        if "eval/accuracy" in metrics:
            keys = {"iteration": "iteration", "eval/accuracy": "accuracy", "seconds/train": "seconds of training"}
            self.part.row("validation", {label: metrics[key] for key, label in keys.items()})

    def wants_to_stop(self) -> bool:
        """Return whether the time left is only enough for the last evaluation."""
        return self.part.left() < 1.2 * self.evaluation + 2

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Record the summary of the run."""
        seconds, iterations = summary["seconds"], summary["iterations"]
        self.part.facts |= {
            "accuracy before": summary["accuracy_before"],
            "accuracy after": summary["accuracy_after"],
            "iterations": iterations,
            "updates": summary["updates"],
            "finish_reason": summary["finish_reason"],
            "seconds of training": round(seconds, 2),
            "seconds of evaluation": round(summary["seconds_eval"], 2),
            "seconds per iteration": round(seconds / max(1, iterations), 3),
            "generated tokens": summary["tokens"]["generated"],
            "peak in GiB": round(summary["peak_memory_bytes"] / GIB, 3),
        }


def check_learning(part: Part) -> None:
    """Train the default recipe for as many iterations as fit into the time, at most 60."""
    overrides: Cells = {"model.device": part.device, "run.checkpoint_every": 0}
    if part.small:
        overrides |= {"run.iterations": 3, "rollouts.num_problems": 8, "learner.minibatch_size": 8, "eval.every": 2}
        overrides |= {"eval.num_problems": 8, "eval.final_num_problems": 16, "task.num_steps": 3}
    part.check(10 if not part.small else 1)
    with tempfile.TemporaryDirectory() as folder:
        overrides["run.dir"] = str(Path(folder) / "run")
        config = vineppo.build_config(vineppo.load_recipe("judgement"), None, overrides)
        vineppo.train(config, recipe="judgement", reporter=InTime(part))
