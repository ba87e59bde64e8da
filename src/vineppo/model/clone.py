"""Copies a model. The copy can share some tensors with the original."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vineppo.types import UserError

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}
"""Attributes that PyTorch manages in every module: parameters, buffers, children and hooks."""
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def clone_model(model: Any, share: Iterable[torch.Tensor] = ()) -> Any:
    """Copy a transformers model. The clone computes the same bits and has separate weights.

    The clone is built from the model's configuration on the meta device, with the same adapters (peft) if the model has
    any. Then parameters, buffers and plain attributes are copied, module by module. `copy.deepcopy` would work for a
    plain model, but fails for one that FSDP2 has sharded. Tied weights, dtype, device, `requires_grad`, evaluation mode
    and gradient checkpointing are preserved. Hooks are not copied: the clone of a sharded model has the shards
    (DTensor), but no hooks that gather them. No random numbers are drawn.

    Args:
        model: a transformers model; if it has adapters, the model inside the peft model.
        share: parameters and buffers of `model` that the clone shares instead of copying.
    Raises:
        UserError: if the model differs from what its configuration builds, because layers were replaced.
    """
    clone = _skeleton(model)
    sources = dict(model.named_modules(remove_duplicate=False))
    targets = dict(clone.named_modules(remove_duplicate=False))
    for name in (*sources, *targets):
        if name not in sources or name not in targets or not _same_class(sources[name], targets[name]):
            raise UserError(
                f"{type(model).__name__} cannot be copied: its layer {name!r} differs from the one that its "
                "configuration builds; use the model as from_pretrained loads it, or use no value network and no KL "
                "penalty (learner.kl.coefficient 0; beta 0 of VinePPOTrainer)"
            )
    tensors = {id(tensor): tensor for tensor in share}
    for name, source in sources.items():
        _copy_state(source, targets[name], tensors)
    if hasattr(model, "generation_config"):
        clone.generation_config = copy.deepcopy(model.generation_config)
    return clone


def _skeleton(model: Any) -> Any:
    """Build the same modules and adapters on the meta device, without memory for weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # creating the original model showed these warnings already
        skeleton = type(model)(copy.deepcopy(model.config))
        adapters = getattr(model, "peft_config", None) or {}
        wrapper = None
        for name, settings in copy.deepcopy(adapters).items():
            import peft

            # Some initialisations compute with the weights, which the meta device does not have.
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
    """Whether the modules have the same class and `forward`. FSDP2 replaces a module's class by a subclass."""
    return (
        isinstance(source, type(target))
        and type(source).__name__.removeprefix("FSDP") == type(target).__name__
        and "forward" not in vars(source)
    )


def _copy_state(source: nn.Module, target: nn.Module, tensors: dict[int, torch.Tensor]) -> None:
    """Copy the state of a module to another module, without its children.

    Args:
        tensors: `id` of a tensor of the model -> the clone's tensor. Missing tensors are copied and added, so that
            weights that are tied in the model are tied in the clone.
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
        elif _is_plain(value) and hasattr(target, name):  # not those that only FSDP2 adds
            setattr(target, name, copy.deepcopy(value))


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, a text, a dtype or None, or a collection of these."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (list, tuple, set) else isinstance(value, _PLAIN)
