"""Supervised fine-tuning on the demonstrations of a task."""

from __future__ import annotations

from pathlib import Path

import pytest

from vineppo.config.schema import ModelConfig, SFTConfig, TaskConfig
from vineppo.training.sft import run_sft


def test_the_included_model_fits_the_demonstrations_it_was_trained_on(tmp_path: Path) -> None:
    """Its loss is about the entropy of the random choices in the demonstrations, also with those of shorter problems.

    By hand, for 10 steps: a third of the steps are traps with 0.67 nats for the way, the others have 0.20, and every
    step has 0.39 for the link; a step has 9 tokens. That is (0.36 + 0.39) / 9 = 0.083 nats per token, and a little less
    with the 5 tokens that end the response. If a shorter demonstration followed the prompt of another problem, the loss
    would be 1.1.
    """
    config = SFTConfig(
        model=ModelConfig(path="embedded:judgement"),
        task=TaskConfig(name="chain", level="judgement", num_steps=10),
        out=str(tmp_path / "model"),
        updates=1,
        batch_size=128,
        lr=1e-6,
    )
    assert run_sft(config, lambda line: None)["loss"] == pytest.approx(0.083, abs=0.02)
