"""Tasks with real data: GSM8K, MATH, reasoning-gym and tables in all formats."""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.helpers import data_directory, known
from vineppo.config.schema import TaskConfig
from vineppo.config.settings import replace
from vineppo.tasks import build_task
from vineppo.tasks.grading.boxed import grade_boxed, last_boxed
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.gym import final_answer
from vineppo.tasks.mathematics import without_calculator_notes
from vineppo.training.rollouts import draw_problems
from vineppo.types import Chat, Problem, Split, Task, UserError


def data(name: str) -> str:
    path = (data_directory() or Path("shared/data")) / name
    if not path.exists():
        pytest.skip(f"no {path}: set VINEPPO_DATA to a folder with {name}")
    return str(path)


def chat(conversation: Chat) -> str:
    return "".join(f"<{m['role']}>{m['content']}</{m['role']}>" for m in conversation.messages)


def problems_of(task: Task, split: Any = "train") -> list[Problem]:
    return [task.problem(split, i) for i in range(task.size(split) or 0)]


# ---- GSM8K


def test_gsm8k_has_the_prompt_and_splits_of_the_paper_and_solutions_without_calculator_notes() -> None:
    task = build_task(
        TaskConfig(name="gsm8k", train_path=data("gsm8k/train.jsonl"), test_path=data("gsm8k/test.jsonl"))
    )
    assert (task.size("train"), task.size("validation")) == (7_100, 373)
    prompt, response = task.demonstration("train", 0)
    assert prompt.startswith("[MATH_TASK] Problem:\nNatalia sold clips") and prompt.endswith("May?\n\nSolution:")
    assert (
        response
        == " Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"
    )
    held_out = {problem.prompt for problem in problems_of(task, "validation")}
    assert not held_out & {problem.prompt for problem in problems_of(task)}


def test_gsm8k_chat_variant_asks_for_the_mark_that_is_graded() -> None:
    config = TaskConfig(name="gsm8k", train_path=data("gsm8k/test.jsonl"), chat_template=True)
    prompt, response = build_task(config, chat).demonstration("train", 0)
    assert prompt.startswith("<user>Solve") and "`#### `" in prompt and prompt.endswith("market?</user>")
    assert response.startswith("Janet")


def test_calculator_notes_are_removed_and_other_brackets_kept() -> None:
    assert without_calculator_notes("5 << 7, 48/2 = <<48/2=24>>24 and <<1+1=2>>2") == "5 << 7, 48/2 = 24 and 2"


# ---- MATH


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so $\boxed{7}$.", "7"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{x}", "x"),
        (r"\boxed 3$", "3"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{1 and more", None),
        ("the answer is 7", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_boxed_returns_the_content_of_the_last_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


def boxed(response: str, gold: str) -> float | None:
    return grade_boxed(["?"], [response], [gold])[0]


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{\text{Tuesday}}", r"\text{Tuesday}", 1.0),
        (r"\boxed{(2, 3)}", "(3, 2)", 0.0),
        (r"\boxed{50}", "0.5", 0.0),  # no factor of 100
        (r"\boxed{50\%}", "50", 1.0),
        ("it is 7", "7", 0.0),  # no fallback to the last number
        (r"\boxed{6} or 7", "7", 0.0),
        (r"\boxed{7} or \boxed{6}", "7", 0.0),
        (r"\boxed{}", "7", 0.0),
    ],
)
def test_boxed_compares_mathematically_and_ignores_text_outside_the_box(
    response: str, gold: str, reward: float
) -> None:
    pytest.importorskip("math_verify")
    assert boxed(response, gold) == boxed(response, rf"So we get $\boxed{{{gold}}}$.") == reward


def bumped(answer: str) -> str | None:
    """The answer with its last digit increased by one (9 becomes 0), or None if there is no suitable digit."""
    digits = list(re.finditer(r"\d", answer))
    if not digits or "cm" in answer or "text" in answer or "box" in answer:  # the digit may belong to a unit
        return None
    last = digits[-1]
    return answer[: last.start()] + str((int(last[0]) + 1) % 10) + answer[last.end() :]


def test_math_gold_answers_grade_1_and_perturbed_ones_0() -> None:
    pytest.importorskip("math_verify")
    task = build_task(TaskConfig(name="math", train_path=data("math/test.jsonl")))
    assert isinstance(task, Graded)
    problems = problems_of(task) + problems_of(task, "validation")
    rewards = task.grade(problems, [rf"Thus $\boxed{{{p.answer}}}$." for p in problems])
    assert len(problems) == 2_500 and sum(known(rewards)) == len(problems)
    random.Random(0).shuffle(problems)
    changed = [(p, answer) for p in problems if (answer := bumped(p.answer))][:200]
    assert task.grade([p for p, _ in changed], [rf"\boxed{{{answer}}}" for _, answer in changed]) == [0.0] * 200
    assert task.grade(problems[:200], [f"Thus {p.answer}." for p in problems[:200]]) == [0.0] * 200
    assert task.tally.errors == 0


def test_math_prompts_and_missing_solutions() -> None:
    config = TaskConfig(name="math", train_path=data("math/train.jsonl"))
    task = build_task(config)
    assert task.problem("train", 1).prompt.startswith("[MATH_TASK] Problem:\nThe distance between two cities")
    assert task.problem("train", 1).columns["subject"] == "Prealgebra"
    with pytest.raises(UserError, match=r"has no demonstration column 'solution' .*level, subject.*task.demonstration"):
        task.demonstration("train", 0)


# ---- reasoning-gym


@pytest.mark.real
def test_reasoning_gym_problems_are_reproducible_and_splits_are_disjoint() -> None:
    config = TaskConfig(name="reasoning_gym:chain_sum", options={"min_terms": 3, "max_terms": 3, "size": 50})
    task, again = build_task(config, chat), build_task(config, chat)
    assert (task.size("train"), task.size("validation")) == (50, 1_000)
    assert [p.prompt for p in problems_of(task)] == [p.prompt for p in problems_of(again)]
    with_kwargs = replace(config, chat_template=True, chat_template_kwargs={"a": 1})
    problem = build_task(with_kwargs, chat).problem("train", 3)
    assert problem.prompt == f"<user>{task.problem('train', 3).prompt}</user>"
    assert problem.chat == Chat(({"role": "user", "content": task.problem("train", 3).prompt},), (), {"a": 1})

    def broken(conversation: Chat) -> str:
        raise UserError("the chat template fails")

    with pytest.raises(UserError, match=r"^problem train/3: the chat template fails$"):
        build_task(with_kwargs, broken).problem("train", 3)
    splits = [{task.problem(split, i).prompt for i in range(50)} for split in ("train", "validation", "test")]
    assert not splits[0] & splits[1] and not splits[1] & splits[2] and not splits[0] & splits[2]
    assert all(p.columns["entry"]["metadata"]["num_terms"] == 3 for p in problems_of(task))


@pytest.mark.real
@pytest.mark.parametrize("name", ["chain_sum", "knights_knaves", "family_relationships", "maze", "bf"])
def test_reasoning_gym_scores_the_text_after_the_mark(name: str) -> None:
    task = build_task(TaskConfig(name=f"reasoning_gym:{name}"))
    problems = [task.problem("validation", i) for i in range(5)]
    assert task.grade(problems, [f"So\n#### {p.answer}" for p in problems]) == [1.0] * 5
    assert task.grade(problems, [p.answer for p in problems]) == [0.0] * 5
    assert max(known(task.grade(problems, ["#### no idea"] * 5))) < 0.5


@pytest.mark.real
def test_mistakes_in_reasoning_gym_settings_raise_one_line_messages() -> None:
    for settings, message in (
        ({"name": "reasoning_gym:chainsum"}, "no data set 'chainsum'; did you mean 'chain_sum'"),
        ({"name": "reasoning_gym:maze", "options": {"terms": 3}}, "rejects these options .*allowed: .*max_grid_size"),
        ({"name": "reasoning_gym:chain_sum", "options": {"min_terms": 0}}, "min_terms must be positive"),
        ({"name": "reasoning_gym:chain_sum", "options": {"seed": 0}}, "options has seed"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            build_task(TaskConfig(**settings))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no worked solutions; set task.demonstrator"):
        build_task(TaskConfig(name="reasoning_gym:maze")).demonstration("train", 0)
    with pytest.raises(UserError, match=r"task.options is only for reasoning_gym tasks, but task.name is gsm8k"):
        TaskConfig(name="gsm8k", options={"size": 3})


def test_final_answer_keeps_several_lines() -> None:
    assert final_answer("think #### 1\n#### a b\nc d\n") == "a b\nc d"
    assert final_answer("a b") is None


@pytest.mark.real
def test_demonstrations_may_be_written_by_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "def write(prompt, answer, entry, **_):\n    return entry['metadata']['expression'] + '\\n#### ' + answer\n"
    )
    (tmp_path / "my_demonstrations.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = TaskConfig(name="reasoning_gym:chain_sum", demonstrator="my_demonstrations:write")
    task = build_task(config)
    prompt, response = task.demonstration("train", 3)
    assert prompt == task.problem("train", 3).prompt
    expression, _, answer = response.partition("\n#### ")
    assert eval(expression) == int(answer)


# ---- tables

ROWS = [{"q": f'{n}, "{n}"\né', "a": str(n), "unit": "cm"} for n in range(20)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, ["q", "a", "unit"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".csv": write_csv, ".parquet": write_parquet}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_problems(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    WRITERS[ending](path)
    task = build_task(TaskConfig(name="dataset", train_path=str(path), prompt_column="q", answer_column="a"))
    assert problems_of(task) + problems_of(task, "validation") == [
        Problem(f"train/{n}" if n < 18 else f"validation/{n - 18}", ROWS[n]["q"], str(n), ROWS[n]) for n in range(20)
    ]


def test_data_sets_of_the_datasets_library_and_rows_in_memory(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    columns: dict[str, Any] = {"name": "dataset", "prompt_column": "q", "answer_column": "a"}
    one = build_task(TaskConfig(train_path=str(tmp_path / "one"), **columns))
    two = build_task(TaskConfig(train_path=str(tmp_path / "two"), test_path=str(tmp_path / "two"), **columns))
    three = build_task(TaskConfig(**columns), tables={"train": table})
    four = build_task(TaskConfig(**columns), tables={"train": ROWS})
    assert problems_of(one) == problems_of(two) == problems_of(three)[:18] == problems_of(four)[:18]
    assert len(problems_of(three)) == 20  # nothing is held out
    assert len(problems_of(two, "test")) == 3
    with pytest.raises(UserError, match=r"has no split 'validation'; it has: train, test"):
        build_task(TaskConfig(train_path=str(tmp_path / "two"), validation_path=str(tmp_path / "two"), **columns))
    with pytest.raises(UserError, match=r"train data row 1 is a str"):
        build_task(TaskConfig(**columns), tables={"train": [ROWS[0], "x"]})


def test_conversations_are_formatted_by_the_chat_template() -> None:
    rows = [
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n}?"}], "answer": n}
        for n in range(5)
    ]
    task = build_task(TaskConfig(name="dataset"), chat, tables={"train": rows})
    assert task.problem("train", 1).prompt == "<system>Be brief.</system><user>1?</user>"
    seen: list[Any] = []

    def reward(**columns: Any) -> list[float]:
        seen.append(columns)
        return [1.0]

    build_task(TaskConfig(name="dataset"), chat, reward, tables={"train": rows}).grade(
        [task.problem("train", 1)], ["x"]
    )
    assert seen[0]["completions"] == [[{"role": "assistant", "content": "x"}]]
    assert seen[0]["prompts"] == [rows[1]["prompt"]] and seen[0]["answer"] == [1]
    assert task.grade([task.problem("train", n) for n in (0, 1)], ["0", "0"]) == [1.0, 0.0]
    broken = [{"prompt": [{"content": 3}], "answer": 1}] * 3
    with pytest.raises(UserError, match="column 'prompt' is a list; allowed: text, or messages with role and content"):
        build_task(TaskConfig(name="dataset"), chat, tables={"train": broken})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "q,a\n1,2\n3\n", r"a.csv line 3 does not have the same number of cells as the header, which has 2"),
        ("a.csv", "q,a\n1,2,3\n", r"line 2 does not have the same number of cells"),
        ("a.csv", "", r"a.csv is empty; it must contain problems"),
        ("a.csv", 'q,a\n"1,2\n', r"a.csv line 2 is not valid CSV"),
        ("a.json", '{"q": 1}', r"a.json contains a dict; it must contain a list of objects"),
        ("a.json", '{"q": 1}\n{"q": 2}', r"a.json is not valid JSON .*must be named .jsonl"),
        ("a.json", "[1]", r"a.json row 0 is a int; every row must map column names to values"),
        ("a.parquet", "no", r"a.parquet is not a Parquet file"),
    ],
)
def test_mistakes_in_tables_raise_one_line_messages(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    config = TaskConfig(name="dataset", train_path=str(tmp_path / name), prompt_column="q", answer_column="a")
    with pytest.raises(UserError, match=message) as caught:
        build_task(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gsm9k"}, r"task.name is 'gsm9k'; allowed: chain, gsm8k, math, dataset, or reasoning_gym:NAME"),
        ({"name": "dataset"}, r"task.train_path is empty; task.name dataset needs problems"),
        (
            {"name": "dataset", "train_path": "nowhere"},
            r"task.train_path: no such file: nowhere .*or a Hugging Face Hub id",
        ),
        ({"name": "dataset", "train_path": "./a/b"}, r"no such file: ./a/b"),
        ({"name": "dataset", "rewards": ("exact",), "reward_weights": (1.0, 2.0)}, "has 2 numbers for 1 task.rewards"),
    ],
)
def test_mistakes_in_settings_raise_user_errors(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_task(TaskConfig(**settings))


def test_unused_graders_do_not_constrain_the_answers(tmp_path: Path) -> None:
    def rewards(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    rows = [{"prompt": "p", "answer": "no mark"}] * 4
    task = build_task(TaskConfig(name="dataset", rewards=("hash",)), reward_fn=rewards, tables={"train": rows})
    assert task.grade([task.problem("train", 0)], ["x"]) == [1.0]


def test_mistakes_of_a_demonstrator_raise_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_writers.py").write_text(
        "def narrow(prompt, answer): return 'x'\ndef nothing(**_): return None\n"
        "def own(prompt, answer, **more): return prompt + answer + ','.join(more)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"question": f"q{i}", "solution": "5", "prompt": "other", "level": 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def written(name: str) -> tuple[str, str]:
        config = TaskConfig(
            name="dataset",
            train_path=str(tmp_path / "rows.jsonl"),
            prompt_column="question",
            answer_column="solution",
            demonstrator=f"my_writers:{name}",
        )
        return build_task(config).demonstration("train", 0)

    assert written("own") == ("q0", "q05question,solution,level")
    with pytest.raises(UserError, match=r"my_writers:narrow failed for problem train/0: TypeError: .* with columns"):
        written("narrow")
    with pytest.raises(UserError, match="my_writers:nothing returned a NoneType for train/0; allowed: text"):
        written("nothing")


def test_reward_functions_get_prompt_and_answer_columns_by_their_original_names() -> None:
    def right(completions: list[str], solution: list[str], question: list[str], **_: Any) -> list[float]:
        assert question == ["q"]
        return [float(text == s) for text, s in zip(completions, solution, strict=True)]

    config = TaskConfig(name="dataset", prompt_column="question", answer_column="solution")
    task = build_task(config, None, right, {"train": [{"question": "q", "solution": "5"}]})
    assert task.grade([task.problem("train", 0)], ["5"]) == [1.0]


@pytest.mark.real
def test_reasoning_gym_entries_depend_only_on_their_address() -> None:
    from vineppo.tasks.gym import GymTask

    first, again = (GymTask(TaskConfig(name="reasoning_gym:list_functions")) for _ in range(2))
    prompts = [first.problem("train", i).prompt for i in range(40)]
    assert prompts == [again.problem("train", i).prompt for i in reversed(range(40))][::-1]
    for size in ("many", None, 0, 2.5):
        with pytest.raises(UserError, match=r"task.options has size .*; it must be a whole number of at least 1"):
            GymTask(TaskConfig(name="reasoning_gym:chain_sum", options={"size": size}))


def test_train_problems_limits_the_training_split_only(tmp_path: Path) -> None:
    def size(split: Split, **settings: Any) -> int | None:
        return build_task(TaskConfig(**settings)).size(split)

    chain = {"name": "chain", "train_problems": 3}
    assert (size("train", **chain), size("validation", **chain)) == (3, None)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": str(i)}) + "\n" for i in range(5)))
    table = {"name": "dataset", "train_path": str(path), "validation_path": str(path)}
    assert [size("train", **table, train_problems=count) for count in (3, 9)] == [3, 5]
    assert size("validation", **table, train_problems=3) == 5
    drawn = draw_problems(build_task(TaskConfig(**chain)), seed=0, iteration=1, count=6)
    assert sorted(problem.id for problem in drawn) == sorted([f"train/{i}" for i in range(3)] * 2)
