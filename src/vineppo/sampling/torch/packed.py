"""Temporary copies of weights for fast sampling: LoRA adapters are merged, and 16-bit weights on the CPU are packed.

On the CPU, PyTorch reorders a 16-bit weight at every product with a few rows. Decoding uses the same weights hundreds
of times, so packing, which reorders them once, makes a product with 16 rows twice as fast and one with 100 rows a fifth
faster. Packing float32 weights has no benefit, and accelerators choose their own layout.
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
    """Context manager in which the model's linear layers use copies of their weights, without gradients.

    Copies are made of weights with LoRA adapters (peft), which are merged so that one product replaces three, and of
    16-bit weights on a CPU with oneDNN, which are reordered. The copies are deleted when the context ends. The weights
    of the model must not change within the context.
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
    """Whether a module is a linear layer with LoRA adapters that can be merged into its weight."""
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
    """Weight with the active adapters added, and bias."""
    base = module.base_layer
    delta = sum(module.get_delta_weight(name).float() for name in module.active_adapters if name in module.lora_A)
    return (base.weight.detach().float() + delta).to(base.weight.dtype), base.bias


def _packable(module: Any) -> bool:
    """Whether a module is a 16-bit linear layer on the CPU, and neither a subclass nor patched."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and _packs(module.weight.dtype)
    )


def _packs(dtype: torch.dtype) -> bool:
    """Whether this CPU and this PyTorch can multiply by packed weights of the dtype."""
    return cpu_multiplies(dtype) and all(hasattr(torch.ops.mkldnn, name) for name in _PACKING)


def _product(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Function that computes F.linear with a weight of shape (out, in), which is packed if that is faster."""
    if weight.device.type != "cpu" or not _packs(weight.dtype):
        return lambda x: F.linear(x, weight, bias)
    operations = torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight, None)
    return lambda x: operations._linear_pointwise(x, packed, bias, "none", [], "")
