"""Problems from JSON-lines files: a prompt column, an answer column, and whatever further columns a grader wants."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vineppo.config import TaskConfig
from vineppo.tasks.graders import apply_reward, first_line, grade_hash, hash_number, load_grader, no_hash_number
from vineppo.types import Problem, RewardFn, Split, UserError

MAX_HELD_OUT = 200


class JsonlTask:
    """Problems of the user's own files; implements `types.Task`.

    All files are read and checked when the task is built, so that a mistake shows before anything is sampled. Prompts
    must be text; answers may be text or numbers (72 becomes "72"). Blank lines are skipped. The row's other columns go
    to the reward function.

    Args:
        config: the `task` section, with name `jsonl`.
        format_prompt: wraps a finished prompt in the tokenizer's chat template. Used if and only if
            `config.chat_template` is on, and needed then.
        reward_fn: grades in place of `config.grader`.
    Raises:
        UserError: for a file that cannot be used (one line: which, where in it, what is needed).
    """

    def __init__(
        self,
        config: TaskConfig,
        format_prompt: Callable[[str], str] | None = None,
        reward_fn: RewardFn | None = None,
    ) -> None:
        assert format_prompt or not config.chat_template, "task.chat_template is on but no format_prompt was passed"
        self._config = config
        self._format_prompt = format_prompt if config.chat_template else None
        self._reward_fn = reward_fn or load_grader(config.grader)
        train = self._read("train_path")
        if config.validation_path:
            validation = self._read("validation_path")
        else:
            train, validation = _hold_out(train, config.train_path)
        self._splits: dict[Split, tuple[Problem, ...]] = {
            "train": _numbered("train", train),
            "validation": _numbered("validation", validation),
        }
        if config.test_path:
            self._splits["test"] = _numbered("test", self._read("test_path"))

    def size(self, split: Split) -> int:
        """Number of problems in a split. Raises UserError for `test` without a test file."""
        return len(self._split(split))

    def problem(self, split: Split, index: int) -> Problem:
        """The problem at an address, 0 <= index < size(split); its id is "split/index"."""
        assert 0 <= index < self.size(split), f"{split} has {self.size(split)} problems; no index {index}"
        return self._split(split)[index]

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, the answer column as it stands) for supervised fine-tuning."""
        problem = self.problem(split, index)
        return problem.prompt, problem.answer

    def grade(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[float]:
        """Reward of each response text to the problem beside it, from the grader of the configuration."""
        return apply_reward(self._reward_fn, problems, texts)

    def _split(self, split: Split) -> tuple[Problem, ...]:
        if split not in self._splits:
            raise UserError(f"there is no {split} split: task.{split}_path is empty; give a file of problems")
        return self._splits[split]

    def _read(self, setting: str) -> list[Problem]:
        path = getattr(self._config, setting)
        problems = [self._problem(f"{path} line {number}", row) for number, row in _rows(setting, Path(path))]
        if not problems:
            raise UserError(f"task.{setting}: {path} is empty; it must hold one JSON object a line")
        return problems

    def _problem(self, where: str, row: dict[str, Any]) -> Problem:
        config = self._config
        prompt = _cell(where, row, "prompt_column", config.prompt_column)
        answer = _cell(where, row, "answer_column", config.answer_column)
        if not prompt.strip():
            raise UserError(f"{where}: column {config.prompt_column!r} is blank; every problem needs a prompt")
        if self._reward_fn is grade_hash and hash_number(answer) is None:
            raise UserError(f"{where}: {no_hash_number(answer)}")
        # Not str.format: templates and problems may hold braces of their own (LaTeX, code).
        prompt = config.prompt_template.replace("{prompt}", prompt)
        if self._format_prompt:
            prompt = self._format_prompt(prompt)
        used = (config.prompt_column, config.answer_column)
        return Problem("", prompt, answer, {name: value for name, value in row.items() if name not in used})


def _rows(setting: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, JSON object) of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _object(f"{path} line {number}", line)
    except FileNotFoundError as error:
        message = f"task.{setting}: no such file: {path} (a relative path starts at {Path.cwd()})"
        raise UserError(message) from error
    except UnicodeDecodeError as error:
        raise UserError(f"task.{setting}: {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"task.{setting}: cannot read {path}: {error.strerror or first_line(error)}") from error


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object ({first_line(error)}); every line must be one") from error
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object but a {type(row).__name__}; every line must be one")
    return row


def _cell(where: str, row: dict[str, Any], setting: str, column: str) -> str:
    """A row's prompt or answer as text."""
    if column not in row:
        near = difflib.get_close_matches(column, row, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{where} has no column {column!r} (it has: {', '.join(row) or 'none'}); {hint}set task.{setting}"
        )
    value = row[column]
    # A number as the prompt is almost surely the wrong column (an id); as the answer it is common.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and setting == "answer_column":
        return str(value)
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        allowed = "text or a number" if setting == "answer_column" else "text"
        raise UserError(f"{where}: column {column!r} is {kind}; it must be {allowed} (task.{setting} names the column)")
    if any("\ud800" <= character <= "\udfff" for character in value):
        # JSON can escape half a surrogate pair; tokenizers cannot encode one.
        raise UserError(f"{where}: column {column!r} holds half a surrogate pair; it must be Unicode text")
    return value


def _hold_out(problems: list[Problem], path: str) -> tuple[list[Problem], list[Problem]]:
    """(training problems, validation problems): the last tenth is held out, at least 1 and at most 200."""
    if len(problems) < 2:
        raise UserError(f"{path} has 1 problem, too few to hold one out; add problems or set task.validation_path")
    num_held_out = min(MAX_HELD_OUT, max(1, len(problems) // 10))
    return problems[:-num_held_out], problems[-num_held_out:]


def _numbered(split: Split, problems: list[Problem]) -> tuple[Problem, ...]:
    return tuple(
        Problem(f"{split}/{index}", problem.prompt, problem.answer, problem.columns)
        for index, problem in enumerate(problems)
    )
