"""Run the offline baselines of the VinePPO paper: sample and grade responses, train on them, and write a run directory.

The methods are in `restem` and `dpo`. They use the functions of this module to sample, and to record each iteration.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vineppo.config.offline import METHODS, OfflineConfig
from vineppo.config.settings import replace as with_values
from vineppo.learning.optim import Optimizer
from vineppo.model.lora import merged_weights
from vineppo.model.of_run import started_from
from vineppo.model.policy import Policy
from vineppo.run.clock import Timer, peak_memory
from vineppo.run.directory import RunDirectory
from vineppo.run.environment import require_one_process
from vineppo.run.files import directory_written_aside, disk_errors_in_one_line
from vineppo.run.finished import plot_finished
from vineppo.run.lock import locked
from vineppo.sampling.version import CurrentSampler
from vineppo.tasks import build_task
from vineppo.training.configure_offline import with_offline_dir
from vineppo.training.evaluator import Evaluator
from vineppo.training.overlong import fit_prompts, used_problems
from vineppo.training.parts import build_engine
from vineppo.training.preflight import check_offline
from vineppo.training.progress import Progress, cumulative, metrics_line, totals
from vineppo.training.rollouts import check_rewards, draw_problems, generated_tokens, sample_groups
from vineppo.training.supervised import Passes
from vineppo.types import Metrics, Rollout, RolloutGroup, Split, Task, UserError

_EQUAL = 1e-9
"""Rewards that differ by less than this are equal, because weighted rewards have rounding errors."""


@dataclass
class OfflineSession:
    """The objects and the progress of an offline run."""

    config: OfflineConfig
    policy: Policy
    task: Task
    run: RunDirectory
    report: Callable[[str], None]
    """Receives one line of text after each iteration."""
    left_out: Mapping[Split, int]
    """Number of problems of each split that were left out because their prompts are too long."""
    began: float
    """Value of `time.perf_counter()` at the start of the run."""
    updates: int = 0
    """Number of updates since the start of the run."""

    def __post_init__(self) -> None:
        rollouts = self.config.rollouts
        self.sampler = CurrentSampler(build_engine(self.config, self.policy), lambda: self.updates)
        self.evaluator = Evaluator(
            self.policy.codec,
            self.sampler,
            self.task,
            self.config.eval,
            rollouts.max_new_tokens,
            rollouts.stop,
            self.config.run.seed,
        )
        self.progress = Progress()
        self.timer = Timer()

    def update_sampler(self) -> None:
        """Give the current weights of the policy to the sampler."""
        self.sampler.update_weights(self.updates, lambda: merged_weights(self.policy.model))

    def passes(self, count: int, iteration: int) -> Passes:
        """Return the passes over `count` examples, with a new optimizer.

        Args:
            iteration: number of the round in which the examples were sampled.
        """
        config = self.config
        return Passes(
            Optimizer(self.policy.model.parameters(), config.betas, config.weight_decay),
            count,
            config.epochs,
            config.batch_size,
            config.lr,
            config.warmup_fraction,
            config.max_grad_norm,
            (config.run.seed, iteration, config.method),
        )


def run_offline(config: OfflineConfig, recipe: str = "", report: Callable[[str], None] = print) -> dict[str, Any]:
    """Train a model with RestEM or DPO-positive in a new run directory.

    Args:
        config: all settings. An empty `run.dir` becomes `runs/<recipe>-<method>-seed<seed>`.
        recipe: name of the recipe, or empty; it is written to summary.json.
        report: receives one line of text about the progress after each iteration.
    Returns:
        The content of summary.json.
    Raises:
        UserError: if the settings, the model, the data or the graders cannot be used, if the run directory exists and
            is not empty, if there is nothing to train on, or if the disk is full.
    """
    from vineppo.training.dpo import train_on_pairs
    from vineppo.training.restem import train_in_rounds

    require_one_process()
    config = with_offline_dir(config, recipe)
    check_offline(config)
    config = with_values(config, model=started_from(config.model))
    began, path = time.perf_counter(), Path(config.run.dir)
    policy = Policy.load(config.model)
    task = build_task(config.task, policy.codec.chat_prompt)
    _check_split(task)
    limit = config.rollouts.max_new_tokens
    left_out = fit_prompts(task, policy.codec, limit, config.task.overlong, used_problems(config.eval))
    RunDirectory(path, {}).make_folder()
    with locked(path), disk_errors_in_one_line(path):
        run = RunDirectory.create(path, config, recipe)
        session = OfflineSession(config, policy, task, run, report, left_out, began)
        with contextlib.closing(session.sampler):
            try:
                before = _measure_before(session)
                (train_in_rounds if config.method == "restem" else train_on_pairs)(session)
            except UserError:
                if session.progress.iteration == 0:  # Remove the directory, so that the same command can be run again.
                    shutil.rmtree(path, ignore_errors=True)
                raise
            summary = _finish(session, before, recipe)
            run.write_summary(summary)
    plot_finished(run)
    return summary


def _check_split(task: Task) -> None:
    """Raise UserError if the task has no training problems."""
    if task.size("train") == 0:
        raise UserError("the task has no training problems to sample responses for; set task.train_path to a file")


def sample_round(session: OfflineSession, iteration: int) -> tuple[list[RolloutGroup], Metrics]:
    """Sample and grade the responses of a round with the current policy.

    A limited training split is used in passes, each in a new random order, as in `vineppo train`. If the split has at
    most as many problems as a round, each problem is used once in every round.

    Args:
        iteration: number of the round, counted from 1.
    Returns:
        (one group per problem, metrics of grading).
    """
    settings, size = session.config.rollouts, session.task.size("train")
    count = settings.num_problems if size is None else min(settings.num_problems, size)
    tally = session.task.count_anew()
    with session.timer("sample"):
        groups = sample_groups(
            draw_problems(session.task, session.config.run.seed, iteration, count),
            session.policy.codec,
            session.sampler,
            session.task,
            group_size=settings.group_size,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            stop=settings.stop,
            address=(session.config.run.seed, iteration, "rollouts"),
        )
    check_rewards(groups, session.task.total)
    if session.config.run.save_rollouts:
        session.run.write_rollouts(iteration, groups, [], session.policy.codec.decode)
    return groups, {**tally.means(), **tally.shares()}


def split_by_reward(groups: Sequence[RolloutGroup], threshold: float) -> dict[str, tuple[list[Rollout], list[Rollout]]]:
    """Return problem id -> (right responses, wrong responses), each in the order of sampling.

    A response is right if its reward is at least `threshold`. A response without a reward is neither right nor wrong.
    """
    divided: dict[str, tuple[list[Rollout], list[Rollout]]] = {}
    for group in groups:
        right, wrong = divided.setdefault(group.problem.id, ([], []))
        for rollout in group.rollouts:
            if rollout.reward is not None:
                (right if rollout.reward >= threshold - _EQUAL else wrong).append(rollout)
    return divided


def end_iteration(
    session: OfflineSession, groups: Sequence[RolloutGroup], trained_tokens: int, metrics: Mapping[str, Any], text: str
) -> None:
    """Record an iteration: update the progress, evaluate the policy if it is due, and write the metrics.

    Args:
        groups: the rollouts of the iteration; empty if none were sampled.
        trained_tokens: number of trained tokens of the iteration, counted in every epoch.
        metrics: further metrics.
        text: text about the iteration for the report.
    """
    seconds, progress = {"sample": 0.0, "update": 0.0, **session.timer.pop()}, session.progress
    progress = replace(
        progress,
        iteration=progress.iteration + 1,
        rollout_tokens=progress.rollout_tokens + generated_tokens(groups),
        trained_tokens=progress.trained_tokens + trained_tokens,
        seconds_train=progress.seconds_train + sum(seconds.values()),
    )
    # Plots need the mean reward of every iteration; None means that there is none.
    line: dict[str, Any] = {"reward/mean": None, **metrics, "iteration": progress.iteration, **cumulative(progress)}
    line |= {f"seconds/{phase}": value for phase, value in seconds.items()}
    if groups:
        line |= metrics_line(progress, list(groups), dict(metrics), seconds)
    session.progress = progress
    _log(session, line, text)


def _log(session: OfflineSession, line: dict[str, Any], text: str) -> None:
    """Evaluate the policy if it is due, append the line to metrics.jsonl, and report the iteration."""
    config, iteration = session.config, session.progress.iteration
    if config.eval.every and (iteration % config.eval.every == 0 or iteration == config.iterations):
        session.progress, accuracy_metrics = session.evaluator.during_training(session.progress)
        line |= accuracy_metrics
    session.run.append_metrics({"updates": session.updates, **line})
    accuracy, unit = line.get("eval/accuracy"), "round" if config.method == "restem" else "epoch"
    shown = "" if accuracy is None else f"  validation accuracy {100 * accuracy:.1f}%"
    session.report(
        f"{unit} {iteration}/{config.iterations}  {text}{shown}  {session.progress.rollout_tokens:,} generated tokens  "
        f"{time.perf_counter() - session.began:.0f} s"
    )


def _measured(session: OfflineSession, when: Literal["before", "after"]) -> dict[str, Any]:
    """Measure the accuracies before or after training. Return the entries `accuracy_*` and `greedy_*` of a summary."""
    session.progress, accuracy, greedy = session.evaluator.final(session.progress, when)
    return {f"accuracy_{when}": accuracy, f"greedy_{when}": greedy or None}


def _measure_before(session: OfflineSession) -> dict[str, Any]:
    """Measure the accuracies of the starting model, and write the metrics of iteration 0."""
    before = _measured(session, "before")
    _log(session, {"iteration": 0, **cumulative(session.progress)}, "starting model")
    return before


def _finish(session: OfflineSession, before: Mapping[str, Any], recipe: str) -> dict[str, Any]:
    """Measure the accuracies of the trained model, save the model, and return the content of summary.json."""
    after = _measured(session, "after")
    with directory_written_aside(session.run.final) as folder:
        session.policy.save(folder)
    return {
        "algorithm": session.config.method,
        "label": METHODS[session.config.method],
        "seed": session.config.run.seed,
        "recipe": recipe,
        "finish_reason": "iterations",
        **before,
        **after,
        **totals(session.progress),
        "problems_left_out": dict(session.left_out),
        "updates": session.updates,
        "seconds_total": time.perf_counter() - session.began,
        "peak_memory_bytes": peak_memory(session.policy.device),
        "warnings": [],
        "final": "final",
    }
