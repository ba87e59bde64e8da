"""dev/gpu_check.py, with tiny models on the CPU, where two runs with the same seeds are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dev.gpu.pace import variants
from dev.gpu.part import Part
from dev.gpu.policies import EMBEDDED
from dev.gpu.results import ROOT, without_folders
from dev.gpu.trainings import COMPARED

from dev import gpu_check

pytestmark = pytest.mark.real  # a minute


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for models of this size
    try:
        assert gpu_check.main(["--out", str(folder), "--device", "cpu", "--small", "--seconds", "900"]) == 0
    finally:
        torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def parts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text())["parts"]
    return found


def only_table(part: dict[str, Any]) -> list[dict[str, Any]]:
    (rows,) = part["tables"].values()
    return rows


def test_every_part_is_done_and_is_in_the_tables(out: Path, parts: dict[str, Any]) -> None:
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(gpu_check.SHARES, "done")
    text = (out / "gpu.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(gpu_check.SHARES)
    titles = [title for part in parts.values() for title in part["tables"]]
    assert all(f"**{title}**" in text for title in titles)
    assert "aten::" in (out / "profile.txt").read_text()


def test_the_device_has_versions_and_a_speed(parts: dict[str, Any]) -> None:
    assert parts["device"]["facts"]["torch"] == torch.__version__
    assert [row["dtype"] for row in only_table(parts["device"])] == ["float32", "bfloat16"]
    assert all(row["TFLOP/s"] > 0 for row in only_table(parts["device"]))


def test_the_sampler_is_equal_to_the_trainer_and_to_itself(parts: dict[str, Any]) -> None:
    to_trainer, to_cpu = parts["equal"]["tables"].values()
    assert len(to_trainer) == 3 * 2 * 2 and len(to_cpu) == 3 * 2
    for row in to_trainer:
        assert row["twice the same"] and 0 < row["mean difference"] < row["largest difference"]
        assert row["largest difference"] < (1e-4 if row["dtype"] == "float32" else 0.5), row
        # Two responses to each prompt, and three continuations of each of their two states.
        assert row["completions"] <= (2 + 2 * 2 * 3) * (8 if row["model"] == EMBEDDED else 2)
    assert all(row["share equal"] == 1 and row["largest difference if equal"] == 0 for row in to_cpu)


def test_all_ways_of_decoding_give_the_same_tokens(parts: dict[str, Any]) -> None:
    rows = parts["pace"]["tables"]["compared with everything on"]
    names = list(variants(Part("cpu", True, "", Path(), 0.0, lambda: None)))
    assert [row["variant"] for row in rows] == names * 4  # two models, two dtypes
    for row in rows:
        assert row["warning"] == "" and row["graphs"] == 0
        if row["dtype"] == "float32":
            assert row["share equal"] == 1 and row["largest difference if equal"] < 1e-5
        if row["variant"] in ("everything", "no graphs", "no fused attention", "a check at every token"):
            assert row["same bits"], row  # on a CPU; the others have no fixed tensors
    speeds = parts["pace"]["tables"]["tokens per second"]
    assert [row["engine"] for row in speeds] == names and all(row["tokens/s"] > 0 for row in speeds)


def test_the_speed_is_that_of_the_tokens_and_seconds(parts: dict[str, Any]) -> None:
    speeds = parts["speed"]["tables"]["tokens per second"]
    assert {(row["model"], row["rows"]) for row in speeds} == {
        (model, rows) for model in ("0.5B (Qwen2.5)", "1.1B (TinyLlama)") for rows in (4, 16)
    }
    assert {"sampler", "generate"} <= {row["engine"] for row in speeds}
    for row in speeds:
        assert row["tokens/s"] == pytest.approx(row["rows"] * row["new tokens"] / row["seconds"], rel=0.1)
    calls = parts["speed"]["tables"]["calls per token step"]
    assert all(row["kernel launches"] == 0 and row["operators in all"] > 100 for row in calls)


def test_trainings_on_one_device_are_equal(parts: dict[str, Any]) -> None:
    tables, facts = parts["trainings"]["tables"], parts["trainings"]["facts"]
    assert set(facts.values()) == {1.0}
    first, later = tables["iteration 1"], tables["later iterations, after different samples"]
    assert {row["iteration"] for row in first} == {1} and {row["iteration"] for row in later} == {2}
    assert {row["metric"] for row in first} == set(COMPARED)
    assert all(row["difference"] == 0 for row in first + later)


def test_the_prediction_of_the_memory_has_the_sizes_of_the_small_model(parts: dict[str, Any]) -> None:
    """57,000 parameters: two bytes of weight and twelve of the optimizer, or four and eight, each."""
    rows = only_table(parts["update"])
    assert [(row["dtype"], row["gradient checkpointing"]) for row in rows] == [
        ("bfloat16", False),
        ("bfloat16", True),
        ("float32", False),
        ("float32", True),
    ]
    sizes = [row["predicted weights and optimizer"] for row in rows]
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3] and sizes[0] * 12 == sizes[2] * 14
    assert all(row["measured bytes"] > row["predicted bytes"] > sum(sizes[:1]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["predicted activations"] > rows[1]["predicted activations"]


def test_a_killed_run_is_equal_to_an_unbroken_run_on_a_cpu(parts: dict[str, Any]) -> None:
    assert 1 <= parts["resume"]["facts"]["iterations of the killed run"] < 4
    for row in only_table(parts["resume"]):
        assert row["same metrics"] and row["same weights"] and row["iterations"] == 4, row


def test_learning_has_the_accuracies(parts: dict[str, Any]) -> None:
    facts = parts["learning"]["facts"]
    assert facts["iterations"] == 3 and facts["finish_reason"] == "iterations"
    assert 0 < facts["accuracy before"]["mean"] < 1 and 0 < facts["accuracy after"]["mean"] <= 1
    assert [row["iteration"] for row in only_table(parts["learning"])] == [0, 2, 3]


def test_a_part_that_fails_and_a_part_that_never_ends_do_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(part: Part) -> None:
        part.row("so far", {"number": 1})
        raise ValueError("no such kernel")

    def never_ends(part: Part) -> None:
        part.facts["started"] = True
        while True:
            part.check()

    checks = {"device": fail, "equal": never_ends, "speed": lambda part: part.row("seen", {"number": 2})}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--parts", "speed,device,equal", "--seconds", "25"]
    assert gpu_check.main(arguments) == 1
    device, equal, speed = json.loads((tmp_path / "gpu.json").read_text())["parts"].values()
    assert device["status"] == "failed" and device["reason"] == "ValueError: no such kernel"
    assert device["tables"] == {"so far": [{"number": 1}]} and "no such kernel" in device["traceback"][-1]
    assert equal["status"] == "cut short" and equal["facts"] == {"started": True}
    assert speed["status"] == "done" and speed["tables"] == {"seen": [{"number": 2}]}
    assert "ValueError: no such kernel" in (tmp_path / "gpu.md").read_text()


def test_the_folders_of_the_machine_are_not_in_the_results() -> None:
    assert without_folders(f'File "{ROOT}/src/vineppo/seeds.py"') == 'File "src/vineppo/seeds.py"'
    assert without_folders('File "/opt/python/site-packages/torch/x.py"') == 'File "torch/x.py"'
