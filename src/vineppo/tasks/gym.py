"""Provide the data sets of the library reasoning-gym (logic, games, graphs, code, arithmetic and more) as tasks.

The library generates problems from a seed and an index, and has a scorer for each data set, which grades the responses.
The splits use different seeds. A few data sets, such as the ARC tasks, choose problems from a finite collection, so
their splits can share problems.
"""

from __future__ import annotations

import difflib
import functools
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vineppo.config.schema import GYM, TaskConfig
from vineppo.objects import first_line
from vineppo.tasks.grading.sandbox import Protection, missing_protection
from vineppo.types import Chat, Problem, RewardFn, Split, UserError

SEEDS: dict[Split, int] = {"train": 0, "validation": 1 << 28, "test": 1 << 29}
"""Seed of each split. The seeds are far apart, because the library generates a problem from seed + index."""
SIZES: dict[Split, int] = {"train": 10_000, "validation": 1_000, "test": 1_000}
"""Default number of problems in each split."""
TEMPLATE = "{prompt}\n\nThink step by step, one short line per step. End with a line `#### ` and the final answer."
"""Default text of the prompt, in which `{prompt}` is replaced by the question."""
MARK = "####"
"""Text in front of the final answer of a response."""
EVALUATING = frozenset(
    {
        "binary_matrix",
        "composite",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Data sets whose scorers evaluate the answer as Python code, by `eval` or by SymPy's `parse_expr`. The data set
`composite` uses the scorers of other data sets."""


class GymTask:
    """Problems of one reasoning-gym data set; implements `types.ProblemSource`.

    Args:
        config: the settings of the section `task`. `config.options` are passed to the data set, except for `size`,
            which is the number of training problems.
        format_prompt: function that applies the tokenizer's chat template to a conversation and returns the text of the
            prompt. It is used if `config.chat_template` is true.
    Raises:
        UserError: if reasoning-gym is not installed, has no such data set, or rejects the options.
    """

    def __init__(self, config: TaskConfig, format_prompt: Callable[[Chat], str] | None = None):
        name = config.name[len(GYM) :]
        options = dict(config.options)
        size = options.pop("size", SIZES["train"])
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UserError(f"task.options has size {size!r}; it must be a whole number of at least 1")
        self._sizes = {**SIZES, "train": size}
        if "seed" in options:
            raise UserError("task.options has seed, which the task sets itself to keep the splits apart; remove it")
        self._data = {
            split: _create(name, {**options, "seed": seed, "size": self._sizes[split]}) for split, seed in SEEDS.items()
        }
        self._template = config.prompt_template or TEMPLATE
        self._format_prompt = format_prompt if config.chat_template else None
        self._template_kwargs = config.chat_template_kwargs
        self.load_reward: Callable[[], RewardFn] = functools.partial(load_scorer, name, options)
        # Problems are cached, because generating one can be slow and training reads the same problems many times.
        self.problem = functools.lru_cache(maxsize=4096)(self._problem)  # type: ignore[method-assign]

    def size(self, split: Split) -> int:
        """Return the number of problems in a split."""
        return self._sizes[split]

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split.

        Its column `question` is the question without the prompt template. Its column `entry` is the whole entry of the
        data set, which the scorer needs.
        """
        raise AssertionError("__init__ replaces this method")

    def _problem(self, split: Split, index: int) -> Problem:
        """Generate the problem. `problem` is this method with a cache."""
        entry = _seeded_entry(self._data[split], SEEDS[split] + index, index)
        prompt = self._template.replace("{prompt}", str(entry["question"]).strip())
        chat = None
        if self._format_prompt:
            chat = Chat.of_user(prompt, self._template_kwargs)
            try:
                prompt = self._format_prompt(chat)
            except UserError as error:
                raise UserError(f"problem {split}/{index}: {error}") from error
        answer = "" if entry.get("answer") is None else str(entry["answer"])
        return Problem(f"{split}/{index}", prompt, answer, {"question": entry["question"], "entry": entry}, chat=chat)

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Raise UserError, because reasoning-gym has answers but no worked solutions."""
        raise UserError(
            "reasoning-gym has no worked solutions; set task.demonstrator to a module:function that writes them"
        )


def _seeded_entry(data: Any, seed: int, index: int) -> Any:
    """Return the entry of a data set with this index.

    Some data sets draw from Python's global random generator. The generator is seeded during the call, so that the
    entry is always the same. Afterwards, its earlier state is restored.
    """
    before = random.getstate()
    random.seed(seed)
    try:
        return data[index]
    finally:
        random.setstate(before)


def load_scorer(name: str, options: Mapping[str, Any]) -> RewardFn:
    """Return a reward function that applies the scorer of a data set to the text after the last `####` of a response.

    The reward is 0 if there is no `####`, or no text after it. Some scorers give partial rewards to wrong answers.
    """
    # The scorer is a method of the data set. The seed and the size of the data set do not affect it.
    score = _create(name, {**options, "seed": 0, "size": 2}).score_answer

    def reward(
        prompts: Sequence[str], completions: Sequence[str], entry: Sequence[Mapping[str, Any]], **_: Any
    ) -> list[float]:
        return [
            float(score(answer, item)) if (answer := final_answer(text)) else 0.0
            for text, item in zip(completions, entry, strict=True)
        ]

    return reward


def scorer_protection(name: str, trusted: bool) -> Protection:
    """Return whether the scorer of a data set must run in the sandbox.

    Args:
        trusted: the setting `task.grading.trust_scorer`.
    Raises:
        UserError: if the scorer evaluates answers as code, the system has no sandbox, and the scorer is not trusted.
    """
    if name not in EVALUATING or trusted:
        return "available"
    if reason := missing_protection():
        raise UserError(
            f"task.name {GYM}{name}: its scorer evaluates the model's answers as Python code, and this system has no "
            f"sandbox for that: {reason}; use Linux with Landlock and seccomp, or set task.grading.trust_scorer to true"
        )
    return "required"


def final_answer(text: str) -> str | None:
    """Return the text after the last `####`, possibly several lines, or None if there is no `####`."""
    _, mark, rest = text.rpartition(MARK)
    return rest.strip() if mark else None


def _create(name: str, options: dict[str, Any]) -> Any:
    """Create a data set of reasoning-gym.

    Raises:
        UserError: if reasoning-gym is not installed, has no such data set, or rejects the options.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError(
            f"task.name {GYM}{name} needs reasoning-gym ({first_line(error)}); install it with "
            "pip install 'vineppo[gym]'"
        ) from error
    logging.getLogger("reasoning_gym").setLevel(logging.ERROR)
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(DATASETS))}"
        raise UserError(f"task.name: reasoning-gym has no data set {name!r}; {hint}")
    try:
        return reasoning_gym.create_dataset(name, **options)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        allowed = ", ".join(sorted(field for field in DATASETS[name][1].__dataclass_fields__ if field != "seed"))
        raise UserError(
            f"task.options: reasoning-gym's {name} rejects these options ({first_line(error)}); allowed: {allowed}"
        ) from error
