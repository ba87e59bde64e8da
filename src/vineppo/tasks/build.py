"""Build the task that the setting `task.name` selects.

A task combines a source of problems, reward functions, and a judge, which calls the reward functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vineppo.config.schema import GYM, TaskConfig
from vineppo.config.settings import replace
from vineppo.objects import first_line
from vineppo.tasks.cells import MISSING, cell, text_cell
from vineppo.tasks.chain import ChainTask, grade_chain
from vineppo.tasks.dataset import DatasetTask, Layout, layout_of
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.graders import GRADERS, QUICK, load_grader
from vineppo.tasks.grading.judge import InProcess, Judge
from vineppo.tasks.grading.ray import RayGraders
from vineppo.tasks.grading.rewards import check_signature
from vineppo.tasks.grading.sandbox import Protection
from vineppo.tasks.grading.workers import WorkerPool
from vineppo.tasks.mathematics import BENCHMARKS
from vineppo.tasks.rows import check_source
from vineppo.types import Chat, Problem, ProblemSource, RewardFn, Split, Task, UserError

_NamesAndJudge = tuple[tuple[str, ...], Judge]
"""(names of the reward functions, which are used in metrics; judge that calls these functions)."""


def build_task(
    config: TaskConfig,
    format_prompt: Callable[[Chat], str] | None = None,
    reward_fn: RewardFn | Sequence[RewardFn] | None = None,
    tables: Mapping[Split, Any] | None = None,
) -> Task:
    """Build the task that `config.name` selects.

    Args:
        config: the settings of the section `task`.
        format_prompt: function that applies the tokenizer's chat template to a conversation and returns the text of the
            prompt. It is needed if `config.chat_template` is true, or if prompts are lists of messages.
        reward_fn: one or several reward functions that replace those of the task. Each is called in this process, once
            with all responses of a batch.
        tables: split -> its rows in memory. Tasks that read tables (`dataset`, `gsm8k`, `math`) use these rows instead
            of files.
    Returns:
        The task, which implements `types.Task`.
    Raises:
        UserError: if a setting, a file, a column or a grader cannot be used.
    """
    fns = tuple(reward_fn) if isinstance(reward_fn, Sequence) else (reward_fn,) if reward_fn else ()
    if config.name == "chain":
        chain = ChainTask(config.level, config.num_steps, config.writers, config.trap_share)
        return _graded(config, chain, fns, lambda: (("chain",), InProcess((grade_chain,))))
    if config.name.startswith(GYM):
        from vineppo.tasks.gym import GymTask

        gym = GymTask(config, format_prompt)
        return _graded(config, gym, fns, lambda: _from_scorer(config, gym.load_reward))
    default_rewards: tuple[str, ...] = ("exact",)
    if config.name == "dataset" and tables:
        layout = Layout()
    else:
        config, layout, default_rewards = _table_settings(config)
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


def check_task(config: TaskConfig, splits: Mapping[str, Split] | None = None) -> None:
    """Check what can be checked about a task without a model: that its data exist and its reward functions load.

    `build_task` checks all rows. It needs the model's chat template for that.

    Args:
        config: the settings of the section `task`.
        splits: name of a setting -> split of the problems that the setting selects, which must exist.
    Raises:
        UserError: if a data set, a split, a file or a reward function does not exist or cannot be used.
    """
    for spec in config.rewards:
        check_signature(load_grader(spec), spec)
    if config.demonstrator:
        load_grader(config.demonstrator)
    if config.name.startswith(GYM):
        from vineppo.tasks.gym import GymTask

        GymTask(config, str)
    elif config.name != "chain":
        config, layout, default_rewards = _table_settings(config)
        needs_answer = bool(config.answer_column) or any(n in GRADERS for n in config.rewards or default_rewards)
        layout = layout_of(config, layout)
        columns = {"prompt_column": layout.prompt_column}
        if needs_answer:
            columns["answer_column"] = layout.answer_column
        for setting in ("train_path", "validation_path", "test_path"):
            if source := getattr(config, setting):
                row = check_source(setting, source)
                for name, column in columns.items():
                    if row is not None and cell(row, column) is MISSING:
                        text_cell(f"task.{setting}: {source}", row, name, column)  # raises UserError
        for name, split in (splits or {}).items():
            _check_split(config, name, split)


def _check_split(config: TaskConfig, setting: str, split: Split) -> None:
    """Raise UserError if a task that reads tables has no table for a split. `setting` is the setting that selects it.

    Problems for validation can be taken from the training table.
    """
    if split == "test" and not config.test_path:
        origin = "task.validation_path" if config.validation_path else "the last rows of task.train_path"
        raise UserError(
            f"{setting} is test, but there is no test split: task.test_path is empty; set task.test_path to a file of "
            f"problems, or use --{setting} validation ({origin})"
        )


def _table_settings(config: TaskConfig) -> tuple[TaskConfig, Layout, tuple[str, ...]]:
    """Return (settings with the paths of a benchmark, layout of the tables, default reward functions) of a task.

    Raises:
        UserError: if the task `dataset` has no path.
    """
    if config.name not in BENCHMARKS:
        if not config.train_path:
            raise UserError(
                "task.train_path is empty; task.name dataset needs problems: a file or a Hugging Face Hub id"
            )
        return config, Layout(), ("exact",)
    benchmark = BENCHMARKS[config.name]
    if not config.train_path:
        config = replace(config, train_path=benchmark.train_path, test_path=config.test_path or benchmark.test_path)
    return config, benchmark.layout, benchmark.rewards


def _graded(
    config: TaskConfig, source: ProblemSource, fns: tuple[RewardFn, ...], default: Callable[[], _NamesAndJudge]
) -> Graded:
    """Return the task that takes its problems from `source` and grades responses with weighted reward functions.

    The reward functions are `fns`. If `fns` is empty, they are those named in `config.rewards`. If that is empty too,
    `default()` gives the reward functions of the task.
    """
    names, judge = _from_functions(fns) if fns else _from_names(config, config.rewards) if config.rewards else default()
    weights = config.reward_weights or (1.0,) * len(names)
    if len(weights) != len(names):
        raise UserError(f"task.reward_weights has {len(weights)} numbers for {len(names)} reward functions")
    writer = _demonstrator(config.demonstrator) if config.demonstrator else None
    return Graded(
        source,
        judge,
        names,
        weights,
        config.grading.max_error_share,
        config.grades_truncated,
        demonstrate=writer,
        train_problems=config.train_problems,
    )


def _from_functions(fns: tuple[RewardFn, ...]) -> _NamesAndJudge:
    """Return the names of the functions, and a judge that calls the functions in this process.

    Raises:
        UserError: if the signature of a function does not fit.
    """
    for fn in fns:
        check_signature(fn)
    return tuple(_unique([getattr(fn, "__name__", type(fn).__name__) for fn in fns])), InProcess(fns)


def _from_names(config: TaskConfig, rewards: tuple[str, ...]) -> _NamesAndJudge:
    """Return the given names, and a judge that calls the reward functions with these names.

    If all of them are fast built-in functions, the judge calls them in this process, otherwise in grader processes.
    """
    # The functions are always loaded in this process, so that a misspelt name is reported before a process starts.
    loaded = tuple(load_grader(spec) for spec in rewards)
    for spec, fn in zip(rewards, loaded, strict=True):
        check_signature(fn, spec)
    if set(rewards) <= set(QUICK):
        return rewards, InProcess(loaded)
    if in_script := next((spec for spec in rewards if spec.startswith("__main__:")), ""):
        raise UserError(
            f"grader {in_script!r} is defined in the running script, which grader processes do not run; move it to a "
            "separate module, or pass the function itself (reward_fn, reward_funcs)"
        )
    # The user's own functions may need the network or programs, such as a language model that judges or a compiler.
    protection: Protection = "available" if set(rewards) <= set(GRADERS) else "none"
    return rewards, _in_workers(config, [functools.partial(load_grader, spec) for spec in rewards], protection)


def _from_scorer(config: TaskConfig, load_scorer: Callable[[], RewardFn]) -> _NamesAndJudge:
    """Return the scorer of a reasoning-gym data set as the only reward function, called in grader processes."""
    from vineppo.tasks.gym import scorer_protection

    protection = scorer_protection(config.name.removeprefix(GYM), config.grading.trust_scorer)
    return (config.name,), _in_workers(config, [load_scorer], protection)


def _in_workers(config: TaskConfig, loaders: Sequence[Callable[[], RewardFn]], protection: Protection) -> Judge:
    """Return a judge that calls the reward functions in grader processes, with the limits of `config.grading`.

    Args:
        loaders: picklable functions without arguments, each of which returns a reward function.
        protection: whether the processes run in the sandbox.
    """
    limits = config.grading
    judge = RayGraders if limits.pool == "ray" else WorkerPool
    return judge(loaders, limits.workers, limits.seconds, int(limits.memory * 2**30), protection)


def _demonstrator(spec: str) -> Callable[[Problem], str]:
    """Load the user-defined function named in `task.demonstrator`, which writes demonstrations.

    Returns:
        A function that maps a problem to the text of its demonstration. It raises UserError if the user-defined
        function fails or does not return text.
    """
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
    """Make names unique: a name that occurs more than once becomes `name_index`, such as `<lambda>_1`.

    Without the index, the rewards of two lambdas, which have the same name, would be added to one metric.
    """
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
