"""Train a model or resume a training run. The module contains the training loop.

Each iteration draws problems, samples responses, computes credit (the advantage of each token), updates the weights and
logs metrics. Some iterations also evaluate the model or save a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vineppo.config.schema import Config
from vineppo.run.checkpoint import has_checkpoint, latest_checkpoint, load_checkpoint
from vineppo.run.clock import Timer
from vineppo.run.directory import RunDirectory
from vineppo.run.plots import plot_run
from vineppo.run.trackers import build_trackers, require_trackers
from vineppo.training.configure import with_algorithm_section, with_run_dir
from vineppo.training.guards import Guards
from vineppo.training.parts import NOTHING_IN_MEMORY, InMemory, Parts, build_parts, updates_per_iteration
from vineppo.training.progress import Progress, advance, metrics_line
from vineppo.training.rollouts import draw_problems
from vineppo.training.session import Reporter, Session, evaluate, evaluate_before, finish, log, save
from vineppo.training.watch import Watch
from vineppo.types import RewardFn, UserError


def train(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    in_memory: InMemory = NOTHING_IN_MEMORY,
) -> dict[str, Any]:
    """Train a model in a new run directory.

    Args:
        config: all settings. An empty `run.dir` becomes `runs/<recipe>-<algorithm>-seed<seed>`, with the name of the
            task in place of an empty `recipe`.
        recipe: name of the recipe from which `config` was built, or empty; it is written to summary.json.
        reward_fn: one or several functions that replace the task's graders. Signature: fn(prompts, completions,
            completion_ids, **columns) -> list with one number per completion, or None where the function does not
            apply. `columns` are the other columns of the problems, each a list with one entry per completion. The
            functions are called in this process.
        reporter: receives the progress of the run; optional.
        in_memory: a model or data sets that are used instead of loading the configured ones.
    Returns:
        The content of summary.json.
    Raises:
        UserError: if the settings, the model, the data or the graders cannot be used, or if the run directory exists
            and is not empty.
    """
    require_trackers(config.run.report_to)
    config = with_run_dir(with_algorithm_section(config), recipe)
    parts = build_parts(config, reward_fn, in_memory)
    run = RunDirectory.create(config.run.dir, config)
    try:
        session = _session(config, parts, run, reporter, 0)
    except UserError:  # A tracker did not start. Remove the directory, so that the same command can be run again.
        shutil.rmtree(run.path)
        raise
    return _run(session, Progress(recipe=recipe))


def resume(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    in_memory: InMemory = NOTHING_IN_MEMORY,
) -> dict[str, Any]:
    """Continue the run in `config.run.dir` from its newest undamaged checkpoint.

    On a CPU the result is bit-identical to that of an uninterrupted run. A run that stopped before its first checkpoint
    starts from the beginning. The other arguments and the result are those of `train`.

    Args:
        config: the settings of the run, with `run.dir` set.
    Raises:
        UserError: if the run is finished, all its checkpoints are damaged, or the model, the data or the graders cannot
            be used.
    """
    config = with_algorithm_section(config)
    run = RunDirectory.open(config.run.dir)
    _check_unfinished(run)
    parts = build_parts(config, reward_fn, in_memory)
    progress = Progress(recipe=recipe)
    if has_checkpoint(run.checkpoints):
        checkpoint = latest_checkpoint(run.checkpoints)
        state = load_checkpoint(checkpoint)
        parts.learner.load(checkpoint)
        parts.update_sampler()
        torch.set_rng_state(state["torch_rng"])
        progress = Progress(**state["progress"])
    # The run repeats everything after the checkpoint. Without `accuracy_before`, it also repeats the measurement before
    # training, whose metrics have the iteration 0.
    run.truncate_metrics(progress.iteration if progress.accuracy_before else -1)
    run.remove_rollouts(progress.iteration)
    return _run(_session(config, parts, run, reporter, progress.iteration), progress)


def _check_unfinished(run: RunDirectory) -> None:
    """Raise UserError if the run is finished. A run that was interrupted is not finished."""
    if run.summary.exists():
        reason = json.loads(run.summary.read_text())["finish_reason"]
        if reason != "interrupted":
            raise UserError(
                f"run {run.path} is finished (finish_reason: {reason}) and cannot be resumed; to train its model "
                f"further, start a new run with --model.path {run.final} and another run.dir"
            )


def _session(config: Config, parts: Parts, run: RunDirectory, reporter: Reporter | None, start: int) -> Session:
    """Start the trackers, and return the session of a run that has completed `start` iterations."""
    return Session(
        parts=parts,
        run=run,
        trackers=build_trackers(config.run.report_to, run.path, run.config, start),
        reporter=reporter,
        limits=config.run,
        rollouts=config.rollouts,
        evaluation=config.eval,
        watch=_watch(config, parts),
        epochs=config.learner.epochs,
        updates_per_iteration=updates_per_iteration(config),
        began=time.perf_counter(),
    )


def _watch(config: Config, parts: Parts) -> Watch:
    rollouts = config.rollouts
    guards = Guards(parts, config.guards, config.run.seed, rollouts.temperature, rollouts.max_new_tokens)
    return Watch(guards, rollouts.max_new_tokens)


def _run(session: Session, progress: Progress) -> dict[str, Any]:
    """Train from `progress` to the end of the run, write all results, and return the content of summary.json."""
    if session.reporter:
        session.reporter.start()
    with _graceful_stop() as stop:
        progress, reason = _loop(session, progress, stop)
        summary = finish(session, progress, reason)
    session.run.write_summary(summary)
    if reason != "interrupted":
        plot_run(session.run.path)
    for tracker in session.trackers:
        tracker.close()
    if session.reporter:
        session.reporter.finish(summary, session.run.path)
    return summary


def _loop(session: Session, progress: Progress, stop: threading.Event) -> tuple[Progress, str]:
    """Run iterations until there is a reason to stop.

    Args:
        stop: event that requests to stop after the current iteration.
    Returns:
        (progress after the last iteration, reason to stop).
    """
    parts, limits, guards, timer = session.parts, session.limits, session.watch.guards, Timer()
    if not progress.accuracy_before:
        progress = evaluate_before(session, progress)
    while not (reason := _reason_to_stop(session, progress, stop)):
        iteration = progress.iteration + 1
        guards.before_iteration(iteration)
        # The task adds all responses of this iteration to the tally: those of the rollouts, and those of MC rollouts.
        tally = parts.task.count_anew()
        with timer("sample"):
            problems = draw_problems(parts.task, limits.seed, iteration, session.rollouts.num_problems)
            groups, rollout_tokens = parts.sample(problems, iteration)
            guards.check_rollouts(groups, iteration)
        reward_means = tally.means()  # of the rollouts, because no MC rollouts have been graded yet
        with timer("credit"):
            samples, credit_metrics = parts.credit(groups, iteration)
        with timer("update"):
            num_rollouts, check = sum(len(group.rollouts) for group in groups), guards.before_update
            metrics = parts.learner.update(samples, iteration, num_rollouts, check(groups, samples, iteration))
            guards.after_update(samples)
            parts.update_sampler()
        seconds = timer.pop()
        progress = advance(progress, rollout_tokens, samples, credit_metrics, seconds, session.epochs)
        line = metrics_line(progress, groups, {**credit_metrics, **metrics, **reward_means, **tally.shares()}, seconds)
        is_last = _reason_to_stop(session, progress, stop) not in ("", "interrupted")
        if session.evaluation.every and (iteration % session.evaluation.every == 0 or is_last):
            progress, accuracy = evaluate(session, progress)
            line.update(accuracy)
        if limits.save_rollouts:
            session.run.write_rollouts(iteration, groups, samples, parts.codec.decode)
        log(session, line)
        session.watch.after_iteration(line, groups, samples)
        if limits.checkpoint_every and iteration % limits.checkpoint_every == 0:
            save(session, progress)
    return progress, reason


def _reason_to_stop(session: Session, progress: Progress, stop: threading.Event) -> str:
    """Return the reason to stop the loop, or an empty string to continue."""
    limits = session.limits
    if stop.is_set():
        return "interrupted"
    if progress.iteration >= limits.iterations:
        return "iterations"
    # The limit applies to planned updates, which include minibatches without samples. The learning-rate schedule, which
    # ends with the run, counts in the same way.
    if limits.max_updates and progress.iteration * session.updates_per_iteration >= limits.max_updates:
        return "updates"
    if limits.max_tokens and progress.rollout_tokens + progress.mc_tokens >= limits.max_tokens:
        return "tokens"
    if limits.max_seconds and progress.seconds_train >= limits.max_seconds:
        return "seconds"
    return "callback" if session.reporter and session.reporter.wants_to_stop() else ""


@contextmanager
def _graceful_stop() -> Iterator[threading.Event]:
    """Context manager that yields an event, which the first Ctrl-C or SIGTERM sets to request the end of the run.

    A second signal raises KeyboardInterrupt. Outside the main thread, Python cannot handle signals, and the event is
    never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(signum: int, _frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous_handlers = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
