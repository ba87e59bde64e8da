"""Copy a model. The copy can share some tensors with the original model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vineppo.types import UserError

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}
"""Names of the attributes that PyTorch manages in every module, such as parameters, buffers, children and hooks."""
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def clone_model(model: Any, share: Iterable[torch.Tensor] = ()) -> Any:
    """Copy a transformers model. The clone computes bit-identical results and has separate weights.

    The clone is built from the model's configuration on the meta device, with the same adapters (peft) if the model has
    any. Then parameters, buffers, and attributes that contain only numbers and texts are copied for each module.
    `copy.deepcopy` is not used, because it fails for a model that FSDP2 has sharded. Tied weights, dtype, device,
    `requires_grad`, evaluation mode and gradient checkpointing are preserved. Hooks are not copied: the clone of a
    sharded model has the shards (DTensor), but no hooks that gather the shards. The state of the random number
    generator is not changed.

    Args:
        model: a transformers model; if it has adapters, the model inside the peft model.
        share: parameters and buffers of `model` that are not copied, so that the clone and `model` share them.
    Raises:
        UserError: if layers were replaced, so that the model differs from a model built from its configuration.
    """
    clone = _skeleton(model)
    sources = dict(model.named_modules(remove_duplicate=False))
    targets = dict(clone.named_modules(remove_duplicate=False))
    for name in (*sources, *targets):
        if name not in sources or name not in targets or not _same_class(sources[name], targets[name]):
            raise UserError(
                f"{type(model).__name__} cannot be copied: its layer {name!r} differs from the one that the "
                "model's configuration describes; use the model as from_pretrained loads it, or use an algorithm "
                "without a value network and no KL penalty (learner.kl.coefficient 0; for VinePPOTrainer beta 0)"
            )
    tensors = {id(tensor): tensor for tensor in share}
    for name, source in sources.items():
        _copy_state(source, targets[name], tensors)
    if hasattr(model, "generation_config"):
        clone.generation_config = copy.deepcopy(model.generation_config)
    return clone


def _skeleton(model: Any) -> Any:
    """Build the same modules and adapters as in `model` on the meta device, where weights need no memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The same warnings were shown when the original model was created.
        skeleton = type(model)(copy.deepcopy(model.config))
        adapters = getattr(model, "peft_config", None) or {}
        wrapper = None
        for name, settings in copy.deepcopy(adapters).items():
            import peft

            # Some initialisations of adapters compute with the weights, but weights on the meta device have no values.
            if hasattr(settings, "init_lora_weights"):
                settings.init_lora_weights = True
            if wrapper is None:
                wrapper = peft.get_peft_model(skeleton, settings, name)
            else:
                wrapper.add_adapter(name, settings)
    if adapters:
        skeleton.peft_config = copy.deepcopy(adapters)
    return skeleton


def _same_class(source: nn.Module, target: nn.Module) -> bool:
    """Return whether two modules have the same class and the same `forward` method.

    FSDP2 replaces the class of a module by a subclass, which counts as the same class.
    """
    return (
        isinstance(source, type(target))
        and type(source).__name__.removeprefix("FSDP") == type(target).__name__
        and "forward" not in vars(source)
    )


def _copy_state(source: nn.Module, target: nn.Module, tensors: dict[int, torch.Tensor]) -> None:
    """Copy the parameters, buffers and attributes of a module to another module. Child modules are not copied.

    Args:
        tensors: dictionary from the `id` of a tensor of the model to the tensor of the clone. A tensor that is missing
            in the dictionary is copied and added, so that weights that are tied in the model are tied in the clone.
    """

    def clone_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in tensors:
            copied = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
        return tensors[id(tensor)]

    for kind in ("_parameters", "_buffers"):
        present = getattr(source, kind)
        setattr(target, kind, {name: None if t is None else clone_of(t) for name, t in present.items()})
    for name, value in vars(source).items():
        if name in _TORCH_ATTRIBUTES:
            continue
        if isinstance(value, torch.Tensor):
            setattr(target, name, clone_of(value))
        elif name == "_gradient_checkpointing_func":
            setattr(target, name, value)
        elif _is_plain(value) and hasattr(target, name):  # FSDP2 adds attributes that the clone does not have
            setattr(target, name, copy.deepcopy(value))


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, a dtype, None, or a collection of such values."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (list, tuple, set) else isinstance(value, _PLAIN)
