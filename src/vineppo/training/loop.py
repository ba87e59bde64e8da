"""Train a model or resume a training run. The module contains the training loop.

Each iteration draws problems, samples responses, computes credit (the advantage of each token), updates the weights and
logs metrics. Some iterations also evaluate the model or save a checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any, NamedTuple

from vineppo.config.load import config_to_dict
from vineppo.config.schema import Config
from vineppo.config.settings import replace
from vineppo.learning.sharding import Ranks
from vineppo.model.of_run import started_from
from vineppo.run.clock import Timer
from vineppo.run.directory import RunDirectory
from vineppo.run.environment import objects_before_excluded_from_collection
from vineppo.run.files import disk_errors_in_one_line
from vineppo.run.finished import plot_finished
from vineppo.run.lock import locked
from vineppo.run.trackers import build_trackers, require_trackers
from vineppo.training.changes import changed_settings, check_goes_on
from vineppo.training.configure import with_algorithm_section, with_run_dir
from vineppo.training.evaluator import Evaluator
from vineppo.training.following import with_ranks
from vineppo.training.guards import Guards
from vineppo.training.parts import NOTHING_IN_MEMORY, InMemory, Parts, build_parts, updates_per_iteration
from vineppo.training.preflight import check_new_run
from vineppo.training.progress import Progress, advance, is_new_best, metrics_line
from vineppo.training.resuming import (
    chosen_checkpoint,
    go_back,
    read_progress,
    record_changes,
    restore,
    with_changes,
)
from vineppo.training.rollouts import check_rewards, draw_problems
from vineppo.training.session import Reporter, Session, evaluate_before, finish, log, save
from vineppo.training.stopping import graceful_stop, limit_reached
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
    """Train a model in a new run directory, without a report at its end.

    The arguments, the result and the errors are those of `vineppo.train` (`view/trained.py`).
    """
    config = with_run_dir(with_algorithm_section(config), recipe)

    def lead(ranks: Ranks) -> dict[str, Any]:
        return _train(config, recipe, reporter, _Given(reward_fn, in_memory, ranks))

    return with_ranks(config.model.device, in_memory, lead)


def resume(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    in_memory: InMemory = NOTHING_IN_MEMORY,
    checkpoint: str = "newest",
) -> dict[str, Any]:
    """Continue the run in `config.run.dir` from a checkpoint.

    On a CPU the result is bit-identical to that of an uninterrupted run. Some settings may differ from those of the run
    (`changes.CHANGEABLE`); the changes are recorded. With a higher limit, a finished run goes on. A run that stopped
    before its first checkpoint starts from the beginning, and all its settings may differ. The other arguments and the
    result are those of `train`.

    Args:
        config: the settings of the run, with `run.dir` set.
        checkpoint: `newest`, which is the newest undamaged checkpoint; `best`, the checkpoint with the best validation
            accuracy; or the number of an iteration. Later checkpoints are removed.
    Raises:
        UserError: if the run is finished, another process trains in its directory, a setting differs that must not
            change, all checkpoints are damaged, or the model, the data or the graders cannot be used.
    """
    config = with_algorithm_section(config)

    def lead(ranks: Ranks) -> dict[str, Any]:
        return _resume(config, recipe, reporter, checkpoint, _Given(reward_fn, in_memory, ranks))

    return with_ranks(config.model.device, in_memory, lead)


class _Given(NamedTuple):
    """What a run gets besides its settings; see `train`."""

    reward_fn: RewardFn | Sequence[RewardFn] | None
    in_memory: InMemory
    ranks: Ranks


def _train(config: Config, recipe: str, reporter: Reporter | None, given: _Given) -> dict[str, Any]:
    """Train in a new run directory as the first of the ranks; see `train`."""
    loads_model = given.in_memory.policy is None
    check_new_run(config, model=loads_model, task=not (given.reward_fn or given.in_memory.tables))
    if loads_model:
        config = replace(config, model=started_from(config.model))
    parts = build_parts(config, *given)
    RunDirectory(Path(config.run.dir), {}).make_folder()
    with locked(Path(config.run.dir)):
        run = RunDirectory.create(config.run.dir, config, recipe, in_memory=not loads_model)
        try:
            session = _session(config, parts, run, reporter, 0)
        except UserError:
            # A tracker did not start. Remove the directory, so that the same command can be run again.
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return _run(session, Progress(recipe=recipe))


def _resume(config: Config, recipe: str, reporter: Reporter | None, checkpoint: str, given: _Given) -> dict[str, Any]:
    """Continue a run as the first of the ranks; see `resume`."""
    run = RunDirectory.open(config.run.dir)
    with locked(run.path), disk_errors_in_one_line(run.path):
        start = chosen_checkpoint(run, checkpoint)
        changes = changed_settings(run, config, any_change=start is None)
        if start is None and given.in_memory.policy is None:
            config = replace(config, model=started_from(config.model))
        recorded, state = read_progress(start)
        recipe = recipe or str(run.read_record().get("recipe") or "")
        progress = with_changes(recorded or Progress(recipe=recipe), changes)
        check_goes_on(run, limit_reached(config.run, progress, updates_per_iteration(config)))
        require_trackers(config.run.report_to)
        parts = build_parts(config, *given)
        if start is not None:
            restore(parts, start, state)
        run.read_metrics()  # raises UserError if the file is damaged
        run = replace_fields(run, config=config_to_dict(config))
        session = _session(config, parts, run, reporter, progress.iteration)
        # A mistake of the user has been found by now, so that it leaves the files of the run as they were.
        record_changes(run, changes, progress.iteration)
        go_back(run, progress)
        return _run(session, progress)


def _session(config: Config, parts: Parts, run: RunDirectory, reporter: Reporter | None, start: int) -> Session:
    """Start the trackers, and return the session of a run that has completed `start` iterations."""
    return Session(
        parts=parts,
        run=run,
        trackers=build_trackers(config.run.report_to, run.path, run.config, start),
        reporter=reporter,
        limits=config.run,
        rollouts=config.rollouts,
        evaluator=Evaluator(
            parts.codec,
            parts.sampler,
            parts.task,
            config.eval,
            config.rollouts.max_new_tokens,
            config.rollouts.stop,
            config.run.seed,
        ),
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
    with (
        contextlib.closing(session.parts.sampler),
        graceful_stop() as stop,
        disk_errors_in_one_line(session.run.path),
        objects_before_excluded_from_collection(),
    ):
        if session.reporter:
            session.reporter.start(session.parts.sampler_line)
        progress, reason = _loop(session, progress, stop)
        summary = finish(session, progress, reason)
        session.run.write_summary(summary)
        if reason != "interrupted":
            plot_finished(session.run)
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
    parts, evaluator, limits = session.parts, session.evaluator, session.limits
    guards, timer = session.watch.guards, Timer(on_phase=session.report_phase)
    if not progress.accuracy_before:
        progress = evaluate_before(session, progress)
    while not (reason := _reason_to_stop(session, progress, stop)):
        iteration = progress.iteration + 1
        if session.reporter:
            session.reporter.before_iteration(iteration)
        guards.before_iteration(iteration)
        # The task adds all responses of this iteration to the tally: those of the rollouts, and those of MC rollouts.
        tally = parts.task.count_anew()
        with timer("sample"):
            problems = draw_problems(parts.task, limits.seed, iteration, session.rollouts.num_problems)
            groups, rollout_tokens = parts.sample(problems, iteration)
            guards.check_rollouts(groups, iteration)
        check_rewards(groups, parts.task.total)
        reward_means = tally.means()  # of the rollouts, because no MC rollouts have been graded yet
        with timer("credit"):
            samples, credit_metrics = parts.credit(groups, iteration)
        with timer("update"):
            parts.free_sampler_memory()
            num_rollouts, check = sum(len(group.rollouts) for group in groups), guards.before_update
            metrics = parts.learner.update(samples, iteration, num_rollouts, check(groups, samples, iteration))
            guards.after_update(samples)
            parts.update_sampler()
        seconds = timer.pop()
        progress = advance(progress, rollout_tokens, samples, credit_metrics, seconds, session.epochs)
        line = metrics_line(progress, groups, {**credit_metrics, **metrics, **reward_means, **tally.shares()}, seconds)
        is_last = _reason_to_stop(session, progress, stop) not in ("", "interrupted")
        if evaluator.settings.every and (iteration % evaluator.settings.every == 0 or is_last):
            session.report_phase("eval")
            progress, accuracy = evaluator.during_training(progress)
            line.update(accuracy)
        if limits.save_rollouts:
            entropies = parts.learner.entropies
            session.run.write_rollouts(iteration, groups, samples, parts.codec.decode, entropies)
        log(session, line)
        session.watch.after_iteration(line, groups, samples)
        if limits.checkpoint_every and (
            iteration % limits.checkpoint_every == 0 or (is_new_best(progress) and not is_last)
        ):
            progress = save(session, progress)
    return progress, reason


def _reason_to_stop(session: Session, progress: Progress, stop: threading.Event) -> str:
    """Return the reason to stop the loop, or an empty string to continue."""
    if stop.is_set():
        return "interrupted"
    if limit := limit_reached(session.limits, progress, session.updates_per_iteration):
        return limit
    return "callback" if session.reporter and session.reporter.wants_to_stop() else ""
