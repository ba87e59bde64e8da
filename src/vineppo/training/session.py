"""The state of a running training, and functions that evaluate, log and save it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vineppo.config.schema import EvalConfig, RolloutConfig, RunConfig
from vineppo.run.checkpoint import save_checkpoint
from vineppo.run.clock import peak_memory
from vineppo.run.directory import RunDirectory
from vineppo.run.trackers import Tracker
from vineppo.run.trl_names import with_trl_names
from vineppo.training.evaluate import Measurement, measure
from vineppo.training.parts import Parts
from vineppo.training.progress import Progress, cumulative
from vineppo.training.rollouts import problem_range
from vineppo.types import Split


class Reporter(Protocol):
    """Receives the progress of a run, for example to print it."""

    def start(self) -> None:
        """Called before the first iteration."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Called after each iteration with its line of metrics.jsonl."""

    def wants_to_stop(self) -> bool:
        """Return whether the run should end now, with a final evaluation; called between iterations."""

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Called at the end with the content of summary.json."""


@dataclass(frozen=True)
class Session:
    """A running training: its parts, its settings and its outputs."""

    parts: Parts
    run: RunDirectory
    trackers: list[Tracker]
    reporter: Reporter | None
    limits: RunConfig
    rollouts: RolloutConfig
    evaluation: EvalConfig
    epochs: int
    updates_per_iteration: int
    began: float
    """Start of this process's part of the run, as a value of `time.perf_counter()`."""

    def seconds_total(self, progress: Progress) -> float:
        """Return the seconds of this process, plus those of earlier ones up to their last checkpoint."""
        return progress.seconds_total + time.perf_counter() - self.began


def measured(session: Session, split: Split, count: int, address: tuple[int | str, ...]) -> Measurement:
    """Sample and grade responses to the first `count` problems of a split."""
    parts = session.parts
    return measure(
        parts.codec,
        parts.sampler,
        parts.task,
        problem_range(parts.task, split, count),
        num_samples=session.evaluation.num_samples,
        max_new_tokens=session.rollouts.max_new_tokens,
        temperature=session.evaluation.temperature,
        stop=session.rollouts.stop,
        address=(session.limits.seed, *address),
    )


def evaluate(session: Session, progress: Progress) -> tuple[Progress, dict[str, float | None]]:
    """Measure the accuracy on the validation problems; returns the new progress and the metrics."""
    began = time.perf_counter()
    measurement = measured(session, "validation", session.evaluation.num_problems, ("eval", progress.iteration))
    interval = measurement.mean_reward(session.limits.seed)
    seconds, best = time.perf_counter() - began, progress.best_validation_accuracy
    progress = replace(
        progress,
        seconds_eval=progress.seconds_eval + seconds,
        best_validation_accuracy=interval.mean if best is None else max(best, interval.mean),
    )
    return progress, {
        "eval/accuracy": interval.mean,
        "eval/accuracy_low": interval.low,
        "eval/accuracy_high": interval.high,
        "seconds/eval": seconds,
    }


def evaluate_before(session: Session, progress: Progress) -> Progress:
    """Measure the starting model, log it as iteration 0 and save a checkpoint."""
    began = time.perf_counter()
    progress = replace(progress, accuracy_before=_final_accuracy(session, "before"))
    progress = replace(progress, seconds_eval=time.perf_counter() - began)
    line: dict[str, Any] = {"iteration": 0, "updates": 0, **cumulative(progress)}
    if session.evaluation.every:
        progress, accuracy = evaluate(session, progress)
        line.update(accuracy)
    log(session, line)
    save(session, progress)
    return progress


def finish(session: Session, progress: Progress, reason: str) -> dict[str, Any]:
    """Save a last checkpoint; unless interrupted, measure and save the model. Returns the content of summary.json."""
    save(session, progress)
    after: dict[str, float | None] | None = None
    if reason != "interrupted":
        began = time.perf_counter()
        after = _final_accuracy(session, "after")
        progress = replace(progress, seconds_eval=progress.seconds_eval + time.perf_counter() - began)
        session.parts.policy.save(session.run.final)
    return {
        "algorithm": session.parts.algorithm.name,
        "label": session.parts.algorithm.label,
        "seed": session.limits.seed,
        "recipe": progress.recipe,
        "finish_reason": reason,
        "accuracy_before": progress.accuracy_before,
        "accuracy_after": after,
        "best_validation_accuracy": progress.best_validation_accuracy,
        "updates": session.parts.learner.updates,
        "iterations": progress.iteration,
        "seconds": progress.seconds_train,
        "seconds_eval": progress.seconds_eval,
        "seconds_total": session.seconds_total(progress),
        "tokens": {
            "rollouts": progress.rollout_tokens,
            "mc": progress.mc_tokens,
            "generated": progress.rollout_tokens + progress.mc_tokens,
            "trained": progress.trained_tokens,
        },
        "peak_memory_bytes": peak_memory(session.parts.policy.device),
        "final": "final" if reason != "interrupted" else None,
    }


def _final_accuracy(session: Session, when: str) -> dict[str, float | None]:
    """Accuracy before or after training on `eval.final_num_problems` problems; None if that is 0."""
    settings = session.evaluation
    if not settings.final_num_problems:
        return {"mean": None, "low": None, "high": None}
    return measured(session, settings.split, settings.final_num_problems, (when,)).mean_reward(0).as_dict()


def log(session: Session, line: dict[str, Any]) -> None:
    """Send a line of metrics to metrics.jsonl, the trackers and the reporter."""
    session.run.append_metrics(line)
    for tracker in session.trackers:
        tracker.log(with_trl_names(line), line["iteration"])
    if session.reporter:
        session.reporter.iteration(line)


def save(session: Session, progress: Progress) -> None:
    """Write a checkpoint."""
    state = {
        "progress": asdict(replace(progress, seconds_total=session.seconds_total(progress))),
        "torch_rng": torch.get_rng_state(),
    }
    keep = session.limits.keep_checkpoints
    save_checkpoint(session.run.checkpoints, progress.iteration, state, keep, [session.parts.learner.save])
