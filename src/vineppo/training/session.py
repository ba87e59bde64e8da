"""Functions of the training loop that evaluate the model, log metrics and save checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vineppo.config.schema import EvalConfig, RolloutConfig, RunConfig
from vineppo.run.checkpoint import save_checkpoint
from vineppo.run.clock import peak_memory
from vineppo.run.directory import RunDirectory
from vineppo.run.files import directory_written_aside
from vineppo.run.trackers import Tracker
from vineppo.run.trl_names import with_trl_names
from vineppo.training.evaluate import Measurement, accuracy_metrics, measure
from vineppo.training.parts import Parts
from vineppo.training.progress import Progress, cumulative, with_best_checkpoint, with_evaluation
from vineppo.training.resuming import random_state
from vineppo.training.rollouts import problem_range
from vineppo.training.watch import Watch
from vineppo.types import Split


class Reporter(Protocol):
    """An object that receives the progress of a run, for example to print the progress."""

    def start(self, sampler: str) -> None:
        """Start the report. The training loop calls this method once, before the first iteration.

        Args:
            sampler: one line that says which sampler is used, and why.
        """

    def before_iteration(self, iteration: int) -> None:
        """Report the beginning of an iteration. Iterations are counted from 1."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Report an iteration. `metrics` is the content of the iteration's line in metrics.jsonl."""

    def saved(self, iteration: int) -> None:
        """Report that a checkpoint was written. `iteration` is the number of completed iterations."""

    def wants_to_stop(self) -> bool:
        """Return whether the run should end now, with a final evaluation. The loop asks between iterations."""

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Report the end of the run. `summary` is the content of summary.json."""


@dataclass(frozen=True)
class Session:
    """The objects, outputs and settings of a running training. What changes during the run is in `Progress`."""

    parts: Parts
    """The policy, the task, the sampler, the learner and the functions of the algorithm."""
    run: RunDirectory
    """The directory to which the run writes its files."""
    trackers: list[Tracker]
    """Experiment trackers to which the metrics are sent."""
    reporter: Reporter | None
    """Receives the progress of the run; None if there is no report."""
    limits: RunConfig
    """Settings of the section `run`: the length of the run, checkpoints and the seed."""
    rollouts: RolloutConfig
    """Settings of the section `rollouts`."""
    evaluation: EvalConfig
    """Settings of the section `eval`."""
    watch: Watch
    """Checks that stop the run, and warnings."""
    epochs: int
    """Number of passes of the learner over the samples of an iteration."""
    updates_per_iteration: int
    """Planned number of updates per iteration."""
    began: float
    """Value of `time.perf_counter()` when this process started or resumed the run."""

    def seconds_total(self, progress: Progress) -> float:
        """Return the duration of the run in seconds.

        If the run was resumed, this includes the time of earlier processes up to the checkpoint that was loaded.
        """
        return progress.seconds_total + time.perf_counter() - self.began


def measured(
    session: Session, split: Split, count: int, address: tuple[int | str, ...], *, greedy: bool = False
) -> Measurement:
    """Sample and grade responses to the first `count` problems of a split, with the settings of the evaluation.

    Args:
        address: values from which the sampling seeds are derived, in addition to the seed of the run.
        greedy: decode one greedy response per problem instead of `eval.num_samples` at `eval.temperature`.
    """
    parts = session.parts
    return measure(
        parts.codec,
        parts.sampler,
        parts.task,
        problem_range(parts.task, split, count),
        num_samples=1 if greedy else session.evaluation.num_samples,
        max_new_tokens=session.rollouts.max_new_tokens,
        temperature=0.0 if greedy else session.evaluation.temperature,
        stop=session.rollouts.stop,
        address=(session.limits.seed, *address),
    )


def evaluate(session: Session, progress: Progress) -> tuple[Progress, dict[str, float | None]]:
    """Measure the accuracy (mean reward) on the validation problems during training.

    Returns:
        (progress with the duration of the evaluation and the best accuracy so far, metrics of the evaluation).
        The accuracy is None if no response has a reward.
    """
    began = time.perf_counter()
    measurement = measured(session, "validation", session.evaluation.num_problems, ("eval", progress.iteration))
    metrics = accuracy_metrics(measurement, session.limits.seed)
    seconds = time.perf_counter() - began
    return with_evaluation(progress, metrics["eval/accuracy"], seconds), {**metrics, "seconds/eval": seconds}


def evaluate_before(session: Session, progress: Progress) -> Progress:
    """Measure the accuracy before training, and save a checkpoint.

    The metrics of iteration 0 are logged. They contain an evaluation on the validation problems if there are
    evaluations during training (`eval.every` above 0).

    Returns:
        The progress with `accuracy_before` set, and with `greedy_before` if `eval.greedy` is true.
    """
    began = time.perf_counter()
    accuracy_before, greedy_before = _final_accuracies(session, "before")
    progress = replace(progress, accuracy_before=accuracy_before, greedy_before=greedy_before)
    progress = replace(progress, seconds_eval=time.perf_counter() - began)
    line: dict[str, Any] = {"iteration": 0, "updates": 0, **cumulative(progress)}
    if session.evaluation.every:
        progress, accuracy = evaluate(session, progress)
        line.update(accuracy)
    log(session, line)
    return save(session, progress)


def finish(session: Session, progress: Progress, reason: str) -> dict[str, Any]:
    """Save a last checkpoint and return the content of summary.json.

    If the run was not interrupted, the accuracy of the trained model is measured and the model is saved, too.

    Args:
        reason: why the run ends: "iterations", "updates", "tokens", "seconds", "callback" or "interrupted".
    """
    progress = save(session, progress)
    after: dict[str, float | None] | None = None
    greedy_after: dict[str, float | None] = {}
    if reason != "interrupted":
        began = time.perf_counter()
        after, greedy_after = _final_accuracies(session, "after")
        progress = replace(progress, seconds_eval=progress.seconds_eval + time.perf_counter() - began)
        with directory_written_aside(session.run.final) as folder:
            session.parts.policy.save(folder)
    return {
        "algorithm": session.parts.algorithm.name,
        "label": session.parts.algorithm.label,
        "seed": session.limits.seed,
        "recipe": progress.recipe,
        "finish_reason": reason,
        "accuracy_before": progress.accuracy_before,
        "accuracy_after": after,
        "greedy_before": progress.greedy_before or None,
        "greedy_after": greedy_after or None,
        "best_validation_accuracy": progress.best_validation_accuracy,
        "best_checkpoint": progress.best_checkpoint,
        "problems_left_out": dict(session.parts.left_out),
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
        "warnings": list(session.watch.given.values()),
        "final": "final" if reason != "interrupted" else None,
    }


def _final_accuracies(session: Session, when: str) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Measure the accuracies before or after training, on `eval.final_num_problems` problems of the split `eval.split`.

    Args:
        when: "before" or "after".
    Returns:
        (accuracy of sampled responses, accuracy of greedy responses). Each is {mean, low, high}: the mean reward with a
        confidence interval. If `eval.final_num_problems` is 0, nothing is measured and the values of the first are
        None. The second is empty if it is not measured.
    """
    settings = session.evaluation
    if not settings.final_num_problems:
        return {"mean": None, "low": None, "high": None}, {}

    def accuracy(address: tuple[str, ...], greedy: bool) -> dict[str, float | None]:
        measurement = measured(session, settings.split, settings.final_num_problems, address, greedy=greedy)
        return measurement.mean_reward(0).as_dict()

    return accuracy((when,), False), accuracy((when, "greedy"), True) if settings.greedy else {}


def log(session: Session, line: dict[str, Any]) -> None:
    """Append the metrics of an iteration to metrics.jsonl, and send them to the trackers and the reporter."""
    session.run.append_metrics(line)
    for tracker in session.trackers:
        tracker.log(with_trl_names(line), line["iteration"])
    if session.reporter:
        session.reporter.iteration(line)


def save(session: Session, progress: Progress) -> Progress:
    """Write a checkpoint with the progress of the run and the state of the learner.

    The newest checkpoints are kept, and the one with the best validation accuracy. Returns the progress, which includes
    the best checkpoint so far.
    """
    progress = with_best_checkpoint(progress)
    state = {
        "progress": asdict(replace(progress, seconds_total=session.seconds_total(progress))),
        **random_state(),
    }
    save_checkpoint(
        session.run.checkpoints,
        progress.iteration,
        state,
        session.limits.keep_checkpoints,
        [session.parts.learner.save],
        best=progress.best_checkpoint,
    )
    if session.reporter:
        session.reporter.saved(progress.iteration)
    return progress
