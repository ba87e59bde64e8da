"""Tasks from tables: disjoint splits, unchanged text, one-line messages for mistakes in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vineppo.config.schema import TaskConfig
from vineppo.config.settings import replace
from vineppo.tasks import build_task
from vineppo.types import Chat, Task, UserError


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}+{n}", "answer": str(2 * n), "level": n % 3} for n in range(start, start + count)]


def config_of(path: Path, data: list[Any], **settings: Any) -> TaskConfig:
    return TaskConfig(name="dataset", train_path=write(path / "train.jsonl", data), **settings)


def prompts(task: Task, split: Any) -> list[str]:
    return [task.problem(split, index).prompt for index in range(task.size(split) or 0)]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (10, 1), (57, 5), (2000, 200), (3000, 200)])
def test_the_last_tenth_is_held_out_and_disjoint_from_train(tmp_path: Path, count: int, held_out: int) -> None:
    task = build_task(config_of(tmp_path, rows(count)))
    assert task.size("validation") == held_out
    assert prompts(task, "train") + prompts(task, "validation") == [row["prompt"] for row in rows(count)]


def test_separate_files_for_validation_and_test(tmp_path: Path) -> None:
    validation = write(tmp_path / "validation.jsonl", rows(3, start=100))
    test = write(tmp_path / "test.jsonl", rows(4, start=200))
    task = build_task(config_of(tmp_path, rows(20), validation_path=validation, test_path=test))
    assert (task.size("train"), task.size("validation"), task.size("test")) == (20, 3, 4)
    assert prompts(task, "validation") == ["100+100", "101+101", "102+102"]
    assert [task.problem("test", index).id for index in range(4)] == ["test/0", "test/1", "test/2", "test/3"]


def test_no_test_split_without_a_file(tmp_path: Path) -> None:
    task = build_task(config_of(tmp_path, rows(20)))
    with pytest.raises(UserError, match=r"there is no test split: task\.test_path is empty"):
        task.problem("test", 0)
    with pytest.raises(UserError, match="there is no test split"):
        task.size("test")


def test_a_problem_has_the_id_text_and_columns_of_its_row(tmp_path: Path) -> None:
    data = [{"question": f"Is \\frac{{{n}}}{{2}} {{prompt}}?\u2028é", "gold": 3.0, "level": [n]} for n in range(20)]
    config = config_of(
        tmp_path,
        data,
        prompt_column="question",
        answer_column="gold",
        prompt_template="{x} Problem:\n{prompt}\n\nSolution:",
    )
    problem = build_task(config).problem("train", 17)
    assert problem.id == "train/17"
    assert problem.prompt == "{x} Problem:\nIs \\frac{17}{2} {prompt}?\u2028é\n\nSolution:"
    assert problem.answer == "3"  # a number becomes text
    assert problem.columns == {**data[17], "level": [17]}  # prompt and answer columns keep their original names too


def test_an_index_out_of_range_raises(tmp_path: Path) -> None:
    task = build_task(config_of(tmp_path, rows(20)))
    for index in (-1, 18):
        with pytest.raises(AssertionError):
            task.problem("train", index)


def test_the_chat_template_is_applied_to_the_finished_prompt_if_configured(tmp_path: Path) -> None:
    config = config_of(tmp_path, rows(20), prompt_template="Q: {prompt}", chat_template=True)

    def wrap(chat: Chat) -> str:
        return f"<user>{chat.messages[0]['content']}</user>"

    assert build_task(config, wrap).problem("train", 1).prompt == "<user>Q: 1+1</user>"
    assert build_task(replace(config, chat_template=False), wrap).problem("train", 1).prompt == "Q: 1+1"
    with pytest.raises(AssertionError, match="chat_template"):
        build_task(config)


def test_demonstrations_are_the_unchanged_answer_column(tmp_path: Path) -> None:
    data = [{"prompt": "p", "answer": " a\n#### 1 \n"}] * 2
    assert build_task(config_of(tmp_path, data)).demonstration("train", 0) == ("p", " a\n#### 1 \n")


def test_grading_by_name_and_by_function(tmp_path: Path) -> None:
    config = config_of(tmp_path, rows(20))
    exact = build_task(config)
    problems = [exact.problem("train", index) for index in (1, 2)]
    assert exact.grade(problems, ["2", "5"]) == [1.0, 0.0]

    def by_level(prompts: list[str], completions: list[str], level: list[int], **_: Any) -> list[float]:
        return [float(value) for value in level]

    assert build_task(config, reward_fn=by_level).grade(problems, ["2", "5"]) == [1.0, 2.0]
    with pytest.raises(UserError, match="unknown grader 'exat'"):
        build_task(replace(config, rewards=("exat",)))


def test_trap_11_grader_hash_requires_marks_in_the_answers_when_the_file_is_read(tmp_path: Path) -> None:
    data = [{"prompt": "p", "answer": "#### 1"}, {"prompt": "p", "answer": "2"}]
    config = config_of(tmp_path, data, rewards=("hash",))
    with pytest.raises(UserError, match=r"train.jsonl line 2: grader hash: the reference answer '2' has no number"):
        build_task(config)
    build_task(config, reward_fn=lambda prompts, completions, **_: [0.0] * len(completions))


def test_a_reward_function_replaces_the_grader_of_the_chain_task() -> None:
    task = build_task(TaskConfig(), reward_fn=lambda prompts, completions, **_: [float(len(t)) for t in completions])
    plain = build_task(TaskConfig())
    problem = task.problem("validation", 3)
    assert problem == plain.problem("validation", 3)
    assert task.demonstration("train", 3) == plain.demonstration("train", 3)
    assert task.size("train") == plain.size("train")
    assert task.grade([problem, problem], ["abc", ""]) == [3.0, 0.0]


GOOD = '{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; it must contain problems"),
        ("\n  \n", "is empty"),
        (GOOD + "\n{oops}\n", r"line 3 is not a JSON object \(JSONDecodeError"),
        (GOOD + "[1, 2]\n", "line 2 is a list, not a JSON object"),
        (GOOD + "null\n", "line 2 is a NoneType, not a JSON object"),
        ("[" * 100_000 + "\n", "line 1 is not a JSON object"),
        (
            '{"promt": "p", "answer": "a"}\n',
            r"line 1 has no column 'prompt' \(it has: promt, answer\); did you mean 'promt'",
        ),
        (GOOD + '{"prompt": "p", "solution": 1}\n', r"line 2 has no column 'answer' .*set task.answer_column"),
        ("{}\n", r"has no column 'prompt' \(it has: none\)"),
        ('{"prompt": 5, "answer": "a"}\n', "column 'prompt' is a int; it must be text"),
        ('{"prompt": null, "answer": "a"}\n', "column 'prompt' is null; it must be text"),
        ('{"prompt": [{"role": "user"}], "answer": "a"}\n', "column 'prompt' is a list"),
        ('{"prompt": "p", "answer": true}\n', "column 'answer' is a bool; it must be text or a number"),
        ('{"prompt": " ", "answer": "a"}\n', "column 'prompt' is blank"),
        ('{"prompt": "\\ud800", "answer": "a"}\n', "contains an unpaired surrogate"),
        (GOOD, "has 1 problem, too few to hold one out"),
    ],
)
def test_mistakes_in_a_file_raise_one_line_messages(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        build_task(TaskConfig(name="dataset", train_path=str(path)))
    assert "\n" not in str(caught.value) and "bad.jsonl" in str(caught.value)


def test_unreadable_files_raise_one_line_messages(tmp_path: Path) -> None:
    good = write(tmp_path / "good.jsonl", rows(3))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é", "answer": "a"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"task.train_path: no such file: .*absent.jsonl"):
        build_task(TaskConfig(name="dataset", train_path=str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match=r"task.test_path: no such file"):
        build_task(TaskConfig(name="dataset", train_path=good, test_path=str(tmp_path / "absent.jsonl")))
    with pytest.raises(UserError, match=r"task.validation_path: cannot read .*: Is a directory"):
        build_task(TaskConfig(name="dataset", train_path=good, validation_path=str(tmp_path)))
    with pytest.raises(UserError, match=r"latin\.jsonl is not UTF-8 text"):
        build_task(TaskConfig(name="dataset", train_path=str(tmp_path / "latin.jsonl")))


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + (GOOD * 2).replace("\n", "\r\n").encode())
    assert build_task(TaskConfig(name="dataset", train_path=str(path))).problem("train", 0).prompt == "p"
