"""Weights in the layout that the processor's matrix products read fastest, for as long as sampling lasts.

A plain product of a few rows with a 16-bit weight rearranges the weight each time. Decoding multiplies the same weights
hundreds of times, so they are rearranged once: twice as fast with 16 rows, a fifth faster with 100. In float32 there is
nothing to gain, and accelerators choose their own layout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_SUPPORTED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Which operation says whether this processor multiplies in a dtype."""


@contextlib.contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """Run the model's linear layers on rearranged copies of their weights inside the block; no gradient flows.

    The copies take as much memory as the weights and are dropped at the end; the weights must not change meanwhile.
    Without 16-bit weights on a CPU, or without oneDNN, nothing happens.
    """
    layers = [module for module in model.modules() if _packable(module)]
    try:
        for layer in layers:
            layer.forward = _product(layer.weight, layer.bias)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _packable(module: Any) -> bool:
    """A linear layer in 16 bits on the CPU, and nobody changed it: a subclass may do something else with its weight."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and _multiplies(module.weight.dtype)
    )


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and this processor multiplies 16-bit numbers of that kind."""
    if dtype not in _SUPPORTED or not torch.backends.mkldnn.is_available():
        return False
    operations = (_SUPPORTED[dtype], "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in operations) and getattr(torch.ops.mkldnn, operations[0])()


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """F.linear with a rearranged copy of the weight, shape (out, in)."""
    operations = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight.detach(), None)
    return lambda x: operations._linear_pointwise(x, packed, bias, "none", [], "")
