"""Define the tasks `gsm8k` and `math`: how the data sets GSM8K and MATH are read, split and graded.

Prompts, splits and graders are those of the released code of the VinePPO paper (arXiv 2410.01679). Prompts for chat
models are added. Both data sets are read from the Hugging Face Hub, or from files with the same columns
(`task.train_path`, `task.test_path`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vineppo.tasks.dataset import MAX_HELD_OUT, Layout

PAPER_PROMPT = "[MATH_TASK] Problem:\n{prompt}\n\nSolution:"
"""Prompt template of the paper, for models without a chat template."""
PAPER_STOP = "\n\n\nProblem:"
"""Stop string of the paper: the text with which a model begins a further problem after its solution."""
_STEP_BY_STEP = "Solve the problem step by step, one short line per step. "
_CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Benchmark:
    """A published data set of problems, and how a task uses it."""

    layout: Layout
    """How the tables of the data set are read."""
    train_path: str
    """Hugging Face Hub id of the training problems."""
    test_path: str
    """Hugging Face Hub id of the test problems."""
    rewards: tuple[str, ...]
    """Names of the reward functions that are used if `task.rewards` is empty."""


def without_calculator_notes(solution: str) -> str:
    """Return a GSM8K solution without calculator annotations such as `<<48/2=24>>`."""
    return _CALCULATOR_NOTE.sub("", solution)


def _held_out(full_size: int, count: int) -> Callable[[int], int]:
    """Return a function that computes how many of the training problems are used for validation instead.

    The function gets the number of training problems. For `full_size` problems, it returns `count`, as in the paper.
    For any other number, it returns a tenth, but at least 1 and at most 200.
    """
    return lambda size: count if size == full_size else min(MAX_HELD_OUT, max(1, size // 10))


# Keys are values of the setting `task.name`.
BENCHMARKS = {
    "gsm8k": Benchmark(
        Layout(
            prompt_column="question",
            prompt_template=PAPER_PROMPT,
            chat_template=_STEP_BY_STEP + "End with a line `#### ` and the number.\n\n{prompt}",
            held_out=_held_out(7_473, 373),
            demonstrate=without_calculator_notes,
            response_prefix=" ",
        ),
        train_path="openai/gsm8k/main",
        test_path="openai/gsm8k/main",
        rewards=("hash",),
    ),
    "math": Benchmark(
        Layout(
            prompt_column="problem",
            demonstration_column="solution",
            prompt_template=PAPER_PROMPT,
            chat_template=_STEP_BY_STEP + "Write the final answer as \\boxed{answer}.\n\n{prompt}",
            held_out=_held_out(12_000, 500),
            blank_answers=True,
            response_prefix=" ",
        ),
        train_path="nlile/hendrycks-MATH-benchmark",
        test_path="nlile/hendrycks-MATH-benchmark",
        rewards=("boxed",),
    ),
}
