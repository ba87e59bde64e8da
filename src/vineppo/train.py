"""The training loop, on one screen: draw, sample, credit, update, log, evaluate, save."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from vineppo.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from vineppo.config import Config
from vineppo.credit import build_credit
from vineppo.evaluate import Measurement, measure
from vineppo.learner import Learner
from vineppo.plots import plot_run
from vineppo.policy import Policy, Reference, ValueNetwork
from vineppo.rollouts import draw_problems, generated_tokens, problem_range, sample_groups
from vineppo.run import RunDirectory, Timer, peak_memory
from vineppo.sampling.native import NativeSampler
from vineppo.seeds import derive_seed
from vineppo.tasks import build_task
from vineppo.tasks.grading import Graded, Tally
from vineppo.trackers import Tracker, build_trackers, require_trackers
from vineppo.trl_names import with_trl_names
from vineppo.types import CreditFn, Metrics, Problem, RewardFn, RolloutGroup, Sampler, Split, Task, UserError


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
class Progress:
    """Where a run stands; with the learner's state, all that a resumed run needs, since randomness is by address."""

    recipe: str = ""
    iteration: int = 0
    rollout_tokens: int = 0
    mc_tokens: int = 0
    trained_tokens: int = 0
    seconds_train: float = 0.0
    seconds_eval: float = 0.0
    seconds_total: float = 0.0
    """Of the starts before this one, up to the checkpoint."""
    accuracy_before: dict[str, float | None] = field(default_factory=dict)
    best_validation_accuracy: float | None = None


@dataclass(frozen=True)
class Parts:
    """The built parts of a training, by the names of the loop's stages."""

    config: Config
    policy: Policy
    task: Task
    sampler: Sampler
    eval_sampler: Sampler
    credit: CreditFn
    learner: Learner


@dataclass(frozen=True)
class Stages(Parts):
    """A training with the place it writes to and those it tells."""

    run: RunDirectory
    trackers: list[Tracker]
    reporter: Reporter | None
    began: float
    """When this start of the run was, on the performance counter."""


@dataclass(frozen=True)
class Given:
    """What the caller brings along instead of naming it in the configuration."""

    policy: Policy | None = None
    """In the place of `config.model`; it is trained in place."""
    tables: Mapping[Split, Any] | None = None
    """Rows for the task `dataset`, by split."""


def train(
    config: Config,
    *,
    recipe: str = "",
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    reporter: Reporter | None = None,
    given: Given = Given(),
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
    given: Given = Given(),
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
        progress = _advance(progress, groups, credit_metrics, seconds, config.learner.epochs)
        line = _metrics_line(progress, groups, {**credit_metrics, **metrics, **means, **tally.shares()}, seconds)
        is_last = _reason_to_stop(stages, progress, stop) not in ("", "interrupted")
        if config.eval.every and (iteration % config.eval.every == 0 or is_last):
            progress, accuracy = _evaluate(stages, progress)
            line.update(accuracy)
        if config.run.save_rollouts:
            stages.run.write_rollouts(iteration, groups, samples, stages.policy.decode)
        _log(stages, line)
        if config.run.checkpoint_every and iteration % config.run.checkpoint_every == 0:
            _save(stages, progress)
    return progress, reason


def build_parts(
    config: Config, reward_fn: RewardFn | Sequence[RewardFn] | None = None, given: Given = Given()
) -> Parts:
    """Load and bind everything that can be wrong, before anything is written."""
    policy = given.policy or Policy.load(config.model)
    task = build_task(config.task, policy.chat_prompt, reward_fn, given.tables)
    sampler, eval_sampler = build_samplers(config, policy)
    critic = None
    if config.algorithm == "ppo":
        critic = ValueNetwork(policy, derive_seed(config.run.seed, "value head"), config.ppo.value_head_scale)
    learner = Learner(
        policy,
        Reference(policy) if config.learner.kl.coefficient > 0 else None,
        critic,
        config.learner,
        config.ppo,
        temperature=config.rollouts.temperature,
        total_updates=total_updates(config),
    )
    credit = build_credit(config, policy, sampler, task, critic)
    return Parts(config, policy, task, sampler, eval_sampler, credit, learner)


def build_samplers(config: Config, policy: Policy) -> tuple[NativeSampler, NativeSampler]:
    """(of training, of evaluation): they differ in temperature alone."""
    own = config.rollouts
    training, evaluation = (
        NativeSampler(policy, temperature=t, stop=own.stop, max_rows=own.max_rows, kv_memory=int(own.kv_memory * 2**30))
        for t in (own.temperature, config.eval.temperature)
    )
    return training, evaluation


def _stages(parts: Parts, run: RunDirectory, reporter: Reporter | None, start: int) -> Stages:
    trackers = build_trackers(parts.config.run.report_to, run.path, run.config, start)
    held = {f.name: getattr(parts, f.name) for f in fields(parts)}
    return Stages(**held, run=run, trackers=trackers, reporter=reporter, began=time.perf_counter())


def updates_per_iteration(config: Config) -> int:
    """Optimizer steps between two batches of rollouts."""
    rollouts = config.rollouts.num_problems * config.rollouts.group_size
    return config.learner.epochs * -(-rollouts // config.learner.minibatch_size)


def total_updates(config: Config) -> int:
    """Updates of a whole run: where a linear decay ends."""
    updates = config.run.iterations * updates_per_iteration(config)
    return min(updates, config.run.max_updates) if config.run.max_updates else updates


def sample_rollouts(parts: Parts, problems: Sequence[Problem], iteration: int) -> list[RolloutGroup]:
    """The G graded rollouts of each problem, for an iteration."""
    return sample_groups(
        problems,
        parts.policy,
        parts.sampler,
        parts.task,
        group_size=parts.config.rollouts.group_size,
        max_new_tokens=parts.config.rollouts.max_new_tokens,
        address=(parts.config.run.seed, iteration, "rollouts"),
    )


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


def _advance(
    progress: Progress, groups: list[RolloutGroup], credit: Metrics, seconds: Mapping[str, float], epochs: int
) -> Progress:
    tokens = generated_tokens(groups)
    return replace(
        progress,
        iteration=progress.iteration + 1,
        rollout_tokens=progress.rollout_tokens + tokens,
        mc_tokens=progress.mc_tokens + int(credit.get("tokens/mc", 0)),
        trained_tokens=progress.trained_tokens + tokens * epochs,
        seconds_train=progress.seconds_train + sum(seconds.values()),
    )


def _metrics_line(
    progress: Progress, groups: list[RolloutGroup], metrics: Metrics, seconds: Mapping[str, float]
) -> dict[str, Any]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float64)
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    return {
        **metrics,
        "iteration": progress.iteration,
        **_cumulative(progress),
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "reward/mean": rewards.mean().item(),
        "reward/std": rewards.std(unbiased=False).item(),
        "response/length_mean": sum(lengths) / len(lengths),
        "response/length_min": min(lengths),
        "response/length_max": max(lengths),
        "response/truncated_share": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }


def _cumulative(progress: Progress) -> dict[str, float]:
    return {
        "tokens/rollouts": progress.rollout_tokens,
        "tokens/mc": progress.mc_tokens,
        "tokens/generated": progress.rollout_tokens + progress.mc_tokens,
        "tokens/trained": progress.trained_tokens,
        "seconds/train": progress.seconds_train,
    }


def _measure(stages: Stages, split: Split, count: int, address: tuple[int | str, ...]) -> Measurement:
    return measure(
        stages.policy,
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
    line: dict[str, Any] = {"iteration": 0, "updates": 0, **_cumulative(progress)}
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
