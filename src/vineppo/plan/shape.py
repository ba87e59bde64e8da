"""The size of a language model, from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vineppo.config.schema import Config
from vineppo.model.loading import resolve_model_path
from vineppo.types import UserError

GIB = float(1 << 30)


@dataclass(frozen=True)
class Shape:
    """The size of a language model."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


KNOWN = {
    "microsoft/rho-math-1b-v0.1": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "realtreetune/rho-1b-sft-GSM8K": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "realtreetune/rho-1b-sft-MATH": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "deepseek-ai/deepseek-math-7b-base": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "realtreetune/deepseekmath-7b-sft-GSM8K": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "realtreetune/deepseekmath-7b-sft-MATH-v2": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
}
"""Sizes of the paper's models, from their published configurations, for machines without access to the hub."""


def shape_by_name(config: Config) -> Shape:
    """Size of the configured model, read from its configuration without loading weights.

    Raises:
        UserError: if the configuration of the model cannot be read.
    """
    path = resolve_model_path(config.model.path)
    if path in KNOWN:
        return KNOWN[path]
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model_config = AutoConfig.from_pretrained(path, trust_remote_code=config.model.trust_remote_code)
        with torch.device("meta"):
            return shape_of(AutoModelForCausalLM.from_config(model_config))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.path is {path!r}: the model's configuration cannot be read ({reason})") from error


def shape_of(model: Any) -> Shape:
    """Size of a model that has been instantiated."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return Shape(
        parameters=count(model),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
    )


def count(model: Any, trainable: bool = False) -> int:
    """Number of parameters, or only of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def trainable(config: Config, shape: Shape) -> int:
    """Number of trained parameters. LoRA adapters are assumed on the seven linear layers of each block."""
    r = config.model.lora.r
    if not r:
        return shape.parameters
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys) + 3 * (shape.hidden + shape.intermediate)
    return r * sides * shape.layers


def kv_bytes(shape: Shape, size: int) -> float:
    """Bytes of the keys and values of one token, with `size` bytes per number."""
    return 2.0 * shape.layers * shape.kv_heads * shape.head_dim * size
