"""TRL's own trainers read the exported data sets, and files that its GRPOTrainer writes are read here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.view.conftest import trained
from vineppo.cli.main import main
from vineppo.config.schema import TaskConfig
from vineppo.model.location import resolve_model_path
from vineppo.tasks import build_task
from vineppo.view.records import iterations_of, responses_of

pytestmark = pytest.mark.real
MODEL = str(resolve_model_path("embedded:judgement"))
ONE_STEP: dict[str, Any] = {
    "max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "learning_rate": 1e-3,
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with prm, dpo and sft of a short run, as .jsonl and .parquet."""
    out = tmp_path_factory.mktemp("exports")
    run = trained(out / "run", "vineppo")
    for form in ("prm", "dpo", "sft"):
        for suffix in ("jsonl", "parquet"):
            # Rewards are 0 and 1, so with --right 1 the pairs and responses are those of the defaults.
            assert main(["export", str(run), "--format", form, "--out", str(out / f"{form}.{suffix}")]) == 0
    return out


def data_sets(exported: Path, form: str) -> list[Any]:
    """Return the data set read from JSONL and from Parquet, with the loaders of the library datasets."""
    datasets = pytest.importorskip("datasets")
    kinds = {"jsonl": "json", "parquet": "parquet"}
    return [
        datasets.load_dataset(kind, data_files=str(exported / f"{form}.{suffix}"), split="train", cache_dir=exported)
        for suffix, kind in kinds.items()
    ]


def models() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)


def train_one_step(trainer: Any) -> None:
    """Train one update, and check that it has a loss and changes the weights."""
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    result = trainer.train()
    assert math.isfinite(result.training_loss) and result.training_loss > 0
    after = list(trainer.model.parameters())
    assert any(not torch.equal(a, b.detach()) for a, b in zip(before, after, strict=True))


def test_sft_trainer_reads_the_export(exported: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    first, second = data_sets(exported, "sft")
    assert first.to_list() == second.to_list()
    model, tokenizer = models()
    args = trl.SFTConfig(output_dir=str(tmp_path), **ONE_STEP)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=first, processing_class=tokenizer)
    example = trainer.train_dataset[0]
    assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == (
        first[0]["prompt"] + first[0]["completion"]
    )
    train_one_step(trainer)


def test_dpo_trainer_reads_the_export(exported: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    first, second = data_sets(exported, "dpo")
    assert first.to_list() == second.to_list()
    model, tokenizer = models()
    args = trl.DPOConfig(output_dir=str(tmp_path), **ONE_STEP)
    train_one_step(trl.DPOTrainer(model=model, args=args, train_dataset=first, processing_class=tokenizer))


def test_prm_trainer_reads_the_export(exported: Path, tmp_path: Path) -> None:
    """TRL has a PRMTrainer up to version 1.13."""
    prm = pytest.importorskip(
        "trl.experimental.prm",
        reason="TRL has no PRMTrainer since version 1.14; `make test-real` runs this test with 1.13",
    )
    from transformers import AutoModelForTokenClassification

    first, second = data_sets(exported, "prm")
    assert first.to_list() == second.to_list()
    _, tokenizer = models()
    model = AutoModelForTokenClassification.from_pretrained(MODEL, num_labels=2)
    args = prm.PRMConfig(output_dir=str(tmp_path), **ONE_STEP)
    trainer = prm.PRMTrainer(model=model, args=args, train_dataset=first, processing_class=tokenizer)
    for row, example in zip(first, trainer.train_dataset, strict=True):
        text = row["prompt"] + "".join(f"{step}\n" for step in row["completions"])
        assert tokenizer.decode(example["input_ids"], skip_special_tokens=True) == text
        # TRL trains the label of a step at the line break behind it.
        trained_labels = [label for label in example["labels"] if label != -100]
        assert trained_labels == [int(label) for label in row["labels"]]
    train_one_step(trainer)


def test_a_file_that_grpo_trainer_writes_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    task = build_task(TaskConfig(num_steps=3))
    problems = [task.problem("train", n) for n in range(4)]
    rows = [{"prompt": p.prompt, "solution": p.answer} for p in problems]

    def right(completions: list[str], solution: list[str], **_: Any) -> list[float]:
        return [float(text.strip().endswith(f"#### {s}")) for text, s in zip(completions, solution, strict=True)]

    def short(completions: list[str], log_extra: Any = None, **_: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return [0.25 * (len(text) < 60) for text in completions]

    model, tokenizer = models()
    settings = {**ONE_STEP, "max_steps": 2, "per_device_train_batch_size": 4, "seed": 1}
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), num_generations=2, max_completion_length=40, log_completions=True, **settings
    )
    trl.GRPOTrainer(
        model=model,
        reward_funcs=[right, short],
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train()
    capsys.readouterr()
    assert iterations_of(tmp_path) == [1, 2]
    for step in (1, 2):
        stored = pq.read_table(tmp_path / "completions" / f"completions_{step:05d}.parquet").to_pylist()
        found = responses_of(tmp_path, step)
        assert [response.text for response in found] == [entry["completion"] for entry in stored]
        for response, entry in zip(found, stored, strict=True):
            assert response.reward == entry["right"] + entry["short"]
            assert [line.advantage for line in response.steps] == [pytest.approx(entry["advantage"])] * len(
                response.steps
            )
            lines = response.text.splitlines(keepends=True)
            assert [line.text for line in response.steps] == lines
    assert main(["show", str(tmp_path), "2", "1"]) == 0
    assert "advantage of the whole response" in capsys.readouterr().out
