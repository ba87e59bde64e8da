"""Tasks: problems, prompts and graders, as text only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vineppo.config import TaskConfig
from vineppo.tasks.graders import apply_reward
from vineppo.types import Problem, RewardFn, Split, Task


def build_task(
    config: TaskConfig,
    format_prompt: Callable[[str], str] | None = None,
    reward_fn: RewardFn | None = None,
) -> Task:
    """The task that the configuration names.

    Args:
        config: the `task` section.
        format_prompt: the tokenizer's chat template as a function of the prompt; used by `jsonl` when
            `config.chat_template` is on.
        reward_fn: the caller's own reward function, in place of the task's grader.
    Raises:
        UserError: for files, columns or graders that cannot be used.
    """
    if config.name == "jsonl":
        from vineppo.tasks.jsonl import JsonlTask

        return JsonlTask(config, format_prompt, reward_fn)
    from vineppo.tasks.chain import ChainTask

    task: Task = ChainTask(level=config.level, num_steps=config.num_steps, writers=config.writers)
    return Regraded(task, reward_fn) if reward_fn else task


@dataclass(frozen=True)
class Regraded:
    """A task's problems under another reward function; implements `types.Task`."""

    task: Task
    reward_fn: RewardFn

    def size(self, split: Split) -> int | None:
        """Number of problems in a split; None when endless."""
        return self.task.size(split)

    def problem(self, split: Split, index: int) -> Problem:
        """The problem at an address."""
        return self.task.problem(split, index)

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, response) for supervised fine-tuning."""
        return self.task.demonstration(split, index)

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        """Reward of each response text by `reward_fn`."""
        return apply_reward(self.reward_fn, problems, texts)
