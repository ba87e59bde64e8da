"""Responses in files of other trainers: TRL's completions and prime-rl's tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.view.rows import row, run_with
from vineppo.cli.main import main
from vineppo.model.location import resolve_model_path
from vineppo.model.tiny import build_tokenizer
from vineppo.types import UserError
from vineppo.view.data import iteration_data, run_meta
from vineppo.view.export import ExportSettings, export
from vineppo.view.foreign import format_of
from vineppo.view.queues import drops, most_telling
from vineppo.view.records import algorithm_of, iterations_of, response_of, responses_of
from vineppo.view.serve import RunServer

RECORDED = Path(__file__).parent / "data" / "trl_completions.parquet"
"""Written by GRPOTrainer of TRL 1.16 with log_completions: two reward functions, of which the second returned None for
all completions, and a column of integers that it logged with log_extra."""
ESC = "\x1b"


def trl_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_file_that_trl_wrote_is_read() -> None:
    assert format_of(RECORDED) == algorithm_of(RECORDED) == "TRL completions"
    assert iterations_of(RECORDED) == [1]
    found = responses_of(RECORDED, 1)
    stored = pq.read_table(RECORDED).to_pylist()
    assert [r.number for r in found] == [1, 2, 3, 4]
    assert [r.reward for r in found] == [1.0, 0.0, 0.0, 0.0]
    assert [r.text for r in found] == [entry["completion"] for entry in stored]
    assert [r.prompt for r in found] == [entry["prompt"] for entry in stored]
    assert found[0].problem_id == found[1].problem_id != found[2].problem_id == found[3].problem_id
    first = found[0]
    assert [step.text for step in first.steps] == [
        "b=9*9 by rule = 1\n", "c=1+3 by rule is 4\n", "d=4+2 by rote = 6\n", "#### 6"
    ]  # fmt: skip
    # The group has the rewards 1 and 0: (1 - 0.5) / (sqrt(0.5) + 1e-4).
    assert [step.advantage for step in first.steps] == [pytest.approx(0.5 / (0.5**0.5 + 1e-4), abs=1e-6)] * 4
    assert [r.credit for r in found] == ["response"] * 4
    assert all(step.value is None for response in found for step in response.steps)
    assert [entry.response.number for entry in drops(found)] == [2]
    assert drops(found)[0].step is None and most_telling(found).number == 2
    assert first.num_tokens is None


def test_messages_rewards_and_missing_numbers_of_trl(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    rows = [
        {"step": 3, "prompt": chat, "completion": [{"role": "assistant", "content": "One\n\nTwo\n"}],
         "right": 0.5, "form": 0.25, "seen": 7, "advantage": -1.5},
        {"step": 3, "prompt": chat, "completion": [{"role": "assistant", "content": ""}],
         "right": float("nan"), "form": None, "seen": 7, "advantage": float("nan")},
    ]  # fmt: skip
    found = responses_of(trl_file(tmp_path / "chat.parquet", rows), 3)
    assert [r.reward for r in found] == [0.75, None]
    assert [r.credit for r in found] == ["response", "none"]
    assert found[0].prompt == "system: Be brief.\nuser: 1+1?"
    assert [step.text for step in found[0].steps] == ["One\n", "\n", "Two\n"]
    assert [step.token_sum for step in found[0].steps] == [-1.5, -1.5, -1.5]
    assert found[1].steps == () and found[1].text == ""


def test_a_directory_of_trl_files_has_their_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "completions").mkdir(parents=True)
    for step in (2, 10):
        rows = [{"step": step, "prompt": "p", "completion": f"c{step}", "right": 1.0, "advantage": 0.5}]
        trl_file(tmp_path / "out" / "completions" / f"completions_{step:05d}.parquet", rows)
    for path in (tmp_path / "out", tmp_path / "out" / "completions"):
        assert iterations_of(path) == [2, 10]
        assert response_of(path, 10, 1).text == "c10"
    with pytest.raises(UserError, match="has no responses of iteration 3; it has 2, 10"):
        responses_of(tmp_path / "out", 3)
    assert main(["show", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("TRL completions, iteration 10, response 1")


def record(ids: list[int], mask: list[bool], advantages: list[float | None], **more: Any) -> dict[str, Any]:
    """Return a record with the keys of prime-rl's exporter that are read."""
    return {
        "schema_version": 1, "step": 5, "export_step": 5, "rank": 0, "run_id": None, "env_name": "chains",
        "token_ids": ids, "loss_mask": mask, "advantages": advantages, "rewards": [0.25] * len(ids),
        "inference_logprobs": [-0.5] * len(ids), "entropy": [None, *[0.125] * (len(ids) - 1)],
        "is_masked": [False] * (len(ids) - 1) + [True], **more,
    }  # fmt: skip


def prime_file(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))
    return path


def ids_of(text: str) -> list[int]:
    return list(build_tokenizer()(text)["input_ids"])


def test_prime_rl_tokens_are_read_with_a_tokenizer(tmp_path: Path) -> None:
    prompt, answer = ids_of("a=1;b=a+2;b?\n"), ids_of("b=1+2 by rule is 3\n#### 3")
    mask = [False] * len(prompt) + [True] * len(answer)
    path = prime_file(
        tmp_path / "rank_0.jsonl",
        record(prompt + answer, mask, [-0.75] * len(mask)),
        record(prompt + answer, mask, [0.5] * len(mask), export_step=6),
        record(prompt + answer, mask, [None] * len(prompt) + [float(i) for i in range(len(answer))]),
    )
    assert iterations_of(path) == [5, 6] and algorithm_of(path) == "prime-rl tokens"
    tokenizer = resolve_model_path("embedded:judgement")
    first, last = responses_of(path, 5, tokenizer)
    assert first.text == "b=1+2 by rule is 3\n#### 3" and first.prompt == "a=1;b=a+2;b?\n"
    assert (first.number, last.number, first.reward, first.num_tokens) == (1, 2, 0.25, len(answer))
    assert first.problem_id == last.problem_id and first.problem_id.startswith("chains, prompt ")
    assert [step.text for step in first.steps] == ["b=1+2 by rule is 3\n", "#### 3"]
    lengths = [step.end - step.start for step in first.steps]
    assert first.credit == "response" and [step.advantage for step in first.steps] == [-0.75, -0.75]
    assert [step.token_sum for step in first.steps] == [-0.75 * n for n in lengths]
    assert last.credit == "tokens" and sum(s.advantage or 0 for s in last.steps) == sum(range(len(answer)))
    assert [token.weight for token in first.tokens] == [1.0] * (len(answer) - 1) + [0.0]
    assert {(token.logprob, token.entropy) for token in first.tokens} == {(-0.5, 0.125)}
    assert [r.text for r in responses_of(path, 6, Path(tokenizer) / "tokenizer.json")] == [first.text]


def test_prime_rl_tokens_without_a_tokenizer_are_ids(tmp_path: Path) -> None:
    # The tokens 8 and 9 were not sampled: they are the output of a tool.
    path = prime_file(
        tmp_path / "x",
        record([5, 6, 7, 8, 9, 7], [False, True, True, False, False, True], [0.0, 2.0, 2.0, 0.0, 0.0, 2.0]),
    )
    [response] = responses_of(path, 5)
    assert response.text == "[6][7][8][9][7]" and response.prompt == "(1 tokens)"
    assert [token.advantage for token in response.tokens] == [2.0, 2.0, None, None, 2.0]
    assert [token.weight for token in response.tokens] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert [(s.advantage, s.token_sum) for s in response.steps] == [(2.0, 6.0)]


def test_a_single_file_of_a_run_is_read(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", row(["a\n", "b"], 1.0, [0.5, 0.25]), row(["c"], 0.0, [0.75]))
    file = run / "rollouts" / "000001.parquet"
    assert iterations_of(file) == [1] and responses_of(file, 1) == responses_of(run, 1)


def test_a_response_of_another_trainer_can_be_shown_and_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(RECORDED), "1", "1", "--step", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("TRL completions, iteration 1, response 1, problem prompt ")
    assert "tokens" not in lines[0]
    assert ">2  +0.71 c=1+3 by rule is 4" in lines
    assert "Columns: step, advantage of the whole response, repeated." in lines
    assert " ".join(lines).endswith("repeated for every step; it does not say which step earned it")
    found = responses_of(RECORDED, 1)
    pairs = export(found, "dpo").rows
    assert [(p["chosen"], p["rejected"]) for p in pairs] == [(found[0].text, found[1].text)]
    assert export(found, "prm", ExportSettings(rule="advantage")).rows == []


def test_the_viewer_opens_files_of_other_trainers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = run_meta(RECORDED)
    assert meta["algorithm"] == "TRL completions" and meta["name"] == RECORDED.name and meta["iterations"] == [1]
    core = iteration_data(RECORDED, 1)["core"]
    assert [entry["credit"] for entry in core["responses"]] == ["response"] * 4
    # The two responses of a group differ in their first line, so TEMPO's tree splits there.
    assert [entry["others"]["RLOO"][:1] for entry in core["responses"][:2]] == [[1], [-1]]
    copy = tmp_path / "completions_00001.parquet"
    copy.write_bytes(RECORDED.read_bytes())
    assert main(["view", str(copy)]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'completions_00001.html'} (")
    assert main(["view", str(copy), "--tokenizer", "x"]) == 2
    assert "--tokenizer has no meaning" in capsys.readouterr().err
    ids = ids_of("b=1+2 by rule is 3")
    path = prime_file(tmp_path / "rank_0.jsonl", record([3, *ids], [False] + [True] * len(ids), [1.0] * (len(ids) + 1)))
    assert main(["view", str(path), "--tokenizer", str(resolve_model_path("embedded:judgement"))]) == 0
    texts = iteration_data(path, 5, resolve_model_path("embedded:judgement"))["core"]["texts"]
    assert "".join(texts) == "b=1+2 by rule is 3"
    with RunServer([path], 0) as server:
        assert server.meta()["runs"][0]["stamps"][0] > 0
        server.server_close()


def test_hostile_text_of_a_file_does_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": 1, "prompt": f"{ESC}[2J", "completion": f"{ESC}]0;x\x07\n\u202eb", "r": 0.0, "advantage": -1.0}]
    assert main(["show", str(trl_file(tmp_path / f"{ESC}x", rows))]) == 0
    out = capsys.readouterr().out
    assert not {ESC, "\x07", "\u202e"} & set(out) and r"\x1b]0;x\x07" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither Parquet nor JSONL"),
        (b"hello\n", "neither Parquet nor JSONL"),
        (b"[1, 2]\n", "neither Parquet nor JSONL"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "neither Parquet nor JSONL"),
        (b'{"token_ids": [1], "text": "x"}\n', "without advantages, inference_logprobs, loss_mask"),
    ],
)
def test_a_file_of_another_kind_is_one_line(
    tmp_path: Path, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(content)
    assert main(["show", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and "allowed are the Parquet files" in error


def test_parquet_of_another_kind_names_the_missing_columns(tmp_path: Path) -> None:
    path = trl_file(tmp_path / "x.parquet", [{"prompt": "p", "completion": "c", "step": 1}])
    with pytest.raises(UserError, match="Parquet without the columns advantage; allowed"):
        iterations_of(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": [1, "2", 3]}, "line 2 has an entry in token_ids that is no token id"),
        ({"loss_mask": [True]}, "line 2 has 1 entries in loss_mask for 3 tokens"),
        ({"advantages": ["x", 1.0, 1.0]}, "'x' in place of a number"),
        ({"export_step": "none"}, "invalid literal"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    good = record([1, 2, 3], [True] * 3, [1.0] * 3)
    path = prime_file(tmp_path / "x.jsonl", good, {**good, **change})
    with pytest.raises(UserError, match=message):
        responses_of(path, 5)


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(RECORDED.read_bytes()[:3000])
    with pytest.raises(UserError, match="x is damaged"):
        iterations_of(tmp_path / "x")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    """A file of tokens without the number of the trainer's step."""
    path = tmp_path / "rank_0.jsonl"
    path.write_text('{"token_ids": [1], "loss_mask": [1], "advantages": [1.0], "inference_logprobs": [0.0]}\n')
    with pytest.raises(UserError, match=r"is damaged \(step is missing\); give another file"):
        iterations_of(path)


def test_a_damaged_completion_is_one_line(tmp_path: Path) -> None:
    path = trl_file(tmp_path / "x", [{"step": 1, "prompt": 3, "completion": "c", "r": 0.0, "advantage": 1.0}])
    with pytest.raises(UserError, match=r"is damaged \(3 in place of a text or messages"):
        responses_of(path, 1)


def test_a_tokenizer_is_only_for_files_without_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "run", row(["a"], 1.0))
    for path in (RECORDED, run):
        assert main(["show", str(path), "--tokenizer", "x"]) == 2
        assert "remove --tokenizer" in capsys.readouterr().err
    path = prime_file(tmp_path / "p", record([1, 2], [True] * 2, [1.0] * 2))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["show", str(path), "--tokenizer", str(tmp_path / "run")]) == 2
    assert "it must be a file tokenizer.json" in capsys.readouterr().err
    assert main(["show", str(path), "--tokenizer", str(tmp_path)]) == 2
    assert "is no tokenizer" in capsys.readouterr().err
