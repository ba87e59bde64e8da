"""Find prompts that do not fit into the context of the model, before the first iteration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal

from vineppo.config.schema import EvalConfig
from vineppo.model.codec import Codec
from vineppo.tasks.dataset import DatasetTask
from vineppo.training.rollouts import check_length
from vineppo.types import Problem, Split, Task, UserError

_TOKENS_PER_BYTE = 4
"""Upper bound, with a margin, of the tokens per byte of a prompt. Shorter prompts need not be encoded."""
_SPECIAL_TOKENS = 64
"""Upper bound of the tokens that a tokenizer adds to a prompt."""


def used_problems(settings: EvalConfig) -> dict[Split, int | None]:
    """Return how many problems of each split a training run uses, counted from the first; None means all of them."""
    counts: dict[Split, int | None] = {"train": None}
    if settings.every:
        counts["validation"] = settings.num_problems
    if settings.final_num_problems:
        counts[settings.split] = max(settings.final_num_problems, counts.get(settings.split) or 0)
    return counts


def fit_prompts(
    task: Task,
    codec: Codec,
    max_new_tokens: int,
    overlong: Literal["error", "drop"],
    counts: Mapping[Split, int | None],
) -> dict[Split, int]:
    """Check that the prompts of a table fit into the model's context together with a response of maximum length.

    Of a task that generates its problems, only the first problem of each split is checked. `rollouts.check_length`
    checks each problem that is drawn.

    Args:
        max_new_tokens: maximum length of a response in tokens.
        overlong: `drop` removes the prompts that are too long from the task; `error` refuses them.
        counts: number of problems of each split to check, counted from the first; None means all. With `drop`, all
            problems of these splits are checked.
    Returns:
        The number of problems that were removed from each split.
    Raises:
        UserError: if a prompt is too long and `overlong` is `error`, or if no problem of a split would be left.
    """
    source = getattr(task, "source", None)
    if not isinstance(source, DatasetTask):
        for split in counts:
            if task.size(split) != 0:
                first = task.problem(split, 0)
                check_length(first.id, len(codec.prompt_ids(first)), max_new_tokens, codec.max_length)
        return {}
    dropped: dict[Split, int] = {}
    for split, count in counts.items():
        size = source.size(split)
        checked = size if count is None or overlong == "drop" else min(count, size)
        problems = (source.problem(split, index) for index in range(checked))
        lengths = [_tokens(codec, problem, max_new_tokens) for problem in problems]
        long = [index for index, tokens in enumerate(lengths) if tokens + max_new_tokens > codec.max_length]
        if not long:
            continue
        place = source.place(split, long[0])
        if overlong == "error" or len(long) == size:
            advice = "leave such problems out with task.overlong drop" if len(long) < size else "use another model"
            raise UserError(
                f"{place}: the prompt has {lengths[long[0]]} tokens; with a response of {max_new_tokens} "
                f"(max_new_tokens) that is more than the model's context of {codec.max_length} ({len(long):,} of "
                f"{checked:,} {split} problems are too long); shorten the prompts, lower max_new_tokens, or {advice}"
            )
        warnings.warn(
            f"task.overlong drop: {len(long):,} of {size:,} {split} problems are left out, because their prompts are "
            f"too long for the model's context of {codec.max_length} tokens (the first: {place})",
            stacklevel=2,
        )
        source.drop(split, long)
        dropped[split] = len(long)
    return dropped


def _tokens(codec: Codec, problem: Problem, max_new_tokens: int) -> int:
    """Return the number of tokens of a prompt, or 0 without encoding it if it certainly fits."""
    if len(problem.prompt.encode()) * _TOKENS_PER_BYTE + _SPECIAL_TOKENS + max_new_tokens <= codec.max_length:
        return 0
    return len(codec.prompt_ids(problem))
