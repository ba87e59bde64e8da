"""Temporary copies of weights that make sampling faster.

Weights with LoRA adapters are merged with the adapters, and 16-bit weights on the CPU are packed. On the CPU, PyTorch
reorders a 16-bit weight in every matrix product with few rows. Packing a weight means to reorder it once, before
decoding, which uses the same weight hundreds of times. A product with 16 rows is then twice as fast, and a product with
100 rows 20% faster. Packing does not help float32 weights or weights on an accelerator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vineppo.model.hardware import cpu_multiplies

_PACKING = ("_reorder_linear_weight", "_linear_pointwise")
"""oneDNN operations that reorder a weight and multiply by a reordered weight."""


@contextlib.contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """Context manager in which linear layers of the model use faster copies of their weights, without gradients.

    A weight with LoRA adapters (peft) is merged with them, so that one matrix product replaces three. A 16-bit weight
    on a CPU with oneDNN is packed. The copies are deleted when the context ends. The weights of the model must not
    change within the context.
    """
    patched = []
    merged = [module for module in model.modules() if _mergeable(module)]
    inside = {id(module) for layer in merged for module in layer.modules()} - set(map(id, merged))
    try:
        for module in model.modules():
            if id(module) not in inside and (_mergeable(module) or _packable(module)):
                weight, bias = _merged(module) if _mergeable(module) else (module.weight.detach(), module.bias)
                patched.append(module)
                module.forward = _product(weight, bias)
        yield
    finally:
        for module in patched:
            module.__dict__.pop("forward", None)


def _mergeable(module: Any) -> bool:
    """Return whether a module is a linear layer with LoRA adapters that can be merged into its weight."""
    base = getattr(module, "base_layer", None)
    return (
        type(base) is nn.Linear
        and hasattr(module, "get_delta_weight")
        and "forward" not in module.__dict__
        and not getattr(module, "merged", True)
        and not module.disable_adapters
        and not any(getattr(module, "use_dora", {}).get(name) for name in module.active_adapters)
    )


def _merged(module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the weight of a linear layer with the active adapters added, and the bias."""
    base = module.base_layer
    delta = sum(module.get_delta_weight(name).float() for name in module.active_adapters if name in module.lora_A)
    return (base.weight.detach().float() + delta).to(base.weight.dtype), base.bias


def _packable(module: Any) -> bool:
    """Return whether a module is a 16-bit `nn.Linear` on the CPU (no subclass) whose `forward` is not replaced yet."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and _packs(module.weight.dtype)
    )


def _packs(dtype: torch.dtype) -> bool:
    """Return whether this CPU and this version of PyTorch can multiply by packed weights of the dtype."""
    return cpu_multiplies(dtype) and all(hasattr(torch.ops.mkldnn, name) for name in _PACKING)


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes F.linear with a weight of shape (out, in). The weight is packed if possible."""
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    operations = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight, None)
    return lambda x: operations._linear_pointwise(x, packed, bias, "none", [], "")
