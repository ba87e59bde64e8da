"""Builds the task that a configuration names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vineppo.config.schema import GYM, TaskConfig
from vineppo.config.settings import replace
from vineppo.objects import first_line
from vineppo.tasks.chain import ChainTask, grade_chain
from vineppo.tasks.dataset import DatasetTask, Layout
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.graders import QUICK, load_grader
from vineppo.tasks.grading.judge import InProcess, Judge
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.tasks.mathematics import BENCHMARKS
from vineppo.types import Problem, ProblemSource, RewardFn, Split, Task, UserError

_NamesAndJudge = tuple[tuple[str, ...], Judge]
"""Names of reward functions, for metrics, and the judge that calls them."""


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
        chain = ChainTask(level=config.level, num_steps=config.num_steps, writers=config.writers)
        return _graded(config, chain, fns, lambda: (("chain",), InProcess((grade_chain,))))
    if config.name.startswith(GYM):
        from vineppo.tasks.gym import GymTask

        gym = GymTask(config, format_prompt)
        return _graded(config, gym, fns, lambda: ((config.name,), _in_workers(config, [gym.load_reward])))
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
    return _graded(config, source, fns, lambda: _by_name(config, own))


def _graded(
    config: TaskConfig, source: ProblemSource, fns: tuple[RewardFn, ...], own: Callable[[], _NamesAndJudge]
) -> Graded:
    """Problems under the caller's functions, or the configured ones, or the task's own."""
    names, judge = _given(fns) if fns else _by_name(config, config.rewards) if config.rewards else own()
    weights = config.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(f"task.reward_weights has {len(weights)} numbers for {len(names)} reward functions")
    writer = _demonstrator(config.demonstrator) if config.demonstrator else None
    return Graded(
        source, judge, names, weights, config.grading.max_error_share, config.grading.truncated, demonstrate=writer
    )


def _given(fns: tuple[RewardFn, ...]) -> _NamesAndJudge:
    return tuple(_unique([getattr(fn, "__name__", type(fn).__name__) for fn in fns])), InProcess(fns)


def _by_name(config: TaskConfig, rewards: tuple[str, ...]) -> _NamesAndJudge:
    # Loaded here too: a misspelt name should be refused before anything starts.
    loaded = tuple(load_grader(spec) for spec in rewards)
    if set(rewards) <= set(QUICK):
        return rewards, InProcess(loaded)
    if own := next((spec for spec in rewards if spec.startswith("__main__:")), ""):
        raise UserError(
            f"grader {own!r} is in the running script, which a grader's process does not run; move it to a module of "
            "its own, or pass the function itself (reward_fn, reward_funcs)"
        )
    return rewards, _in_workers(config, [functools.partial(load_grader, spec) for spec in rewards])


def _in_workers(config: TaskConfig, loaders: Sequence[Callable[[], RewardFn]]) -> WorkerPool:
    limits = config.grading
    return WorkerPool(loaders, limits.workers, limits.seconds, int(limits.memory * 2**30))


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
