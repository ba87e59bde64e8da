"""Tables that were read wrongly without a word: each is now read right, or refused in one line (case 12)."""

from __future__ import annotations

import decimal
import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from vineppo.config.schema import TaskConfig
from vineppo.tasks import build_task
from vineppo.tasks.cells import number_text
from vineppo.tasks.grading.graders import grade_boxed, grade_exact
from vineppo.types import Problem, Task, UserError

OWN = {"rewards": ("json:loads",)}
"""A reward function of the user. It is loaded, but never called here."""


def parquet(path: Path, table: Any) -> Path:
    pyarrow.parquet.write_table(table if isinstance(table, pa.Table) else pa.Table.from_pylist(table), path)
    return path


def text(path: Path, content: str) -> Path:
    path.write_bytes(content.encode())
    return path


def task_of(path: Path, **settings: Any) -> Task:
    return build_task(TaskConfig(name="dataset", train_path=str(path), validation_path=str(path), **settings))


def problems(path: Path, **settings: Any) -> list[Problem]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the validation problems are those of the training
        task = task_of(path, **settings)
    return [task.problem("train", i) for i in range(task.size("train") or 0)]


def answers(path: Path, **settings: Any) -> list[str]:
    return [problem.answer for problem in problems(path, **settings)]


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        problems(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


# ---- nested columns

VERL = [
    {"prompt": f"{n}?", "reward_model": {"style": "rule", "ground_truth": str(n)}, "extra_info": {"index": n}}
    for n in range(3)
]


def test_case_12_nested_columns_of_parquet_files_in_the_form_of_verl(tmp_path: Path) -> None:
    path = parquet(tmp_path / "verl.parquet", VERL)
    found = problems(path, answer_column="reward_model.ground_truth")
    assert [problem.answer for problem in found] == ["0", "1", "2"]
    assert found[1].columns["reward_model"] == VERL[1]["reward_model"]
    lines = text(tmp_path / "verl.jsonl", "\n".join(json.dumps(row) for row in VERL))
    assert answers(lines, answer_column="reward_model.ground_truth") == ["0", "1", "2"]
    prompts = [problem.prompt for problem in problems(path, **OWN, prompt_column="reward_model.ground_truth")]
    assert prompts == ["0", "1", "2"]


def test_case_12_a_column_with_a_dot_in_its_name_comes_first(tmp_path: Path) -> None:
    row = {"prompt": "p", "a.b": "1", "a": {"b": "2", "c.d": {"e": "3"}}}
    path = text(tmp_path / "a.jsonl", json.dumps(row))
    assert answers(path, answer_column="a.b") == ["1"]
    assert answers(path, answer_column="a.c.d.e") == ["3"]


def test_case_12_a_missing_nested_column_is_refused_with_the_names_that_are_there(tmp_path: Path) -> None:
    path = parquet(tmp_path / "verl.parquet", VERL)
    assert refusal(path, answer_column="reward_model.truth") == (
        "verl.parquet row 0 has no column 'reward_model.truth' (it has: prompt, reward_model, extra_info); "
        "'reward_model' has: style, ground_truth; set task.answer_column"
    )
    assert "column 'reward_model' is a dict; it must be text or a number" in refusal(path, answer_column="reward_model")


# ---- numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (72.0, "72"),
        (-72.0, "-72"),
        (-0.0, "0"),
        (72.5, "72.5"),
        (0.1, "0.1"),
        (1e-7, "0.0000001"),
        (9007199254740993, "9007199254740993"),
        (10**30, "1" + "0" * 30),
        ("72.0", "72.0"),
        ("007", "007"),
        ("1e5", "1e5"),
    ],
)
def test_case_12_numbers_are_read_in_decimal_notation_and_text_unchanged(
    tmp_path: Path, value: Any, expected: str
) -> None:
    path = text(tmp_path / "a.jsonl", json.dumps({"prompt": "p", "answer": value}))
    assert answers(path) == [expected]
    assert grade_exact(["p"], [expected], [value]) == [1.0]


def test_case_12_numbers_of_numpy_and_decimals() -> None:
    assert number_text(np.float32(72.1)) == "72.1"
    assert number_text(np.float64(72)) == "72"
    assert number_text(np.int64(72)) == "72"
    assert number_text(decimal.Decimal("72.50")) == "72.5"
    rows = [{"prompt": "p", "answer": np.float64(72)}]
    task = build_task(TaskConfig(name="dataset"), tables={"train": rows})
    assert task.grade([task.problem("train", 0)] * 2, ["72", "72.0"]) == [1.0, 0.0]


def test_case_12_a_float_column_of_pandas_has_whole_numbers_and_its_missing_cell_is_refused(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["a", "b", "c"], "answer": [72, None, 5]})
    frame.dropna().to_parquet(tmp_path / "whole.parquet")
    frame.dropna().to_csv(tmp_path / "whole.csv", index=False)
    frame.dropna().to_json(tmp_path / "whole.json", orient="records")
    for name in ("whole.parquet", "whole.csv", "whole.json"):
        assert answers(tmp_path / name) == ["72", "5"]
    frame.to_parquet(tmp_path / "some.parquet")
    frame.to_csv(tmp_path / "some.csv", index=False)
    frame.to_json(tmp_path / "some.json", orient="records")
    assert refusal(tmp_path / "some.parquet").startswith("some.parquet row 1: column 'answer' is n")
    assert refusal(tmp_path / "some.csv").startswith("some.csv line 3: column 'answer' is blank; every problem needs a")
    assert refusal(tmp_path / "some.json").startswith("some.json row 1: column 'answer' is null")
    assert answers(tmp_path / "some.csv", **OWN) == ["72", "", "5"]


def test_decimals_in_csv_stay_as_they_are_written(tmp_path: Path) -> None:
    assert answers(text(tmp_path / "a.csv", "prompt,answer\na,72.0\nb,0.50\n")) == ["72.0", "0.50"]
    assert answers(text(tmp_path / "a.csv", "prompt,answer\na,007\nb,1.10\n")) == ["007", "1.10"]


def test_floats_that_may_have_lost_digits_are_refused(tmp_path: Path) -> None:
    path = text(tmp_path / "a.jsonl", '{"prompt": "p", "answer": 12345678901234567.0}')
    assert refusal(path) == (
        "a.jsonl line 1: column 'answer' is the float 1.2345678901234568e+16, whose last digits may be lost; store "
        "such answers as text or whole numbers"
    )


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"nan"', '"<NA>"', '" "', '""', "null", "[]", '["72"]', "true"])
def test_missing_answers_and_other_values_are_refused(tmp_path: Path, value: str) -> None:
    path = text(tmp_path / "a.jsonl", f'{{"prompt": "p", "answer": "1"}}\n{{"prompt": "q", "answer": {value}}}')
    assert refusal(path).startswith("a.jsonl line 2: column 'answer' is ")
    assert len(answers(path, **OWN)) == 2


def test_dates_and_bytes_are_refused_and_categories_read(tmp_path: Path) -> None:
    import datetime

    prompts = pa.array(["p", "q"])
    days = pa.table({"prompt": prompts, "answer": pa.array([datetime.date(2024, 1, 2)] * 2)})
    assert "column 'answer' is a date; it must be text" in refusal(parquet(tmp_path / "a.parquet", days))
    raw = pa.table({"prompt": prompts, "answer": pa.array([b"1", b"2"])})
    assert "column 'answer' is a bytes" in refusal(parquet(tmp_path / "a.parquet", raw))
    words = pa.table({"prompt": prompts, "answer": pa.array(["x", "y"]).dictionary_encode()})
    assert answers(parquet(tmp_path / "a.parquet", words)) == ["x", "y"]
    exact = pa.table({"prompt": prompts, "answer": pa.array([decimal.Decimal("7.50"), decimal.Decimal("8.00")])})
    assert answers(parquet(tmp_path / "a.parquet", exact)) == ["7.5", "8"]


# ---- no answers


def test_case_12_no_answers_are_needed_if_all_rewards_are_functions(tmp_path: Path) -> None:
    path = text(tmp_path / "a.jsonl", '{"prompt": "p", "level": 1}\n{"prompt": "q", "level": 2}')
    assert [(p.answer, p.columns["level"]) for p in problems(path, **OWN)] == [("", 1), ("", 2)]
    with pytest.raises(UserError, match=r"has no column 'answer' \(it has: prompt, level\)"):
        task_of(path, rewards=("json:loads", "exact"))
    with pytest.raises(UserError, match=r"has no column 'gold'"):
        task_of(path, **OWN, answer_column="gold")
    with pytest.raises(UserError, match="no demonstration column 'answer'"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task_of(path, **OWN).demonstration("train", 0)

    def ones(completions: list[str], level: list[int], **_: Any) -> list[float]:
        return [float(n) for n in level]

    config = TaskConfig(name="dataset", train_path=str(path))
    task = build_task(config, reward_fn=ones)
    assert task.grade([task.problem("train", 0)], ["x"]) == [1.0]


def test_case_12_functions_get_answers_of_any_type(tmp_path: Path) -> None:
    path = text(tmp_path / "a.jsonl", '{"prompt": "p", "answer": [1, 2]}\n{"prompt": "q", "answer": 5}')
    assert [(p.answer, p.reference) for p in problems(path, **OWN)] == [("[1, 2]", [1, 2]), ("5", None)]


def test_graders_do_not_apply_to_a_missing_answer_and_tables_in_memory_need_answers() -> None:
    assert grade_exact(["p"] * 3, ["", "nan", ""], [None, float("nan"), " "]) == [None, None, None]
    assert grade_boxed(["p"], [r"\boxed{}"], [" "]) == [None]
    for value in (None, float("nan"), ""):
        with pytest.raises(UserError, match=r"the train data row 0: column 'answer' is"):
            build_task(TaskConfig(name="dataset"), tables={"train": [{"prompt": "p", "answer": value}]})


# ---- files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,answer,answer\np,1,2\n", "a.csv line 1: column 'answer' occurs more than once"),
        ("a.csv", "prompt,answer, answer\np,1,2\n", "a.csv line 1: column 'answer' occurs more than once"),
        ("a.csv", "prompt;answer\np;1\n", "a.csv line 1: columns are separated by ';'; allowed: commas"),
        ("a.csv", "prompt\tanswer\np\t1\n", "a.csv line 1: columns are separated by '\\t'; allowed: commas"),
        ("a.csv", 'prompt,answer\np, "1"\n', "a.csv line 2: column 'answer' has a space before a quotation mark"),
        ("a.csv", 'prompt,answer\n"p\nq",1\nr\n', "a.csv line 4 does not have the same number of cells"),
        ("a.csv", 'prompt,answer\n"p\nq",\nr,1\n', "a.csv line 2: column 'answer' is blank"),
        ("a.csv", "prompt,answer\n,\n", "a.csv line 2: column 'prompt' is blank"),
        ("a.csv", "prompt,answer\n", "a.csv is empty; it must contain problems"),
        ("a.csv", "Prompt,ANSWER\np,1\n", "a.csv line 2 has no column 'prompt' (it has: Prompt, ANSWER); did you mean"),
        ("a.csv", "prompt,ANSWER\np,1\n", "did you mean 'ANSWER'? set task.answer_column"),
        ("a.jsonl", '{"prompt": "p", "answer": "1", "answer": "2"}', "the key 'answer' occurs more than once"),
        ("a.json", '[{"prompt": "p", "answer": "1", "answer": "2"}]', "the key 'answer' occurs more than once"),
        ("a.json", '{"prompt": {"0": "p"}, "answer": {"0": "1"}}', "to_json with orient='records'"),
        ("a.json", "", "a.json is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.jsonl", '[{"prompt": "p", "answer": "1"}]', "a.jsonl line 1 is a list, not a JSON object"),
        ("a.tsv", "prompt\tanswer\np\t1\n", "a.tsv ends in .tsv; allowed: .jsonl, .json, .csv, .parquet files"),
        ("a.xlsx", "PK\x03\x04", "a.xlsx is a zip archive or an Excel sheet"),
        ("a.jsonl", "PAR1", "a.jsonl is a Parquet file; name it .parquet"),
        ("a.csv.gz", "prompt,answer\np,1\n", "cannot read"),
    ],
)
def test_tables_that_cannot_be_read_right_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    found = refusal(text(tmp_path / name, content))
    assert message in found and name in found


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pa.table([["p"], ["1"], ["2"]], names=["prompt", "answer", "answer"])
    assert "a.parquet: column 'answer' occurs more than once" in refusal(parquet(tmp_path / "a.parquet", table))


def test_folders_named_like_columns_add_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "answer=9"
    folder.mkdir()
    assert answers(parquet(folder / "a.parquet", [{"prompt": "p", "answer": "1"}])) == ["1"]


def test_compressed_files_are_read(tmp_path: Path) -> None:
    for name, content in {
        "a.csv.gz": "prompt,answer\np,1\n",
        "a.jsonl.gz": '{"prompt": "p", "answer": "1"}\n',
        "a.json.gz": '[{"prompt": "p", "answer": "1"}]',
    }.items():
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
        assert answers(tmp_path / name) == ["1"]
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(b"{}"))
    assert "b.jsonl is compressed by gzip; add .gz to its name" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-9])
    assert "cannot read c.jsonl.gz" in refusal(tmp_path / "c.jsonl.gz")


def test_forms_of_csv_that_are_read_right(tmp_path: Path) -> None:
    assert answers(text(tmp_path / "a.csv", "\ufeffprompt,answer\r\np,1\r\n\r\nq,2\r\n")) == ["1", "2"]
    assert answers(text(tmp_path / "a.csv", " prompt , answer \np,1\n")) == ["1"]
    assert answers(text(tmp_path / "a.csv", ",prompt,answer\n0,p,1\n")) == ["1"]  # the index of pandas
    assert answers(text(tmp_path / "a.csv", 'prompt,answer\n"p, ""q""\nr","1,5"\n')) == ["1,5"]
    assert [p.columns["done"] for p in problems(text(tmp_path / "a.csv", "prompt,answer,done\np,1,True\n"))] == ["True"]


# ---- the same problem twice


def test_problems_that_are_in_both_splits_or_contradict_each_other_are_warned_of(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "prompt,answer\np,1\nq,2\np,3\nr,4\n")
    with pytest.warns(UserWarning) as caught:
        task_of(path)
    assert [str(warning.message) for warning in caught] == [
        "4 of 4 validation problems are also training problems; the accuracy on them says nothing about new problems",
        "1 training problems have the same prompt as a later one but another reference answer",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_task(TaskConfig(name="dataset", train_path=str(text(tmp_path / "b.csv", "prompt,answer\np,1\nq,2\n"))))
