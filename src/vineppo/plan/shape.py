"""Determine the size of a language model (parameters, layers, widths) from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vineppo.config.schema import Config
from vineppo.model.loading import configuration_path
from vineppo.model.location import only_local_copy
from vineppo.objects import message_line
from vineppo.types import UserError

GIB = float(1 << 30)
"""Number of bytes in a gibibyte."""


@dataclass(frozen=True)
class Shape:
    """The number of parameters of a language model and the sizes of its layers."""

    parameters: int
    """Number of all parameters."""
    layers: int
    """Number of transformer blocks."""
    hidden: int
    """Width of the hidden states."""
    intermediate: int
    """Width of the inner layer of each feed-forward network."""
    heads: int
    """Number of attention heads for queries."""
    kv_heads: int
    """Number of attention heads for keys and values. It is smaller than `heads` with grouped-query attention."""
    head_dim: int
    """Width of an attention head."""
    vocabulary: int
    """Number of tokens in the vocabulary."""


KNOWN = {
    "microsoft/rho-math-1b-v0.1": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "realtreetune/rho-1b-sft-GSM8K": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "realtreetune/rho-1b-sft-MATH": Shape(1_100_048_384, 22, 2048, 5632, 32, 4, 64, 32_000),
    "deepseek-ai/deepseek-math-7b-base": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "realtreetune/deepseekmath-7b-sft-GSM8K": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "realtreetune/deepseekmath-7b-sft-MATH-v2": Shape(6_910_365_696, 30, 4096, 11_008, 32, 32, 128, 102_400),
    "Qwen/Qwen2.5-0.5B-Instruct": Shape(494_032_768, 24, 896, 4864, 14, 2, 64, 151_936),
    "Qwen/Qwen2.5-7B-Instruct": Shape(7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064),
    "meta-llama/Llama-3.1-70B-Instruct": Shape(70_553_706_496, 80, 8192, 28_672, 64, 8, 128, 128_256),
}
"""Sizes of the models in the VinePPO paper and of the recipes `gpu/`, from their published configurations. With this
table, runs of these models can be planned without access to the Hugging Face Hub."""


def shape_from_config(config: Config) -> Shape:
    """Return the size of the model at `config.model.path`, without loading its weights.

    Raises:
        UserError: if the configuration of the model cannot be read.
    """
    path = configuration_path(config.model)
    if path in KNOWN:
        return KNOWN[path]
    local = only_local_copy(path)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        options = {"trust_remote_code": config.model.trust_remote_code, "local_files_only": local}
        model_config = AutoConfig.from_pretrained(path, **options)
        with torch.device("meta"):  # The tensors get shapes but no memory.
            return shape_of(AutoModelForCausalLM.from_config(model_config))
    except (OSError, ValueError) as error:
        reason = message_line(error)
        raise UserError(f"model.path is {path!r}: the model's configuration cannot be read ({reason})") from error


def shape_of(model: Any) -> Shape:
    """Return the size of a transformers model that has already been created."""
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
    """Return the number of parameters of a model. If `trainable` is true, count only the trainable ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_trainable(config: Config, shape: Shape) -> int:
    """Return the number of trained parameters: all parameters of the model or, with LoRA, those of the adapters.

    LoRA adapters are assumed on all seven linear layers (q, k, v, o, gate, up, down) of each transformer block.

    Args:
        config: configuration of the run.
        shape: size of the model.
    """
    r = config.model.lora.r
    if not r:
        return shape.parameters
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # An adapter of rank r on a linear layer has r * (input width + output width) parameters.
    attention = 2 * (shape.hidden + queries) + 2 * (shape.hidden + keys)
    lora_dims_per_layer = attention + 3 * (shape.hidden + shape.intermediate)
    return r * lora_dims_per_layer * shape.layers


def kv_bytes(shape: Shape, size: int) -> float:
    """Return how many bytes one token takes in the KV cache.

    Args:
        shape: size of the model.
        size: number of bytes of one number in the cache.
    """
    return 2.0 * shape.layers * shape.kv_heads * shape.head_dim * size
