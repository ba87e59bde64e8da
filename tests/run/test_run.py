"""Run directory, checkpoints, records and trackers: files are complete and exact, and survive crashes."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from vineppo.config.load import config_to_dict
from vineppo.config.schema import Config, LearnerConfig, RolloutConfig, RunConfig
from vineppo.run import checkpoint as checkpoint_module
from vineppo.run import files as files_module
from vineppo.run.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
    verify_checkpoint,
    write_state,
)
from vineppo.run.clock import Timer
from vineppo.run.directory import RunDirectory
from vineppo.run.environment import objects_before_excluded_from_collection
from vineppo.run.records import step_texts, token_ends
from vineppo.run.trackers import build_trackers, require_trackers
from vineppo.types import Alternative, MCRollout, Problem, Rollout, RolloutGroup, StepCredit, TrainingSample, UserError

CONFIG = Config(
    learner=LearnerConfig(lr=1e-5, betas=(0.9, 0.95)),
    rollouts=RolloutConfig(stop=("\n\n", "é: #")),
    run=RunConfig(report_to=("tensorboard",)),
)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    """Return the message of a UserError, which must be a single line."""
    message = str(error.value)
    assert "\n" not in message
    return message


# --- the run directory ---


def test_config_survives_the_yaml_file(tmp_path: Path) -> None:
    """Every setting is read back with its value and type; tuples become lists."""
    run = RunDirectory.create(tmp_path / "runs" / "a", CONFIG)
    config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert config == config_to_dict(CONFIG) == RunDirectory.open(run.path).config
    assert config["learner"]["lr"] == 1e-5 and type(config["learner"]["lr"]) is float
    assert config["learner"]["betas"] == [0.9, 0.95]
    assert config["rollouts"]["stop"] == ["\n\n", "é: #"]
    assert config["run"]["report_to"] == ["tensorboard"] and config["algorithm"] == "vineppo"


def test_create_refuses_a_directory_with_content(tmp_path: Path) -> None:
    """Results are never overwritten; an empty directory may be used."""
    RunDirectory.create(tmp_path / "a", CONFIG)
    with pytest.raises(UserError) as error:
        RunDirectory.create(tmp_path / "a", CONFIG)
    assert "run.dir" in one_line(error) and f"--resume {tmp_path / 'a'}" in one_line(error)
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path / "empty", CONFIG).plots.is_dir()


@pytest.mark.parametrize("below", ["file", "file/run", "file/deep/run"])
def test_creating_a_run_below_a_file_is_an_error_in_one_line(tmp_path: Path, below: str) -> None:
    """A path below a file fails for the user root too, who may write to any directory."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as error:
        RunDirectory.create(tmp_path / below, CONFIG)
    assert "cannot be written" in one_line(error) and "run.dir" in one_line(error)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc")
def test_creating_a_run_in_an_unwritable_directory_is_an_error_in_one_line() -> None:
    with pytest.raises(UserError) as error:
        RunDirectory.create("/proc/vineppo-run", CONFIG)
    assert "cannot be written" in one_line(error)


def test_open_refuses_other_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        RunDirectory.open(tmp_path / "nowhere")
    assert "no run directory" in one_line(error)
    with pytest.raises(UserError) as error:
        RunDirectory.open(tmp_path)
    assert "no config.yaml" in one_line(error)
    for damaged in (b"a: [1, 2", b"just text", b"", b"\xff\xfe\x00a"):
        (tmp_path / "config.yaml").write_bytes(damaged)
        with pytest.raises(UserError) as error:
            RunDirectory.open(tmp_path)
        assert "config.yaml is damaged" in one_line(error)


def test_open_checks_that_the_directory_is_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a resumed run would fail only at its first checkpoint."""
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    assert RunDirectory.open(run.path).path == run.path

    def read_only(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError) as error:
        RunDirectory.open(run.path)
    assert "Read-only file system" in one_line(error)
    assert RunDirectory.open(run.path, writable=False).config == config_to_dict(CONFIG)


# --- metrics and summary ---


def test_metrics_keep_full_precision_and_write_no_nan(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    assert run.read_metrics() == []
    run.append_metrics({"iteration": 1, "x": 0.1 + 0.2, "big": 2**60 + 1, "nan": math.nan, "inf": -math.inf})
    run.append_metrics({"iteration": 2, "x": np.float64(1 / 3), "n": np.int64(7), "t": torch.tensor(0.5), "none": None})
    text = run.metrics.read_text()
    assert text.splitlines()[0] == (
        '{"iteration": 1, "x": 0.30000000000000004, "big": 1152921504606846977, "nan": null, "inf": null}'
    )
    assert run.read_metrics()[1] == {"iteration": 2, "x": 1 / 3, "n": 7, "t": 0.5, "none": None}


def test_truncate_metrics_cuts_later_and_half_written_lines(tmp_path: Path) -> None:
    """After a resume, the file is the same as that of an uninterrupted run."""
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    for iteration in range(6):
        run.append_metrics({"iteration": iteration, "x": 1 / (iteration + 3)})
    uninterrupted = run.metrics.read_bytes()
    with open(run.metrics, "ab") as file:
        file.write(b'{"iteration": 6, "x": 0.1')  # killed here
    assert [line["iteration"] for line in run.read_metrics()] == [0, 1, 2, 3, 4, 5]
    run.truncate_metrics(after_iteration=3)
    assert [line["iteration"] for line in run.read_metrics()] == [0, 1, 2, 3]
    for iteration in (4, 5):
        run.append_metrics({"iteration": iteration, "x": 1 / (iteration + 3)})
    assert run.metrics.read_bytes() == uninterrupted


def test_a_damaged_metrics_line_is_reported_with_its_number(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    run.metrics.write_text('{"iteration": 1}\n{"iterat\n{"iteration": 3}\n')
    with pytest.raises(UserError) as error:
        run.read_metrics()
    assert "metrics.jsonl is damaged: line 2" in one_line(error)


def test_summary_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    run.write_summary({"accuracy_after": {"mean": 0.1, "low": math.nan}, "tokens": [1, 2]})
    before = run.summary.read_text()
    assert json.loads(before) == {"accuracy_after": {"mean": 0.1, "low": None}, "tokens": [1, 2]}
    monkeypatch.setattr(os, "replace", _raise_crash)
    with pytest.raises(Crash):
        run.write_summary({"updates": 3})
    assert run.summary.read_text() == before
    assert not [path for path in run.path.iterdir() if path.suffix == ".tmp"]


# --- Parquet ---

DECODE_TABLE = ["", "a=1", "\n", " b=2", "\n#", " 3", "<é>"]


def _decode(ids: object) -> str:
    """Decode like a SentencePiece tokenizer: a space at the start is dropped."""
    text = "".join(DECODE_TABLE[i] for i in ids)  # type: ignore[attr-defined]
    return text[1:] if text.startswith(" ") else text


def _two_rollouts() -> tuple[list[RolloutGroup], list[TrainingSample]]:
    third = 1 / 3
    first = Rollout((6, 6), (1, 2, 3, 4, 5), (-0.1, -third, -1e-8, -0.5, -2.0), "stop", "a=1\n b=2\n# 3", 1.0)
    second = Rollout((6, 6), (1, 1), (-0.25, -0.75), "length", "a=1a=1", 0.0)
    credit = StepCredit(
        boundaries=(2, 5), values=(third, 0.1 + 0.2), num_mc_rollouts=(9, 0), step_advantages=(-0.1, 0.7)
    )
    samples = [
        TrainingSample(
            token_ids=(6, 6, 1, 2, 3, 4, 5),
            loss_mask=(0, 0, 1, 1, 1, 1, 1),
            sampler_logprobs=(0.0, 0.0, *first.sampler_logprobs),
            advantages=(0.0, 0.0, -0.1, -0.1, 0.7, 0.7, 0.7),
            credit=credit,
            alternatives=(Alternative(3, 2, 0.1), Alternative(3, 6, -0.5)),
            rollout=first,
        ),
        TrainingSample(
            token_ids=(6, 6, 1, 1),
            loss_mask=(0, 0, 1, 1),
            sampler_logprobs=(0.0, 0.0, *second.sampler_logprobs),
            advantages=(0.0, 0.0, -0.5, -0.5),
            rollout=second,
        ),
    ]
    problem = Problem(id="train/7", prompt="<é><é>", answer="3")
    return [RolloutGroup(problem, (first, second))], samples


def test_parquet_contains_the_exact_numbers(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    groups, samples = _two_rollouts()
    path = run.write_rollouts(12, groups, samples, _decode)
    assert path == run.path / "rollouts" / "000012.parquet" and list(run.rollouts.iterdir()) == [path]
    table = pq.read_table(path)
    assert {name: str(table.schema.field(name).type) for name in ("values", "token_advantages", "step_ends")} == {
        "values": "list<element: double>",
        "token_advantages": "list<element: float>",
        "step_ends": "list<element: int32>",
    }
    first, second = table.to_pylist()

    def float32(values: list[float]) -> list[float]:
        return [float(np.float32(value)) for value in values]

    assert first == {
        "iteration": 12,
        "kind": "rollout",
        "problem_id": "train/7",
        "prompt": "<é><é>",
        "answer": "3",
        "response": "a=1\n b=2\n# 3",
        "reward": 1.0,
        "finish_reason": "stop",
        "num_tokens": 5,
        "response_ids": [1, 2, 3, 4, 5],
        "token_advantages": float32([-0.1, -0.1, 0.7, 0.7, 0.7]),
        "token_weights": [],
        "sampler_logprobs": float32([-0.1, -1 / 3, -1e-8, -0.5, -2.0]),
        "step_texts": ["a=1\n", " b=2\n# 3"],
        "step_ends": [2, 5],
        "values": [1 / 3, 0.1 + 0.2],
        "num_mc_rollouts": [9, 0],
        "step_advantages": [-0.1, 0.7],
        "alternatives": [
            {"position": 3, "token_id": 2, "text": DECODE_TABLE[2], "advantage": float32([0.1])[0]},
            {"position": 3, "token_id": 6, "text": DECODE_TABLE[6], "advantage": -0.5},
        ],
        "token_ends": [3, 4, 8, 10, 12],  # of `a=1`, a line break, ` b=2`, a line break and `#`, ` 3`
        "token_entropies": [],
        "token_values": [],
        "continuations": [],
    }
    assert second["token_advantages"] == [-0.5, -0.5] and second["finish_reason"] == "length"
    for column in ("step_texts", "step_ends", "values", "num_mc_rollouts", "step_advantages", "alternatives"):
        assert second[column] == []  # as for an algorithm without steps


def test_parquet_contains_entropies_predictions_and_continuations(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    groups, (whole, other) = _two_rollouts()
    sampled = (
        MCRollout(2, (3, 4, 6), 0.0, "length"),  # leaves the response after two of its tokens
        MCRollout(0, (1, 2, 3, 4, 5), 1.0, "stop", accepted=4),  # never leaves it
        MCRollout(4, (1,), None, "stop"),
    )
    whole = replace(whole, mc_rollouts=sampled, values=(0.0, 0.0, 0.5, 0.25, 0.125, 0.75, 1.0))
    other = replace(other, loss_mask=(0, 0, 0, 1), advantages=(0.0, 0.0, 0.0, -0.5))
    entropies = [[0.5, 0.25, 0.0, 1.0, 2.0], [1.5]]
    first, second = pq.read_table(run.write_rollouts(1, groups, [whole, other], _decode, entropies)).to_pylist()
    assert first["token_entropies"] == [0.5, 0.25, 0.0, 1.0, 2.0] and second["token_entropies"] == [None, 1.5]
    assert first["token_values"] == [0.5, 0.25, 0.125, 0.75, 1.0] and second["token_values"] == []
    names = ("state", "shared", "accepted", "num_tokens", "text", "reward", "finish_reason")
    assert [tuple(entry[name] for name in names) for entry in first["continuations"]] == [
        (2, 2, None, 3, " b=2\n#" + DECODE_TABLE[6], 0.0, "length"),
        (0, 5, 4, 5, "a=1\n b=2\n# 3", 1.0, "stop"),
        (4, 0, None, 1, "a=1", None, "stop"),
    ]


def test_the_ends_of_tokens_in_a_text() -> None:
    """Tokens that are parts of a character, and a decoder that drops a leading space."""

    def decode_bytes(ids: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]

    text = "é=1\n🙂"
    ends = token_ends(list(text.encode()), text, decode_bytes, {})
    assert ends == [0, 1, 2, 3, 4, 4, 4, 4, 5]  # a character belongs to the token that completes it
    assert token_ends([3, 3, 5], _decode([3, 3, 5]), _decode, {}) == [3, 7, 9]
    assert token_ends([1, 2], "another text", _decode, {}) == []
    cut = b"a" + "é".encode()[:1]
    assert token_ends(list(cut), "a\N{REPLACEMENT CHARACTER}", decode_bytes, {}) == [1, 2]


def test_parquet_refuses_a_sample_of_another_rollout(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    groups, samples = _two_rollouts()
    swapped = [replace(samples[0], rollout=samples[1].rollout), samples[1]]
    with pytest.raises(ValueError, match="train/7"):
        run.write_rollouts(1, groups, swapped, _decode)
    assert list(run.rollouts.iterdir()) == []


def test_the_order_of_samples_does_not_change_the_parquet_file(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    groups, samples = _two_rollouts()
    in_order = pq.read_table(run.write_rollouts(1, groups, samples, _decode)).to_pylist()
    assert pq.read_table(run.write_rollouts(1, groups, samples[::-1], _decode)).to_pylist() == in_order

    first, second = pq.read_table(run.write_rollouts(1, groups, samples[1:], _decode)).to_pylist()
    assert second == in_order[1]
    credit = ("token_advantages", "token_weights", "step_texts", "step_ends", "values", "num_mc_rollouts")
    for column in (*credit, "step_advantages", "alternatives"):
        assert first.pop(column) == [] and in_order[0].pop(column) is not None
    assert first == in_order[0]  # without credit, the other columns are the same


def test_parquet_has_rows_for_other_training_samples(tmp_path: Path) -> None:
    """A tree of the two rollouts: they share `a=1`, which is a separate sample with weight 2."""
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    groups, (whole, other) = _two_rollouts()
    leaf = replace(whole, weights=(0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0))
    prefix = TrainingSample((6, 6, 1), (0, 0, 1), (0.0, 0.0, -0.1), (0.0, 0.0, 0.25), weights=(0.0, 0.0, 2.0))
    # A sample with another prompt that trains only its last token; the alternative replaces this token.
    unrelated = TrainingSample(
        (5, 4, 3), (0, 0, 1), (0.0,) * 3, (0.0, 0.0, 4.0), alternatives=(Alternative(0, 1, 0.5),)
    )
    again = replace(other, advantages=(0.0, 0.0, 1.0, 1.0), loss_mask=(0, 0, 0, 1))
    path = run.write_rollouts(3, groups, [prefix, leaf, unrelated, other, again], _decode)
    rows = pq.read_table(path).to_pylist()
    assert [row["kind"] for row in rows] == ["rollout", "rollout", "sample", "sample", "sample"]
    assert [row["token_weights"] for row in rows] == [[0, 1, 1, 1, 1], [], [2], [], [0, 1]]
    assert [row["response_ids"] for row in rows] == [[1, 2, 3, 4, 5], [1, 1], [1], [3], [1, 1]]
    assert [row["token_advantages"] for row in rows[1:]] == [[-0.5, -0.5], [0.25], [4.0], [1.0, 1.0]]
    assert [row["problem_id"] for row in rows] == ["train/7", "train/7", "train/7", "", "train/7"]
    assert [row["reward"] for row in rows] == [1.0, 0.0, None, None, 0.0]
    assert [row["finish_reason"] for row in rows] == ["stop", "length", None, None, "length"]
    assert (rows[2]["prompt"], rows[2]["response"], rows[2]["num_tokens"]) == ("<é><é>", "a=1", 1)
    assert (rows[3]["prompt"], rows[3]["response"]) == (_decode((5, 4)), _decode((3,)))
    assert rows[3]["alternatives"] == [{"position": 0, "token_id": 1, "text": "a=1", "advantage": 0.5}]
    assert rows[2]["sampler_logprobs"] == [float(np.float32(-0.1))]


def test_step_texts_joined_are_the_response() -> None:
    """No space and no character is lost at any boundary."""

    def decode_bytes(ids: object) -> str:
        return bytes(ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]

    text = " x = 1é\n 漢字\n#🙂 3"
    ids = list(text.encode())
    for width in range(1, 9):
        boundaries = [*range(width, len(ids), width), len(ids)]
        texts = step_texts(ids, boundaries, decode_bytes)
        assert len(texts) == len(boundaries) and "".join(texts) == text
    assert step_texts(list("aé".encode()), (2, 3), decode_bytes) == ["", "aé"]
    spaces = [1, 3, 3, 5]
    assert step_texts(spaces, (1, 2, 3, 4), _decode) == ["a=1", " b=2", " b=2", " 3"]


def test_rollouts_of_later_iterations_are_removed(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a", CONFIG)
    groups, samples = _two_rollouts()
    for iteration in (1, 2, 3):
        run.write_rollouts(iteration, groups, samples, _decode)
    run.remove_rollouts(after_iteration=1)
    assert list(run.rollouts.iterdir()) == [run.rollouts_of(1)]


# --- checkpoints ---


class Crash(BaseException):
    """Simulates a power failure. It is a BaseException, so that no handler catches it."""


def _raise_crash(*_: object, **__: object) -> None:
    raise Crash


def _state(iteration: int) -> dict[str, object]:
    weights = torch.full((64, 64), iteration / 3)
    return {
        "position": {"iteration": iteration, "seconds": 0.1 + 0.2, "finished": False, "name": None},
        "model": {"w": weights, "half": weights[0].to(torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(float(iteration))}}, "groups": [{"betas": (0.9, 0.95)}]},
        "random": torch.get_rng_state(),
    }


def _assert_is_state_of(path: Path, iteration: int) -> None:
    state, expected = load_checkpoint(path), _state(iteration)
    assert state["position"] == expected["position"] and type(state["position"]["iteration"]) is int
    assert torch.equal(state["model"]["w"], torch.full((64, 64), iteration / 3))
    assert state["model"]["half"].dtype == torch.bfloat16
    assert state["optimizer"]["state"][0]["step"] == iteration
    assert state["optimizer"]["groups"] == [{"betas": (0.9, 0.95)}]


def test_checkpoints_are_loaded_as_saved_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 40):
        path = save_checkpoint(tmp_path, iteration, _state(iteration), keep=2)
        _assert_is_state_of(path, iteration)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000030", "000040"]
    assert latest_checkpoint(tmp_path) == tmp_path / "000040"
    manifest = json.loads((tmp_path / "000040" / "manifest.json").read_text())
    assert manifest["files"]["state.pt"]["size"] == (tmp_path / "000040" / "state.pt").stat().st_size


def test_a_checkpoint_of_the_same_iteration_is_replaced(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, _state(4))
    save_checkpoint(tmp_path, 5, _state(5))
    assert [path.name for path in tmp_path.iterdir()] == ["000005"]
    _assert_is_state_of(tmp_path / "000005", 5)


def test_values_that_cannot_be_loaded_are_refused_when_saving(tmp_path: Path) -> None:
    """For example, torch.load(weights_only=True) does not load NumPy scalars."""
    save_checkpoint(tmp_path, 1, _state(1))
    for value in (np.float64(1.0), np.zeros(2), Path("x"), {1, 2}):
        with pytest.raises(TypeError, match=r"state\['a'\]\[1\]"):
            save_checkpoint(tmp_path, 2, {"a": [0, value]})
    _assert_is_state_of(latest_checkpoint(tmp_path), 1)
    save_checkpoint(tmp_path, 3, {"model": torch.nn.Linear(2, 2).state_dict()})  # an OrderedDict with metadata
    assert load_checkpoint(tmp_path / "000003")["model"]["weight"].shape == (2, 2)


def _write_two_files(folder: Path) -> None:
    write_state(folder / "learner.pt", {"w": torch.arange(1000.0)})
    (folder / "shards").mkdir()
    (folder / "shards" / "0.bin").write_bytes(b"abc")


def test_files_of_writers_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 7, _state(7), writers=[_write_two_files])
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(files) == ["learner.pt", "shards/0.bin", "state.pt"]
    assert files["shards/0.bin"] == {"size": 3, "sha256": files_module.sha256(path / "shards" / "0.bin")}
    verify_checkpoint(path)
    assert torch.equal(read_state(path / "learner.pt")["w"], torch.arange(1000.0))
    _assert_is_state_of(path, 7)

    (path / "shards" / "0.bin").write_bytes(b"abd")
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    assert "shards/0.bin (content differs" in one_line(error)
    (path / "learner.pt").unlink()
    with pytest.raises(UserError) as error:
        verify_checkpoint(path)
    assert "learner.pt is missing" in one_line(error)
    with pytest.raises(UserError) as error:
        read_state(path / "learner.pt")
    assert "has no learner.pt: another version" in one_line(error)


def test_if_a_writer_fails_the_older_checkpoint_is_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, _state(1))
    with pytest.raises(TypeError, match=r"learner\['w'\] is a ndarray"):
        save_checkpoint(tmp_path, 2, {}, writers=[lambda at: write_state(at / "learner.pt", {"w": np.zeros(2)})])
    assert latest_checkpoint(tmp_path).name == "000001"


def _flip_a_byte(path: Path) -> None:
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def _truncate(path: Path) -> None:
    size = (path / "state.pt").stat().st_size
    os.truncate(path / "state.pt", size // 2)


def _write_manifest(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / "manifest.json").write_text(text)

    return write


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "byte flipped": (_flip_a_byte, "state.pt (content differs"),
    "truncated": (_truncate, "state.pt ("),
    "empty": (lambda path: os.truncate(path / "state.pt", 0), "state.pt (0 of "),
    "state missing": (lambda path: (path / "state.pt").unlink(), "state.pt is missing"),
    "manifest missing": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest truncated": (_write_manifest('{"files": {"state.pt"'), "manifest.json is not a valid manifest"),
    "manifest of nothing": (_write_manifest('{"files": {}}'), "does not list state.pt"),
    "manifest of another kind": (_write_manifest("[1]"), "manifest.json is not a valid manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_trap_16_a_damaged_checkpoint_is_never_loaded(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The older checkpoint is used with a warning. Without an older one, it is an error in one line."""
    for iteration in (10, 20):
        save_checkpoint(tmp_path, iteration, _state(iteration), keep=2)
    apply_damage, message = DAMAGES[damage]
    apply_damage(tmp_path / "000020")

    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path / "000020")
    assert message in one_line(error) and "000020" in one_line(error)

    path = latest_checkpoint(tmp_path)
    assert path.name == "000010"
    _assert_is_state_of(path, 10)
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ") and warning.count("\n") == 1 and "000020" in warning and message in warning

    shutil.rmtree(tmp_path / "000010")
    with pytest.raises(UserError) as error:
        latest_checkpoint(tmp_path, warn=lambda message: None)
    assert "all checkpoints in" in one_line(error)


def test_trap_16_a_leftover_temporary_directory_is_ignored(tmp_path: Path) -> None:
    """A killed run can leave a temporary directory, even with a complete state.pt. The next save removes it."""
    save_checkpoint(tmp_path, 10, _state(10))
    shutil.copytree(tmp_path / "000010", tmp_path / ".000020.tmp")
    assert latest_checkpoint(tmp_path).name == "000010"
    save_checkpoint(tmp_path, 20, _state(20))
    assert [path.name for path in tmp_path.iterdir()] == ["000020"]
    _assert_is_state_of(tmp_path / "000020", 20)


def test_a_damaged_newer_checkpoint_does_not_replace_an_undamaged_one(tmp_path: Path) -> None:
    """With keep=1: after resuming from 10 because 20 is damaged, the checkpoint of 15 is kept."""
    for iteration in (10, 20):
        save_checkpoint(tmp_path, iteration, _state(iteration), keep=2)
    _flip_a_byte(tmp_path / "000020")
    save_checkpoint(tmp_path, 15, _state(15), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000015"]


def test_a_missing_checkpoint_is_an_error_in_one_line(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as error:
            latest_checkpoint(directory)
        assert "no checkpoint in" in one_line(error)


@pytest.mark.parametrize("same_iteration", [False, True])
def test_trap_16_a_crash_at_any_disk_operation_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_iteration: bool
) -> None:
    """For every n, crash before the n-th fsync, rename or removal. Then the old or the new state can be loaded."""
    operations = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (torch, "save"), (shutil, "rmtree")]
    outcomes = []
    for deadline in range(100):
        directory = tmp_path / str(deadline)
        save_checkpoint(directory, 1, _state(1))
        done = 0

        def counted(real: Callable[..., object], deadline: int = deadline) -> Callable[..., object]:
            def operation(*args: object, **kwargs: object) -> object:
                nonlocal done
                if done == deadline:
                    raise Crash
                done += 1
                return real(*args, **kwargs)

            return operation

        new = 1 if same_iteration else 2
        with monkeypatch.context() as patch:
            for module, name in operations:
                patch.setattr(module, name, counted(getattr(module, name)))
            try:
                save_checkpoint(directory, new, _state(2))
                survived = True
            except Crash:
                survived = False
        state = load_checkpoint(latest_checkpoint(directory, warn=lambda message: pytest.fail(message)))
        outcomes.append(state["position"]["iteration"])
        save_checkpoint(directory, 3, _state(3))
        assert [path.name for path in directory.iterdir()] == ["000003"]
        if survived:
            break
    assert survived and outcomes == sorted(outcomes) and set(outcomes) == {1, 2}
    assert len(outcomes) >= 8  # two files, two directories, one or two renames, one removal


KILLED = """
import sys, torch
from vineppo.run.checkpoint import save_checkpoint
iteration = 0
while True:
    iteration += 1
    state = {"iteration": iteration, "w": torch.full((200_000,), float(iteration))}
    save_checkpoint(sys.argv[1], iteration, state, keep=1)
    print(iteration, flush=True)
"""


def test_a_killed_process_always_leaves_a_complete_newest_checkpoint(tmp_path: Path) -> None:
    """SIGKILL while checkpoints are written. No checkpoint that was reported as saved is lost."""
    source = str(Path(checkpoint_module.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    for attempt, delay in enumerate((0.011, 0.037, 0.071)):
        directory = tmp_path / str(attempt)
        command = [sys.executable, "-c", KILLED, str(directory)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "1\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            reported = [1, *(int(line) for line in process.stdout.read().split())]
        assert process.returncode == -signal.SIGKILL
        path = latest_checkpoint(directory, warn=lambda message: None)
        state = load_checkpoint(path)
        assert state["iteration"] == int(path.name) >= reported[-1]
        assert torch.equal(state["w"], torch.full((200_000,), float(state["iteration"])))


def test_sha256_of_a_known_content(tmp_path: Path) -> None:
    """SHA-256 of `abc` is given in FIPS 180-2, appendix B.1."""
    (tmp_path / "abc").write_bytes(b"abc")
    assert files_module.sha256(tmp_path / "abc") == ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    verify_checkpoint(save_checkpoint(tmp_path, 1, {"a": 1}))


# --- timer and trackers ---


def test_timer_adds_up_each_phase_and_resets() -> None:
    times = iter([0.0, 1.5, 10.0, 10.25, 20.0, 23.0])
    timer = Timer(clock=lambda: next(times))
    with timer("sample"):
        pass
    with pytest.raises(KeyError), timer("update"):
        raise KeyError
    with timer("sample"):
        pass
    assert timer.pop() == {"sample": 4.5, "update": 0.25}
    assert timer.pop() == {}


def test_tensorboard_gets_every_finite_number(tmp_path: Path) -> None:
    """A resumed run replaces the points after its checkpoint."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3)), (1, (2,))):
        (tracker,) = build_trackers(("tensorboard",), tmp_path, config_to_dict(CONFIG), start=start)
        for step in steps:
            metrics = {"iteration": step, "reward/mean": step / 4 + start, "bad": math.nan, "none": None, "why": "text"}
            tracker.log(metrics, step)
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["iteration", "reward/mean"]
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 1.5)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    learner.lr: 1e-05" in text


def test_the_error_of_a_missing_tracker_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory named wandb, which wandb creates, can be imported and must not be taken for the package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setitem(sys.modules, "trackio", None)
    for name in ("wandb", "trackio"):
        with pytest.raises(UserError) as error:
            build_trackers((name,), tmp_path, {})
        assert name in one_line(error) and 'pip install "vineppo[tracking]"' in one_line(error)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError) as error:
        require_trackers(("mlflow",))
    assert "mlflow; allowed: tensorboard, wandb, trackio" in one_line(error)
    assert build_trackers((), tmp_path, {}) == []


def test_objects_from_before_a_run_are_not_collected_and_later_ones_are(request: pytest.FixtureRequest) -> None:
    class Node:
        me: Any = None

    def cycle() -> weakref.ref[Node]:
        node = Node()
        node.me = node
        return weakref.ref(node)

    gc.unfreeze()  # the tests exclude objects too (tests/conftest.py)
    request.addfinalizer(gc.freeze)
    with objects_before_excluded_from_collection():
        frozen, made = gc.get_freeze_count(), cycle()
        with objects_before_excluded_from_collection():  # the objects stay excluded behind an inner block
            pass
        gc.collect()
        assert frozen > 1000
        assert gc.get_freeze_count() >= frozen - 100
        assert made() is None
    assert gc.get_freeze_count() == 0
