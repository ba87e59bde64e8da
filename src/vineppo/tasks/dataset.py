"""Read the problems of the tasks `dataset`, `gsm8k` and `math` from tables.

A table has a column with prompts, a column with reference answers, and any number of other columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vineppo.config.schema import TaskConfig
from vineppo.tasks.cells import (
    MISSING,
    answer_cell,
    cell,
    check_unicode,
    float_of_pandas,
    has_floats_of_pandas,
    is_blank,
    is_number,
    number_text,
    text_cell,
)
from vineppo.tasks.chat import check_no_conversation, conversation_of, messages_of, tools_of
from vineppo.tasks.grading.graders import hash_number, no_hash_number
from vineppo.tasks.rows import Row, Rows, empty_table, read_rows, table_rows
from vineppo.types import Chat, Problem, Split, UserError

MAX_HELD_OUT = 200
"""Default maximum of the number of training problems that are used for validation instead of training."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Layout:
    """How a task reads a table. Settings of the section `task` override the column names and the templates."""

    prompt_column: str = "prompt"
    answer_column: str = "answer"
    demonstration_column: str = ""
    """Column with the response to imitate in supervised fine-tuning. Empty: the answer column."""
    prompt_template: str = "{prompt}"
    """Text of the prompt, in which `{prompt}` is replaced by the text of the prompt column."""
    chat_template: str = "{prompt}"
    """Text of the user message, in which `{prompt}` is replaced in the same way. It is used instead of
    `prompt_template` if `task.chat_template` is true."""
    held_out: Callable[[int], int] = lambda size: min(MAX_HELD_OUT, max(1, size // 10))
    """(number of training rows) -> number of rows at the end of the table that are used for validation instead of
    training. It is called if there is no validation table."""
    demonstrate: Callable[[str], str] = str
    """(text in the demonstration column) -> response to imitate."""
    blank_answers: bool = False
    """Whether the published data has rows without an answer. They are kept; graders do not apply to them."""
    response_prefix: str = ""
    """Text in front of every response to imitate. It is not used if `task.chat_template` is true."""


@dataclass(frozen=True)
class _Item:
    """One row of a table."""

    problem: Problem
    demonstration: str | None
    """The response to imitate, or None if the row has none."""
    place: str
    """The location of the row, for messages, such as `train.jsonl line 3`."""


def layout_of(config: TaskConfig, default: Layout) -> Layout:
    """Return the layout `default`, with the columns and templates that `config` sets instead of those of `default`."""
    names = ("prompt_column", "answer_column", "demonstration_column")
    settings = {name: getattr(config, name) for name in names if getattr(config, name)}
    if config.prompt_template:
        settings.update(prompt_template=config.prompt_template, chat_template=config.prompt_template)
    return replace(default, **settings)


class DatasetTask:
    """Problems from tables; implements `types.ProblemSource`.

    All rows are read and checked when the task is built, so that mistakes are reported before sampling starts. Prompts
    must be text or the messages of a conversation. Answers may be text or numbers (72 and 72.0 become "72"). The other
    columns of a row are passed to the reward functions. A column may be inside another one, as in
    `reward_model.ground_truth`.

    Args:
        config: the settings of the section `task`.
        layout: how the tables are read, unless `config` says otherwise.
        format_prompt: function that applies the tokenizer's chat template to a conversation and returns the text of the
            prompt. Messages are always formatted, a text only if `config.chat_template` is true.
        tables: split -> its rows in memory, used instead of files. With `tables`, no training rows are used for
            validation.
        hash_answers: whether to check that every answer has a number after `####`, as the grader `hash` requires.
        needs_answer: whether every row must have an answer that is text or a number. Otherwise answers may be missing
            or of any type.
    Raises:
        UserError: if a table cannot be used; the message names the table, the row and what is required.
    """

    def __init__(
        self,
        config: TaskConfig,
        layout: Layout,
        format_prompt: Callable[[Chat], str] | None = None,
        *,
        tables: Mapping[Split, Any] | None = None,
        hash_answers: bool = False,
        needs_answer: bool = True,
    ) -> None:
        self._config, self._layout, self._format_prompt = config, layout_of(config, layout), format_prompt
        self._hash_answers, self._needs_answer, self._tables = hash_answers, needs_answer, bool(tables)
        self._splits: dict[Split, list[_Item]] = {}
        items_by_split = {split: self._items(split, tables or {}) for split in SPLITS}
        if not items_by_split["validation"] and not self._tables:
            items_by_split["train"], items_by_split["validation"] = self._hold_out(items_by_split["train"])
        _warn_about_shared_prompts(items_by_split)
        for split, items in items_by_split.items():
            if items:
                problems = (replace(item.problem, id=f"{split}/{i}") for i, item in enumerate(items))
                self._splits[split] = [replace(item, problem=p) for p, item in zip(problems, items, strict=True)]

    def size(self, split: Split) -> int:
        """Return the number of problems in a split. Raise UserError if there is no table for the split."""
        return len(self._split(split))

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split, 0 <= index < size(split).

        Its id is "split/index", with the index before `drop` removed problems.
        """
        assert 0 <= index < self.size(split), f"{split} has {self.size(split)} problems; no index {index}"
        return self._split(split)[index].problem

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Return a pair (prompt, response to imitate). Raise UserError if the row has no response to imitate."""
        problem, demonstration = self.problem(split, index), self._split(split)[index].demonstration
        if demonstration is None:
            raise UserError(
                f"problem {problem.id} has no demonstration column "
                f"{self._layout.demonstration_column or self._layout.answer_column!r} "
                f"(it has: {', '.join(problem.columns)}); set task.demonstration_column or task.demonstrator"
            )
        return problem.prompt, demonstration

    def place(self, split: Split, index: int) -> str:
        """Return the location of a problem for messages, such as `train.jsonl line 3`."""
        return self._split(split)[index].place

    def drop(self, split: Split, indices: Collection[int]) -> None:
        """Remove problems from a split. The others keep their ids and their order, and get new indices."""
        dropped = set(indices)
        self._splits[split] = [item for i, item in enumerate(self._split(split)) if i not in dropped]

    def _split(self, split: Split) -> list[_Item]:
        """Return the items of a split. Raise UserError if there is no table for the split."""
        if split not in self._splits:
            reason = f"no {split} data was passed" if self._tables else f"task.{split}_path is empty"
            raise UserError(f"there is no {split} split: {reason}; provide a file of problems")
        return self._splits[split]

    def _items(self, split: Split, tables: Mapping[Split, Any]) -> list[_Item]:
        """Read the table of a split. Return one item per row, or an empty list if there is no table for the split."""
        setting = f"{split}_path"
        source = f"the {split} data" if tables else getattr(self._config, setting)
        if not source or (tables and tables.get(split) is None):
            return []
        rows = table_rows(source, tables[split]) if tables else read_rows(setting, source, split)
        if not rows:
            raise empty_table(source if tables else f"task.{setting}: {source}")
        if not tables and source.lower().endswith((".csv", ".csv.gz")):
            rows = self._answers_of_pandas(rows)
        return [self._item(where, row) for where, row in rows]

    def _answers_of_pandas(self, rows: Rows) -> Rows:
        """Return the rows of a CSV file with 72 in the place of 72.0 if pandas wrote the answers as floats."""
        column, exact = self._layout.answer_column, self._needs_answer
        if not has_floats_of_pandas([row.get(column) for _, row in rows]):
            return rows
        return [
            (where, {**row, column: float_of_pandas(where, column, row[column], exact=exact)}) for where, row in rows
        ]

    def _hold_out(self, items: list[_Item]) -> tuple[list[_Item], list[_Item]]:
        """Divide the items of the training table. Return (items for training, items at the end for validation)."""
        if len(items) < 2:
            source = self._config.train_path or "the training data"
            raise UserError(
                f"{source} has 1 problem, too few to hold one out for validation; add problems or set "
                "task.validation_path"
            )
        count = self._layout.held_out(len(items))
        return items[:-count], items[-count:]

    def _item(self, where: str, row: Row) -> _Item:
        """Check a row and convert it to an item, whose problem has an empty id.

        Args:
            where: location of the row for error messages, such as `train.jsonl line 3`.
        """
        layout = self._layout
        prompt, chat, messages = self._prompt(where, row)
        answer, reference = self._answer(where, row)
        if self._hash_answers and hash_number(answer) is None:
            raise UserError(f"{where}: {no_hash_number(answer)}")
        demonstration = self._demonstration(where, row, answer)
        # Reward functions get prompts and answers anyway, so columns named `prompt` and `answer` are left out. A prompt
        # column with another name, such as `question`, is kept, because reward functions may use this name.
        reserved = {layout.prompt_column, layout.answer_column} & {"prompt", "answer"}
        columns = {name: value for name, value in row.items() if name not in reserved}
        return _Item(Problem("", prompt, answer, columns, messages, reference, chat), demonstration, where)

    def _answer(self, where: str, row: Row) -> tuple[str, Any]:
        """Return (reference answer as text, answer as stored if reward functions get it in this form, else None)."""
        column = self._layout.answer_column
        value = cell(row, column)
        if self._needs_answer:
            text = answer_cell(where, row, column, self._layout.blank_answers)
            return text, value if self._tables and not isinstance(value, str) else None
        if value is MISSING and self._config.answer_column:
            text_cell(where, row, "answer_column", column)  # raises: the setting names a column that is not there
        if value is MISSING or value is None:
            return "", None
        if isinstance(value, str):
            return text_cell(where, row, "answer_column", column), None
        if is_number(value) and not is_blank(value):
            return number_text(value), value if self._tables else None
        return str(value), value

    def _demonstration(self, where: str, row: Row, answer: str) -> str | None:
        """Return the response to imitate; None if the row has none."""
        layout, column = self._layout, self._layout.demonstration_column
        if (column and cell(row, column) is MISSING) or (not column and not answer):
            return None
        text = text_cell(where, row, "demonstration_column", column) if column else answer
        prefix = "" if self._config.chat_template else layout.response_prefix
        return prefix + layout.demonstrate(text)

    def _prompt(self, where: str, row: Row) -> tuple[str, Chat | None, tuple[Mapping[str, Any], ...]]:
        """Return (text of the prompt, conversation for the chat template or None, messages of the table) for a row.

        The messages are empty unless the prompt column contains a conversation.
        """
        layout, column = self._layout, self._layout.prompt_column
        kwargs = self._config.chat_template_kwargs
        conversation = conversation_of(row, column)
        if conversation is not None and self._format_prompt:
            if self._config.prompt_template:
                raise UserError(
                    f"{where}: column {column!r} is a conversation, to which task.prompt_template cannot be applied; "
                    "remove task.prompt_template"
                )
            messages = messages_of(where, column, conversation)
            return *self._formatted(where, Chat(messages, tools_of(where, row), kwargs)), messages
        text = text_cell(where, row, "prompt_column", column)
        if not text.strip():
            raise UserError(f"{where}: column {column!r} is blank; every problem needs a prompt")
        check_no_conversation(where, column, text)
        # str.replace is used because str.format fails if a template contains other braces, as in LaTeX or code.
        if self._config.chat_template:
            chat = Chat.of_user(layout.chat_template.replace("{prompt}", text), kwargs)
            return *self._formatted(where, replace(chat, tools=tools_of(where, row))), ()
        if kwargs:
            raise UserError(
                f"task.chat_template_kwargs is set, but {where} has a prompt of plain text, to which no chat template "
                "is applied; set task.chat_template to true, or remove task.chat_template_kwargs"
            )
        return layout.prompt_template.replace("{prompt}", text), None, ()

    def _formatted(self, where: str, chat: Chat) -> tuple[str, Chat]:
        """Format a conversation with the chat template. Return (text of the prompt, conversation)."""
        assert self._format_prompt, "task.chat_template is on but no format_prompt was passed"
        try:
            text = self._format_prompt(chat)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        check_unicode(f"{where}: column {self._layout.prompt_column!r}", text)
        return text, chat


def _warn_about_shared_prompts(items: Mapping[Split, list[_Item]]) -> None:
    """Warn if problems are both in the training data and in the validation or test data, or contradict each other."""
    train = {item.problem.prompt: item.problem.answer for item in items["train"]}
    for split in ("validation", "test"):
        shared = sum(item.problem.prompt in train for item in items[split])
        if shared:
            warnings.warn(
                f"{shared} of {len(items[split])} {split} problems are also training problems; the accuracy on them "
                "says nothing about new problems",
                stacklevel=2,
            )
    contradictions = sum(train[item.problem.prompt] != item.problem.answer for item in items["train"])
    if contradictions:
        warnings.warn(
            f"{contradictions} training problems have the same prompt as a later one but another reference answer",
            stacklevel=2,
        )
