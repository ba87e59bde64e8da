"""A policy's weights by name, as another engine loads them: adapters are merged on the way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_BASE = ".base_layer."


def full_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of each weight of a model, one at a time; adapters are added to the weights that they change.

    Names are those of `model.state_dict()` as it was before the adapters. A weight without an adapter shares its memory
    with the model, a merged one is new: the model is not changed, and no second copy of it is ever whole.
    """
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, tensor in model.state_dict().items():
        owner, inside, own = name.partition(_BASE)
        if not inside:
            if ".lora_" not in name:
                yield name, tensor
            continue
        if own == "weight":
            with torch.no_grad():
                for adapter in adapted[owner].active_adapters:
                    tensor = (tensor + adapted[owner].get_delta_weight(adapter)).to(tensor.dtype)
        yield f"{owner}.{own}", tensor
