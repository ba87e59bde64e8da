"""Functions of the training loop that begin and end a run, log metrics and save checkpoints."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from vineppo.config.schema import RolloutConfig, RunConfig
from vineppo.run.checkpoint import save_checkpoint
from vineppo.run.clock import peak_memory
from vineppo.run.directory import RunDirectory
from vineppo.run.files import directory_written_aside
from vineppo.run.trackers import Tracker
from vineppo.run.trl_names import with_trl_names
from vineppo.training.evaluator import Accuracy, Evaluator
from vineppo.training.parts import Parts
from vineppo.training.progress import Progress, cumulative, totals, with_best_checkpoint
from vineppo.training.resuming import random_state
from vineppo.training.watch import Watch


class Reporter(Protocol):
    """An object that receives the progress of a run, for example to print the progress."""

    def start(self, sampler: str) -> None:
        """Start the report. The training loop calls this method once, before the first iteration.

        Args:
            sampler: one line that says which sampler is used, and why.
        """

    def before_iteration(self, iteration: int) -> None:
        """Report the beginning of an iteration. Iterations are counted from 1."""

    def phase(self, name: str) -> None:
        """Report the beginning of a phase: `sample`, `credit`, `update` or `eval`."""

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
    evaluator: Evaluator
    """Measures the accuracy before, during and after training."""
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

    def report_phase(self, name: str) -> None:
        """Tell the reporter that a phase begins (`Reporter.phase`)."""
        if self.reporter:
            self.reporter.phase(name)


def evaluate_before(session: Session, progress: Progress) -> Progress:
    """Measure the accuracy before training, and save a checkpoint.

    The metrics of iteration 0 are logged. They contain an evaluation on the validation problems if there are
    evaluations during training (`eval.every` above 0).

    Returns:
        The progress with `accuracy_before` set, and with `greedy_before` if `eval.greedy` is true.
    """
    session.report_phase("eval")
    progress, accuracy_before, greedy_before = session.evaluator.final(progress, "before")
    progress = replace(progress, accuracy_before=accuracy_before, greedy_before=greedy_before)
    line: dict[str, Any] = {"iteration": 0, "updates": 0, **cumulative(progress)}
    if session.evaluator.settings.every:
        progress, accuracy = session.evaluator.during_training(progress)
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
    after: Accuracy | None = None
    greedy_after: Accuracy = {}
    if reason != "interrupted":
        session.report_phase("eval")
        progress, after, greedy_after = session.evaluator.final(progress, "after")
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
        **totals(progress),
        "problems_left_out": dict(session.parts.left_out),
        "updates": session.parts.learner.updates,
        "seconds_total": session.seconds_total(progress),
        "peak_memory_bytes": peak_memory(session.parts.policy.device),
        "warnings": list(session.watch.given.values()),
        "final": "final" if reason != "interrupted" else None,
    }


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
