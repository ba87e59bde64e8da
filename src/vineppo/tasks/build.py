"""`build_task` creates the task that the setting `task.name` selects."""

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
from vineppo.tasks.grading.graders import GRADERS, QUICK, load_grader
from vineppo.tasks.grading.judge import InProcess, Judge
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.tasks.mathematics import BENCHMARKS
from vineppo.types import Problem, ProblemSource, RewardFn, Split, Task, UserError

_NamesAndJudge = tuple[tuple[str, ...], Judge]
"""(names of the reward functions for metrics, judge that calls these functions)."""


def build_task(
    config: TaskConfig,
    format_prompt: Callable[[Any], str] | None = None,
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    tables: Mapping[Split, Any] | None = None,
) -> Task:
    """Build the task that the configuration selects.

    Args:
        config: the `task` section.
        format_prompt: applies the tokenizer's chat template to a prompt.
        reward_fn: reward functions to use instead of the task's. They are called in this process, once for all
            responses of a batch.
        tables: in-memory rows of each split, used instead of files by the task `dataset`.
    Raises:
        UserError: if a file, a column or a grader cannot be used.
    """
    fns = tuple(reward_fn) if isinstance(reward_fn, Sequence) else (reward_fn,) if reward_fn else ()
    if config.name == "chain":
        chain = ChainTask(level=config.level, num_steps=config.num_steps, writers=config.writers)
        return _graded(config, chain, fns, lambda: (("chain",), InProcess((grade_chain,))))
    if config.name.startswith(GYM):
        from vineppo.tasks.gym import GymTask

        gym = GymTask(config, format_prompt)
        return _graded(config, gym, fns, lambda: ((config.name,), _in_workers(config, [gym.load_reward])))
    default_rewards: tuple[str, ...] = ("exact",)
    layout = Layout()
    if config.name in BENCHMARKS:
        benchmark = BENCHMARKS[config.name]
        layout, default_rewards = benchmark.layout, benchmark.rewards
        if not config.train_path:
            config = replace(config, train_path=benchmark.train_path, test_path=config.test_path or benchmark.test_path)
    elif not config.train_path and not tables:
        raise UserError("task.train_path is empty; task.name dataset needs problems: a file or a Hugging Face Hub id")
    rewards = () if fns else config.rewards or default_rewards
    source = DatasetTask(
        config,
        layout,
        format_prompt,
        tables=tables,
        hash_answers="hash" in rewards,
        needs_answer=any(name in GRADERS for name in rewards),
    )
    return _graded(config, source, fns, lambda: _from_names(config, default_rewards))


def _graded(
    config: TaskConfig, source: ProblemSource, fns: tuple[RewardFn, ...], default: Callable[[], _NamesAndJudge]
) -> Graded:
    """Combine the problems with reward functions.

    These are `fns` if there are any, otherwise those of `task.rewards`, and if that is empty the default of the task.
    """
    names, judge = _from_functions(fns) if fns else _from_names(config, config.rewards) if config.rewards else default()
    weights = config.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(f"task.reward_weights has {len(weights)} numbers for {len(names)} reward functions")
    writer = _demonstrator(config.demonstrator) if config.demonstrator else None
    return Graded(
        source, judge, names, weights, config.grading.max_error_share, config.grading.truncated, demonstrate=writer
    )


def _from_functions(fns: tuple[RewardFn, ...]) -> _NamesAndJudge:
    return tuple(_unique([getattr(fn, "__name__", type(fn).__name__) for fn in fns])), InProcess(fns)


def _from_names(config: TaskConfig, rewards: tuple[str, ...]) -> _NamesAndJudge:
    # The functions are loaded in this process too, so that a misspelt name is reported before any worker starts.
    loaded = tuple(load_grader(spec) for spec in rewards)
    if set(rewards) <= set(QUICK):
        return rewards, InProcess(loaded)
    if in_script := next((spec for spec in rewards if spec.startswith("__main__:")), ""):
        raise UserError(
            f"grader {in_script!r} is defined in the running script, which grader processes do not run; move it to a "
            "separate module, or pass the function itself (reward_fn, reward_funcs)"
        )
    return rewards, _in_workers(config, [functools.partial(load_grader, spec) for spec in rewards])


def _in_workers(config: TaskConfig, loaders: Sequence[Callable[[], RewardFn]]) -> WorkerPool:
    limits = config.grading
    return WorkerPool(loaders, limits.workers, limits.seconds, int(limits.memory * 2**30))


def _demonstrator(spec: str) -> Callable[[Problem], str]:
    """Return a function of a problem that calls the user-defined demonstrator and checks that the result is text."""
    write: Callable[..., Any] = load_grader(spec)

    def demonstrate(problem: Problem) -> str:
        columns = {name: value for name, value in problem.columns.items() if name not in ("prompt", "answer")}
        try:
            text = write(prompt=problem.prompt, answer=problem.answer, **columns)
        except Exception as error:
            raise UserError(
                f"task.demonstrator {spec} failed for problem {problem.id}: {first_line(error)}; it is called as "
                f"fn(prompt, answer, **columns) with columns {', '.join(columns) or 'none'} and must return text"
            ) from error
        if not isinstance(text, str):
            raise UserError(
                f"task.demonstrator {spec} returned a {type(text).__name__} for {problem.id}; allowed: text"
            )
        return text

    return demonstrate


def _unique(names: Sequence[str]) -> list[str]:
    """Return the names with the index appended to repeated names, so that two lambdas do not share a metric."""
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
