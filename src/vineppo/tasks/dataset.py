"""Problems from tables: a prompt column, an answer column, and whatever further columns a grader wants."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vineppo.config.schema import TaskConfig
from vineppo.tasks.grading.graders import hash_number, no_hash_number
from vineppo.tasks.rows import Row, read_rows, table_rows
from vineppo.types import Problem, Split, UserError

MAX_HELD_OUT = 200
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Layout:
    """What is where in the rows, and how a prompt is written: a task's own, unless the configuration says otherwise."""

    prompt_column: str = "prompt"
    answer_column: str = "answer"
    demonstration_column: str = ""
    """Empty: the answer."""
    prompt_template: str = "{prompt}"
    chat_template: str = "{prompt}"
    """The user's message, where the tokenizer's chat template writes the rest."""
    held_out: Callable[[int], int] = lambda size: min(MAX_HELD_OUT, max(1, size // 10))
    """How many of the last training rows are for validation where there is no file for it."""
    demonstrate: Callable[[str], str] = str
    """The response to imitate, from the text of its column."""
    response_prefix: str = ""
    """What a demonstration begins with, except behind a chat template."""


@dataclass(frozen=True)
class _Item:
    problem: Problem
    demonstration: str | None
    """The response to imitate; None where the row has none."""


def layout_of(config: TaskConfig, own: Layout) -> Layout:
    """The task's own layout with what the configuration sets."""
    names = ("prompt_column", "answer_column", "demonstration_column")
    chosen = {name: getattr(config, name) for name in names if getattr(config, name)}
    if config.prompt_template:
        chosen.update(prompt_template=config.prompt_template, chat_template=config.prompt_template)
    return replace(own, **chosen)


class DatasetTask:
    """Problems of tables; implements `types.ProblemSource`.

    Everything is read and checked when the task is built, so that a mistake shows before anything is sampled. Prompts
    must be text, or messages of a conversation; answers may be text or numbers (72 becomes "72"). The row's other
    columns go to the reward function.

    Args:
        config: the `task` section.
        layout: where things are.
        format_prompt: the tokenizer's chat template: text, or messages, to the whole prompt. Used for text if and only
            if `config.chat_template` is on, for messages always.
        tables: rows that were passed in memory, by split, in the place of files. Nothing is held out from them, and an
            answer may be missing, or anything.
        hash_answers: whether every answer must have a number after `####`.
    Raises:
        UserError: for a file that cannot be used (one line: which, where in it, what is needed).
    """

    def __init__(
        self,
        config: TaskConfig,
        layout: Layout,
        format_prompt: Callable[[Any], str] | None = None,
        *,
        tables: Mapping[Split, Any] | None = None,
        hash_answers: bool = False,
    ) -> None:
        self._config, self._layout, self._format_prompt = config, layout_of(config, layout), format_prompt
        self._hash_answers, self._tables = hash_answers, bool(tables)
        self._splits: dict[Split, list[_Item]] = {}
        found = {split: self._items(split, tables or {}) for split in SPLITS}
        if not found["validation"] and not self._tables:
            found["train"], found["validation"] = self._hold_out(found["train"])
        for split, items in found.items():
            if items:
                named = (replace(item.problem, id=f"{split}/{i}") for i, item in enumerate(items))
                self._splits[split] = [_Item(p, item.demonstration) for p, item in zip(named, items, strict=True)]

    def size(self, split: Split) -> int:
        """Number of problems in a split. Raises UserError for `test` without a test file."""
        return len(self._split(split))

    def problem(self, split: Split, index: int) -> Problem:
        """The problem at an address, 0 <= index < size(split); its id is "split/index"."""
        assert 0 <= index < self.size(split), f"{split} has {self.size(split)} problems; no index {index}"
        return self._split(split)[index].problem

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, the demonstration column) for supervised fine-tuning."""
        problem, demonstration = self.problem(split, index), self._split(split)[index].demonstration
        if demonstration is None:
            raise UserError(
                f"problem {problem.id} has no column {self._layout.demonstration_column!r} to imitate "
                f"(its columns: {', '.join(problem.columns)}); set task.demonstration_column or task.demonstrator"
            )
        return problem.prompt, demonstration

    def _split(self, split: Split) -> list[_Item]:
        if split not in self._splits:
            missing = f"no {split} data was given" if self._tables else f"task.{split}_path is empty"
            raise UserError(f"there is no {split} split: {missing}; give a file of problems")
        return self._splits[split]

    def _items(self, split: Split, tables: Mapping[Split, Any]) -> list[_Item]:
        """The problems of a split's own table; none where it has none."""
        setting = f"{split}_path"
        source = f"the {split} data" if tables else getattr(self._config, setting)
        if not source or (tables and tables.get(split) is None):
            return []
        rows = table_rows(source, tables[split]) if tables else read_rows(setting, source, split)
        if not rows:
            raise UserError(
                f"{source if tables else f'task.{setting}: {source}'} is empty; it must hold problems, one a row"
            )
        return [self._item(where, row) for where, row in rows]

    def _hold_out(self, items: list[_Item]) -> tuple[list[_Item], list[_Item]]:
        """(training problems, validation problems): the last ones are held out."""
        if len(items) < 2:
            source = self._config.train_path or "the training data"
            raise UserError(
                f"{source} has 1 problem, too few to hold one out; add problems or set task.validation_path"
            )
        count = self._layout.held_out(len(items))
        return items[:-count], items[-count:]

    def _item(self, where: str, row: Row) -> _Item:
        layout = self._layout
        prompt, messages = self._prompt(where, row)
        reference = None
        if self._tables and (layout.answer_column not in row or not isinstance(row[layout.answer_column], str)):
            reference, answer = row.get(layout.answer_column), _shown(row.get(layout.answer_column))
        else:
            answer = _cell(where, row, "answer_column", layout.answer_column)
        if self._hash_answers and hash_number(answer) is None:
            raise UserError(f"{where}: {no_hash_number(answer)}")
        column, demonstration = layout.demonstration_column, None
        if not column or column in row:
            text = _cell(where, row, "demonstration_column", column) if column else answer
            prefix = "" if self._config.chat_template else layout.response_prefix
            demonstration = prefix + layout.demonstrate(text)
        # Under its own name as well: a reward function may ask for `solution`, whatever it is to us.
        own = {layout.prompt_column, layout.answer_column} & {"prompt", "answer"}
        columns = {name: value for name, value in row.items() if name not in own}
        return _Item(Problem("", prompt, answer, columns, messages, reference), demonstration)

    def _prompt(self, where: str, row: Row) -> tuple[str, tuple[Mapping[str, str], ...]]:
        """The prompt as text, and the conversation that it is, if it is one."""
        layout, column = self._layout, self._layout.prompt_column
        if isinstance(row.get(column), list) and self._format_prompt:
            messages = _messages(where, column, row[column])
            return self._format_prompt(messages), tuple(messages)
        text = _cell(where, row, "prompt_column", column)
        if not text.strip():
            raise UserError(f"{where}: column {column!r} is blank; every problem needs a prompt")
        # Not str.format: templates and problems may hold braces of their own (LaTeX, code).
        if not self._config.chat_template:
            return layout.prompt_template.replace("{prompt}", text), ()
        assert self._format_prompt, "task.chat_template is on but no format_prompt was passed"
        return self._format_prompt(layout.chat_template.replace("{prompt}", text)), ()


def _shown(answer: Any) -> str:
    """An answer of any kind as text; nothing for a missing one."""
    return "" if answer is None else str(answer)


def _messages(where: str, column: str, value: list[Any]) -> list[dict[str, str]]:
    fine = all(isinstance(m, Mapping) and isinstance(m.get("content"), str) and "role" in m for m in value)
    if not value or not fine:
        raise UserError(f"{where}: column {column!r} is a list; allowed: text, or messages with role and content")
    return [{"role": str(m["role"]), "content": m["content"]} for m in value]


def _cell(where: str, row: Row, setting: str, column: str) -> str:
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
