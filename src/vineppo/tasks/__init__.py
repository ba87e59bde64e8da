"""Tasks: problems, prompts and graders, as text only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from vineppo.config.schema import GYM, TaskConfig
from vineppo.objects import first_line
from vineppo.tasks.dataset import DatasetTask, Layout
from vineppo.tasks.grading.graded import Graded, InProcess, Judge
from vineppo.tasks.grading.graders import QUICK, load_grader
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.tasks.mathematics import BENCHMARKS
from vineppo.types import Problem, ProblemSource, RewardFn, Split, Task, UserError


def build_task(
    config: TaskConfig,
    format_prompt: Callable[[Any], str] | None = None,
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    tables: Mapping[Split, Any] | None = None,
) -> Task:
    """The task that the configuration names.

    Args:
        config: the `task` section.
        format_prompt: the tokenizer's chat template as a function of the prompt.
        reward_fn: the caller's own reward functions, in place of the task's; they are called in this process, with all
            responses at once.
        tables: the caller's own rows for `dataset`, in place of files.
    Raises:
        UserError: for files, columns or graders that cannot be used.
    """
    fns = tuple(reward_fn) if isinstance(reward_fn, Sequence) else (reward_fn,) if reward_fn else ()
    if config.name == "chain":
        from vineppo.tasks.chain import ChainTask

        chain = ChainTask(level=config.level, num_steps=config.num_steps, writers=config.writers)
        return _graded(config, chain, fns, ()) if fns or config.rewards else chain
    if config.name.startswith(GYM):
        from vineppo.tasks.gym import GymTask

        gym = GymTask(config, format_prompt)
        return _graded(config, gym, fns, (), (config.name, gym.load_reward))
    own: tuple[str, ...] = ("exact",)
    layout = Layout()
    if config.name in BENCHMARKS:
        benchmark = BENCHMARKS[config.name]
        layout, own = benchmark.layout, benchmark.rewards
        if not config.train_path:
            config = replace(config, train_path=benchmark.train_path, test_path=config.test_path or benchmark.test_path)
    elif not config.train_path and not tables:
        raise UserError("task.train_path is empty; task.name dataset needs problems (a file or a hub id)")
    hash_answers = not fns and "hash" in (config.rewards or own)
    source = DatasetTask(config, layout, format_prompt, tables=tables, hash_answers=hash_answers)
    return _graded(config, source, fns, own)


def _graded(
    config: TaskConfig,
    source: ProblemSource,
    fns: tuple[RewardFn, ...],
    own: tuple[str, ...],
    scorer: tuple[str, Callable[[], RewardFn]] | None = None,
) -> Graded:
    """Problems under the caller's functions, or the configured ones, or the task's own."""
    judge: Judge
    if fns:
        names, judge = tuple(_unique([getattr(fn, "__name__", type(fn).__name__) for fn in fns])), InProcess(fns)
    else:
        names, judge = _configured(config, config.rewards or own, scorer)
    weights = config.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(f"task.reward_weights has {len(weights)} numbers for {len(names)} reward functions")
    writer = _demonstrator(config.demonstrator) if config.demonstrator else None
    return Graded(
        source, judge, names, weights, config.grading.max_error_share, config.grading.truncated, demonstrate=writer
    )


def _configured(
    config: TaskConfig, rewards: tuple[str, ...], scorer: tuple[str, Callable[[], RewardFn]] | None
) -> tuple[tuple[str, ...], Judge]:
    names: tuple[str, ...]
    if scorer and not config.rewards:
        names, loaders = (scorer[0],), [scorer[1]]
    else:
        names, loaders = rewards, [functools.partial(load_grader, spec) for spec in rewards]
        # Loaded here too: a misspelt name should be refused before anything starts.
        loaded = tuple(load_grader(spec) for spec in rewards)
        if set(rewards) <= set(QUICK):
            return names, InProcess(loaded)
    own = config.grading
    return names, WorkerPool(loaders, own.workers, own.seconds, int(own.memory * 2**30))


def _demonstrator(spec: str) -> Callable[[Problem], str]:
    write: Callable[..., Any] = load_grader(spec)

    def demonstrate(problem: Problem) -> str:
        columns = {name: value for name, value in problem.columns.items() if name not in ("prompt", "answer")}
        try:
            text = write(prompt=problem.prompt, answer=problem.answer, **columns)
        except Exception as error:
            raise UserError(
                f"task.demonstrator {spec} failed for problem {problem.id}: {first_line(error)}; it is called as "
                f"fn(prompt, answer, **columns) with columns {', '.join(columns) or 'none'} and returns text"
            ) from error
        if not isinstance(text, str):
            raise UserError(
                f"task.demonstrator {spec} returned a {type(text).__name__} for {problem.id}; allowed: text"
            )
        return text

    return demonstrate


def _unique(names: Sequence[str]) -> list[str]:
    """Names of which none is there twice: two lambdas must not share a metric."""
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
