"""A policy's weights by name, with adapters merged, for sampling engines in other processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_BASE = ".base_layer."


def full_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over (name, tensor) of a model's weights, with adapters added to the weights that they change.

    Names are those of `model.state_dict()` before adapters were added. Weights without an adapter share their memory
    with the model; a merged weight is a new tensor. The model is not changed and never copied as a whole.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, tensor in model.state_dict().items():
        owner, separator, attribute = name.partition(_BASE)
        if not separator:
            if ".lora_" not in name:
                yield name, tensor
            continue
        if attribute == "weight":
            with torch.no_grad():
                for adapter in adapted[owner].active_adapters:
                    tensor = (tensor + adapted[owner].get_delta_weight(adapter)).to(tensor.dtype)
        yield f"{owner}.{attribute}", tensor
