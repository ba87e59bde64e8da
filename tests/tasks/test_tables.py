"""Tables that were read wrongly without a word: each is now read right, or refused in one line (case 12)."""

from __future__ import annotations

import datetime
import decimal
import fractions
import gzip
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from vineppo.config.schema import TaskConfig
from vineppo.tasks import build_task
from vineppo.tasks.cells import InexactFloat, number_text
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


NARROW = {
    "float32": pa.array([0.1, 72.0], pa.float32()),
    "float16": pa.array(np.array([0.1, 72.0], np.float16)),
    "dictionary": pa.array([0.1, 72.0], pa.float32()).dictionary_encode(),
}


@pytest.mark.parametrize("kind", NARROW)
def test_floats_of_16_and_32_bits_have_their_shortest_decimals(tmp_path: Path, kind: str) -> None:
    prompts = pa.array(["p", "q"])
    path = parquet(tmp_path / "a.parquet", pa.table({"prompt": prompts, "answer": NARROW[kind]}))
    assert answers(path) == ["0.1", "72"]


def test_nested_floats_of_32_bits_have_their_shortest_decimals(tmp_path: Path) -> None:
    scores = pa.array([[0.1, None], []], pa.list_(pa.float32()))
    gold = pa.StructArray.from_arrays([pa.array([0.2, 5.0], pa.float32()), scores], names=["gold", "scores"])
    table = pa.table({"prompt": pa.array(["p", "q"]), "meta": gold})
    found = problems(parquet(tmp_path / "a.parquet", table), answer_column="meta.gold")
    assert [problem.answer for problem in found] == ["0.2", "5"]
    assert found[0].columns["meta"] == {"gold": 0.2, "scores": [0.1, None]}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_large_floats_of_16_and_32_bits_are_refused(tmp_path: Path, dtype: str) -> None:
    limit = {"float16": 2**11, "float32": 2**24}[dtype]
    for value, expected in ((limit - 1, str(limit - 1)), (limit, "whose last digits may be lost")):
        numbers = np.array([value], dtype)
        table = pa.table({"prompt": pa.array(["p"]), "answer": pa.array(numbers), "other": pa.array(["1"])})
        path = parquet(tmp_path / "a.parquet", table)
        rows = [{"prompt": "p", "answer": numbers[0]}]
        if value < limit:
            assert answers(path) == [expected]
            task = build_task(TaskConfig(name="dataset"), tables={"train": rows})
            assert task.problem("train", 0).answer == expected
        else:
            assert f"is the float {value}.0, {expected}" in refusal(path)
            assert problems(path, answer_column="other")[0].answer == "1"  # other columns may contain such floats
            with pytest.raises(UserError, match=expected):
                build_task(TaskConfig(name="dataset"), tables={"train": rows})


def test_tables_of_datasets_have_shortest_decimals_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"prompt": datasets.Value("string"), "answer": datasets.Value("float32")})
    table = datasets.Dataset.from_dict({"prompt": ["p", "q"], "answer": [0.1, 72.0]}, features=features)
    for changed in (table, table.with_format("numpy"), table.select([0, 1])):
        task = build_task(TaskConfig(name="dataset"), tables={"train": changed})
        assert [task.problem("train", i).answer for i in range(2)] == ["0.1", "72"]
    # A transform can return other values than the column has.
    table.set_transform(lambda batch: {**batch, "answer": [x + 1 for x in batch["answer"]]})
    task = build_task(TaskConfig(name="dataset"), tables={"train": table})
    assert task.problem("train", 0).answer == "1.1000000014901161"
    table.reset_format()
    table.save_to_disk(str(tmp_path / "saved"))
    assert answers(tmp_path / "saved") == ["0.1", "72"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("0.12345678901234567890", "0.1234567890123456789"),
        ("-3.14159265358979323846", "-3.14159265358979323846"),
        ("0.30000000000000001", "0.30000000000000001"),
        ("0.30", "0.3"),
        ("1.5E3", "1500"),
        ("0e-999999999999999999999", "0"),
    ],
)
def test_decimals_in_json_keep_their_digits(tmp_path: Path, written: str, expected: str) -> None:
    row = f'{{"prompt": "p", "answer": {written}, "score": {written}}}'
    for path in (text(tmp_path / "a.jsonl", row), text(tmp_path / "a.json", f"[{row}]")):
        problem = problems(path)[0]
        assert problem.answer == expected
        assert problems(path, **OWN)[0].answer == expected
        score = problem.columns["score"]
        assert score == float(written) and 2 * score == 2 * float(written) and json.dumps(score) == repr(float(written))
        assert number_text(pickle.loads(pickle.dumps(score))) == expected


@pytest.mark.parametrize("written", ["1e400", "-1e400", "1e-400", "0.001e-999999999999999999999"])
def test_numbers_outside_the_range_of_floats_are_refused(tmp_path: Path, written: str) -> None:
    path = text(tmp_path / "a.jsonl", f'{{"prompt": "p", "answer": {written}}}')
    assert refusal(path) == f"a.jsonl line 1: the number {written} is outside the range of floats; write it as text"


def test_fractions_are_read() -> None:
    assert [number_text(fractions.Fraction(n, 3)) for n in (1, 6)] == ["1/3", "2"]
    assert number_text(InexactFloat(0.1)) == "0.1"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("72.0 -0.0 5.0", "72 0 5"),
        ("1e-05 72.0 0.5", "0.00001 72 0.5"),
        ("1e-05 72 0.5", "1e-05 72 0.5"),  # pandas would have written 72.0
        ("72.0 1e5 5.0", "72.0 1e5 5.0"),  # and 100000.0
        ("72.0 0.5 1.0", "72.0 0.5 1.0"),
        ("1234567890123456789.0 1.0 1.0", "1234567890123456789 1 1"),
    ],
)
def test_floats_of_pandas_in_csv(tmp_path: Path, cells: str, expected: str) -> None:
    lines = [f"p{n},{cell}\n" for n, cell in enumerate(cells.split())]
    assert answers(text(tmp_path / "a.csv", "prompt,answer\n" + "".join(lines))) == expected.split()


def test_large_floats_of_pandas_in_csv_are_refused(tmp_path: Path) -> None:
    path = text(tmp_path / "a.csv", "prompt,answer\np,72.0\nq,1e+20\nr,5.0\n")
    assert refusal(path) == (
        "a.csv line 3: column 'answer' is the float 1e+20, whose last digits may be lost; store such answers as text "
        "or whole numbers"
    )
    assert answers(path, **OWN) == ["72", "100000000000000000000", "5"]


SAME: dict[str, list[Any]] = {
    "whole numbers": [9007199254740993, -5],
    "floats of whole numbers": [72.0, -0.0],
    "decimals": [0.30000000000000004, 1e-07],
    "large floats": [1e20, 1.0],
    "zeros in front": ["007", "1e5"],
    "blanks": [" 5", "6\n"],
    "line separators": ["\u00e9\u2028\u00fc", "\u00a07"],
    "quotes": ['"a"', "b,c"],
    "line ends": ["a\r\nb", "c\td"],
    "words for nothing": ["NA", "None"],
    "words for truth": ["TRUE", "false"],
}


@pytest.mark.parametrize("name", SAME)
def test_every_kind_of_table_is_read_alike(tmp_path: Path, name: str) -> None:
    pandas = pytest.importorskip("pandas")
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"p{n}", "answer": value} for n, value in enumerate(SAME[name])]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    text(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    text(tmp_path / "a.json", json.dumps(rows))
    parquet(tmp_path / "a.parquet", rows)
    config = {"name": "dataset"}

    def outcome(read: Any) -> Any:
        try:
            return read()
        except UserError as error:
            return str(error).partition("column")[2]

    def in_memory(table: Any) -> list[str]:
        task = build_task(TaskConfig(**config), tables={"train": table})
        return [task.problem("train", i).answer for i in range(2)]

    expected = outcome(lambda: in_memory(rows))
    assert outcome(lambda: in_memory(datasets.Dataset.from_list(rows))) == expected
    for suffix in ("csv", "jsonl", "json", "parquet"):
        assert outcome(lambda path=tmp_path / f"a.{suffix}": answers(path)) == expected, suffix


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


STRUCT = pa.StructArray.from_arrays([pa.array(["1"]), pa.array(["2"])], names=["gt", "gt"])
MAP = pa.array([[("k", "1"), ("k", "2")]], pa.map_(pa.string(), pa.string()))
TEXT = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (STRUCT, "ValueError: Converting to Python dictionary is not supported when duplicate field names are present"),
        (MAP, "ValueError: the key 'k' occurs more than once"),
        (TEXT, "UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (pa.array([2**30], pa.date32()), "OverflowError: "),
    ],
)
def test_a_parquet_column_without_values_in_python_is_refused(tmp_path: Path, column: Any, message: str) -> None:
    table = pa.table({"prompt": ["p"], "answer": ["1"], "other": column})
    found = refusal(parquet(tmp_path / "a.parquet", table))
    assert found.startswith(f"a.parquet: column 'other' cannot be read ({message}")
    assert found.endswith("); remove it, or write it in another type")


def test_a_map_in_parquet_is_read_like_an_object_in_json(tmp_path: Path) -> None:
    column = pa.array([[("gold", 0.1)], None], pa.map_(pa.string(), pa.float32()))
    table = pa.table({"prompt": ["p", "q"], "meta": column})
    found = problems(parquet(tmp_path / "a.parquet", table), **OWN)
    assert [problem.columns["meta"] for problem in found] == [{"gold": 0.1}, None]
    assert answers(parquet(tmp_path / "a.parquet", table.slice(0, 1)), answer_column="meta.gold") == ["0.1"]


CONVERSATION = [{"role": "user", "content": "it's"}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "written",
    [json.dumps(CONVERSATION, indent=1), str(CONVERSATION), str(np.array(CONVERSATION)), str(CONVERSATION[0])],
)
def test_a_conversation_that_was_written_as_text_is_refused(tmp_path: Path, written: str) -> None:
    path = text(tmp_path / "a.jsonl", json.dumps({"prompt": written, "answer": "1"}))
    assert refusal(path) == (
        "a.jsonl line 1: column 'prompt' is a conversation that was written as text; store it as a list of messages, "
        "in JSON lines or Parquet"
    )
    for prompt in (f"Read {written}", '[{"name": "Ann", "role": "nurse"}]', "{role: content}", "[1, 2]"):
        path = text(tmp_path / "a.jsonl", json.dumps({"prompt": prompt, "answer": "1"}))
        assert problems(path)[0].prompt == prompt


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
