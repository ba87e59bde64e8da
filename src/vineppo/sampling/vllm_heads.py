"""Widen the attention heads of a small model, because vLLM computes only some sizes of heads on a CPU.

A Llama with heads of d dimensions is the same function as one with heads of D > d dimensions whose further dimensions
are 0. Two numbers must be changed for this. Attention divides by the square root of the size of the heads, so the
queries are multiplied by sqrt(D / d). The rotary position embedding turns the pair i of dimensions with the frequency
theta^(-2i / d), so theta becomes theta^(D / d), and the pair (i, i + d / 2) moves to (i, i + D / 2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from vineppo.types import UserError


def wider_size(config: Any, sizes: Iterable[int]) -> int:
    """Return the size of heads with which a model can be computed; 0 if its own size is among the allowed ones.

    Args:
        config: configuration of the model.
        sizes: sizes of heads that vLLM computes.
    Raises:
        UserError: if no allowed size is possible for the model.
    """
    own = head_size(config)
    wider = [size for size in sizes if size > own]
    if own in sizes:
        return 0
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default" or own % 2 or not wider:
        raise UserError(
            f"the model has attention heads of {own} dimensions, but vLLM computes only heads of "
            f"{', '.join(map(str, sizes))} dimensions on this device; set sampler.engine to auto"
        )
    return min(wider)


def head_size(config: Any) -> int:
    """Return the number of dimensions of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def widen_config(config: Any, size: int) -> None:
    """Change the configuration of a Llama so that its heads have `size` dimensions."""
    ratio = size / head_size(config)
    config.head_dim = size
    parameters = dict(config.rope_parameters)
    config.rope_parameters = {**parameters, "rope_theta": float(parameters["rope_theta"]) ** ratio}


def widened(weights: Iterable[tuple[str, torch.Tensor]], own: int, size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a Llama with wider heads.

    Args:
        weights: (name, tensor) pairs of the model.
        own: number of dimensions of its heads.
        size: number of dimensions of the wider heads.
    """
    for name, tensor in weights:
        layer = name.rpartition(".")[0].rpartition(".")[2]
        if layer in ("q_proj", "k_proj"):
            halves = tensor.unflatten(0, (-1, 2, own // 2))  # (heads, 2, own / 2, ...)
            padded = _padded(halves, 2, size // 2).flatten(0, 2)
            yield name, padded * math.sqrt(size / own) if layer == "q_proj" else padded
        elif layer == "v_proj":
            yield name, _padded(tensor.unflatten(0, (-1, own)), 1, size).flatten(0, 1)
        elif layer == "o_proj" and tensor.dim() == 2:
            yield name, _padded(tensor.unflatten(1, (-1, own)), 2, size).flatten(1, 2)
        else:
            yield name, tensor


def _padded(tensor: torch.Tensor, dimension: int, size: int) -> torch.Tensor:
    """Append zeros to a dimension of a tensor until it has `size` entries."""
    missing = size - tensor.shape[dimension]
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dimension) + [0, missing])
