"""The training loop, on one screen: draw, sample, credit, update, log, evaluate, save."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vineppo.config.schema import Config
from vineppo.run.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vineppo.run.clock import Timer, peak_memory
from vineppo.run.directory import RunDirectory
from vineppo.run.plots import plot_run
from vineppo.run.trackers import Tracker, build_trackers, require_trackers
from vineppo.run.trl_names import with_trl_names
from vineppo.tasks.grading.graded import Graded, Tally
from vineppo.training.evaluate import Measurement, measure
from vineppo.training.parts import NOTHING_GIVEN, Given, Parts, build_parts, sample_rollouts
from vineppo.training.progress import Progress, advance, cumulative, metrics_line
from vineppo.training.rollouts import draw_problems, problem_range
from vineppo.types import RewardFn, Split, UserError


class Reporter(Protocol):
    """Who is told how a run goes: the console, or nobody."""

    def start(self, config: Config, total_iterations: int) -> None:
        """Before the first iteration."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """After each iteration, with its line of metrics.jsonl."""

    def wants_to_stop(self) -> bool:
        """Whether the run shall end here, as if it were over: asked between two iterations."""

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """At the end, with summary.json."""


@dataclass(frozen=True)
class Stages(Parts):
    """A training with the place it writes to and those it tells."""

    run: RunDirectory
    trackers: list[Tracker]
    reporter: Reporter | None
    began: float
    """When this start of the run was, on the performance counter."""


def train(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    given: Given = NOTHING_GIVEN,
) -> dict[str, Any]:
    """Train a model as `config` says, in a new run directory.

    Args:
        config: everything; an empty `run.dir` becomes `runs/<recipe>-<algorithm>-seed<seed>`.
        recipe: name of the recipe, for the record.
        reward_fn: grade responses instead of the task's graders, fn(prompts, completions, completion_ids, **columns) ->
            list of numbers or None; one or several, called in this process.
        reporter: told about every iteration.
        given: a model or data in memory.
    Returns:
        The content of summary.json.
    Raises:
        UserError: for everything the user can mend; nothing is lost.
    """
    require_trackers(config.run.report_to)
    if not config.run.dir:
        name = f"{recipe or config.task.name}-{config.algorithm}-seed{config.run.seed}"
        config = replace(config, run=replace(config.run, dir=f"runs/{name}"))
    parts = build_parts(config, reward_fn, given)
    run = RunDirectory.create(config.run.dir, config)
    try:
        stages = _stages(parts, run, reporter, 0)
    except UserError:  # a tracker did not start: the same command shall work when that is mended
        shutil.rmtree(run.path)
        raise
    return _run(stages, Progress(recipe=recipe))


def resume(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    given: Given = NOTHING_GIVEN,
) -> dict[str, Any]:
    """Go on with the run in `config.run.dir` from its newest whole checkpoint: on a CPU, to the same bit.

    A run that was stopped before its first checkpoint starts again from the beginning.
    """
    run = RunDirectory.open(config.run.dir)
    _refuse_finished(run)
    parts = build_parts(config, reward_fn, given)
    progress = Progress(recipe=recipe)
    if any(run.checkpoints.glob("*/")):
        state = load_checkpoint(latest_checkpoint(run.checkpoints))
        parts.learner.load_state_dict(state["learner"])
        torch.set_rng_state(state["torch_rng"])
        progress = Progress(**state["progress"])
    run.truncate_metrics(progress.iteration if progress.accuracy_before else -1)
    run.remove_rollouts(progress.iteration)
    return _run(_stages(parts, run, reporter, progress.iteration), progress)


def _refuse_finished(run: RunDirectory) -> None:
    if run.summary.exists():
        reason = json.loads(run.summary.read_text())["finish_reason"]
        if reason != "interrupted":
            raise UserError(
                f"run {run.path} is finished (it ended by {reason}): there is nothing to resume; train on from "
                f"{run.final} with --model.path and another run.dir"
            )


def _run(stages: Stages, progress: Progress) -> dict[str, Any]:
    if stages.reporter:
        stages.reporter.start(stages.config, stages.config.run.iterations)
    with _graceful_stop() as stop:
        progress, reason = _loop(stages, progress, stop)
        summary = _finish(stages, progress, reason, stop)
    stages.run.write_summary(summary)
    if reason != "interrupted":
        plot_run(stages.run.path)
    for tracker in stages.trackers:
        tracker.close()
    if stages.reporter:
        stages.reporter.finish(summary, stages.run.path)
    return summary


def _loop(stages: Stages, progress: Progress, stop: threading.Event) -> tuple[Progress, str]:
    config, timer = stages.config, Timer()
    if not progress.accuracy_before:
        progress = _evaluate_before(stages, progress)
    while not (reason := _reason_to_stop(stages, progress, stop)):
        iteration = progress.iteration + 1
        tally = stages.task.count_anew() if isinstance(stages.task, Graded) else Tally()
        with timer("sample"):
            problems = draw_problems(stages.task, config.run.seed, iteration, config.rollouts.num_problems)
            groups = sample_rollouts(stages, problems, iteration)
        means = tally.means()
        with timer("credit"):
            samples, credit_metrics = stages.credit(groups, iteration)
        with timer("update"):
            metrics = stages.learner.update(samples, iteration, config.run.seed)
            stages.sampler.load_weights(stages.policy)
        seconds = timer.pop()
        progress = advance(progress, groups, credit_metrics, seconds, config.learner.epochs)
        line = metrics_line(progress, groups, {**credit_metrics, **metrics, **means, **tally.shares()}, seconds)
        is_last = _reason_to_stop(stages, progress, stop) not in ("", "interrupted")
        if config.eval.every and (iteration % config.eval.every == 0 or is_last):
            progress, accuracy = _evaluate(stages, progress)
            line.update(accuracy)
        if config.run.save_rollouts:
            stages.run.write_rollouts(iteration, groups, samples, stages.codec.decode)
        _log(stages, line)
        if config.run.checkpoint_every and iteration % config.run.checkpoint_every == 0:
            _save(stages, progress)
    return progress, reason


def _stages(parts: Parts, run: RunDirectory, reporter: Reporter | None, start: int) -> Stages:
    trackers = build_trackers(parts.config.run.report_to, run.path, run.config, start)
    held = {f.name: getattr(parts, f.name) for f in fields(parts)}
    return Stages(**held, run=run, trackers=trackers, reporter=reporter, began=time.perf_counter())


def _reason_to_stop(stages: Stages, progress: Progress, stop: threading.Event) -> str:
    """Why the loop ends here; empty to go on."""
    run = stages.config.run
    if stop.is_set():
        return "interrupted"
    if progress.iteration >= run.iterations:
        return "iterations"
    if run.max_updates and stages.learner.updates >= run.max_updates:
        return "updates"
    if run.max_tokens and progress.rollout_tokens + progress.mc_tokens >= run.max_tokens:
        return "tokens"
    if run.max_seconds and progress.seconds_train >= run.max_seconds:
        return "seconds"
    return "callback" if stages.reporter and stages.reporter.wants_to_stop() else ""


def _measure(stages: Stages, split: Split, count: int, address: tuple[int | str, ...]) -> Measurement:
    return measure(
        stages.codec,
        stages.eval_sampler,
        stages.task,
        problem_range(stages.task, split, count),
        num_samples=stages.config.eval.num_samples,
        max_new_tokens=stages.config.rollouts.max_new_tokens,
        address=(stages.config.run.seed, *address),
    )


def _evaluate(stages: Stages, progress: Progress) -> tuple[Progress, dict[str, float | None]]:
    """Accuracy on the validation problems of the curve."""
    began = time.perf_counter()
    measured = _measure(stages, "validation", stages.config.eval.num_problems, ("eval", progress.iteration))
    interval = measured.mean_reward(stages.config.run.seed)
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


def _evaluate_before(stages: Stages, progress: Progress) -> Progress:
    """Accuracy of the starting model, and the first point of the curve (iteration 0)."""
    began = time.perf_counter()
    settings = stages.config.eval
    progress = replace(progress, accuracy_before=_final_accuracy(stages, "before"))
    progress = replace(progress, seconds_eval=time.perf_counter() - began)
    line: dict[str, Any] = {"iteration": 0, "updates": 0, **cumulative(progress)}
    if settings.every:
        progress, accuracy = _evaluate(stages, progress)
        line.update(accuracy)
    _log(stages, line)
    _save(stages, progress)
    return progress


def _finish(stages: Stages, progress: Progress, reason: str, stop: threading.Event) -> dict[str, Any]:
    """Last checkpoint, accuracy after training, the final model, and the summary."""
    _save(stages, progress)
    after: dict[str, float | None] | None = None
    if reason != "interrupted":
        began = time.perf_counter()
        after = _final_accuracy(stages, "after")
        progress = replace(progress, seconds_eval=progress.seconds_eval + time.perf_counter() - began)
        stages.policy.save(stages.run.final)
    return {
        "algorithm": stages.config.algorithm,
        "seed": stages.config.run.seed,
        "recipe": progress.recipe,
        "finish_reason": reason,
        "accuracy_before": progress.accuracy_before,
        "accuracy_after": after,
        "best_validation_accuracy": progress.best_validation_accuracy,
        "updates": stages.learner.updates,
        "iterations": progress.iteration,
        "seconds": progress.seconds_train,
        "seconds_eval": progress.seconds_eval,
        "seconds_total": _seconds_total(stages, progress),
        "tokens": {
            "rollouts": progress.rollout_tokens,
            "mc": progress.mc_tokens,
            "generated": progress.rollout_tokens + progress.mc_tokens,
            "trained": progress.trained_tokens,
        },
        "peak_memory_bytes": peak_memory(stages.policy.device),
        "final": "final" if reason != "interrupted" else None,
    }


def _seconds_total(stages: Stages, progress: Progress) -> float:
    """Of this start and those before it, as far as they were saved."""
    return progress.seconds_total + time.perf_counter() - stages.began


def _final_accuracy(stages: Stages, when: str) -> dict[str, float | None]:
    """Accuracy on the many problems of before and after; nothing where they are none."""
    settings = stages.config.eval
    if not settings.final_num_problems:
        return {"mean": None, "low": None, "high": None}
    return _measure(stages, settings.split, settings.final_num_problems, (when,)).mean_reward(0).as_dict()


def _log(stages: Stages, line: dict[str, Any]) -> None:
    stages.run.append_metrics(line)
    for tracker in stages.trackers:
        tracker.log(with_trl_names(line), line["iteration"])
    if stages.reporter:
        stages.reporter.iteration(line)


def _save(stages: Stages, progress: Progress) -> None:
    state = {
        "learner": stages.learner.state_dict(),
        "progress": asdict(replace(progress, seconds_total=_seconds_total(stages, progress))),
        "torch_rng": torch.get_rng_state(),
    }
    save_checkpoint(stages.run.checkpoints, progress.iteration, state, stages.config.run.keep_checkpoints)


@contextmanager
def _graceful_stop() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks the loop to finish its iteration; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
