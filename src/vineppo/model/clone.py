"""A second model with the weights of a first one, of which it may share some."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vineppo.types import UserError

_OF_TORCH = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}
"""Attributes of a module that PyTorch keeps for itself: parameters, buffers, children and hooks."""
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def clone_model(model: Any, share: Iterable[torch.Tensor] = ()) -> Any:
    """A model that computes what a transformers model computes, to the same bit, on weights of its own.

    The clone is built from the model's configuration on the meta device, with the same adapters (peft) where the model
    has some, and then takes over parameters, buffers and plain attributes, module by module. `copy.deepcopy` would do
    for a plain model, but FSDP2 refuses it. Ties between weights, dtype, device, `requires_grad`, evaluation mode and
    gradient checkpointing are as in the model. Hooks are not taken over: the clone of a sharded model has its shards
    (DTensor), but nothing that gathers them. No random numbers are drawn.

    Args:
        model: a transformers model; with adapters, the one that they sit in.
        share: parameters and buffers of `model` that the clone uses as they are, instead of a copy.
    Raises:
        UserError: when the model is not what its configuration builds, because its layers were replaced.
    """
    clone = _skeleton(model)
    sources = dict(model.named_modules(remove_duplicate=False))
    targets = dict(clone.named_modules(remove_duplicate=False))
    for name in (*sources, *targets):
        if name not in sources or name not in targets or not _computes_alike(sources[name], targets[name]):
            raise UserError(
                f"a copy of {type(model).__name__} cannot be made: its layer {name!r} is not the one that its "
                "configuration builds; use the model as from_pretrained loads it, or do without a value network and "
                "without a KL penalty (learner.kl.coefficient 0; beta 0 of VinePPOTrainer)"
            )
    tensors = {id(tensor): tensor for tensor in share}
    for name, source in sources.items():
        _take_over(source, targets[name], tensors)
    if hasattr(model, "generation_config"):
        clone.generation_config = copy.deepcopy(model.generation_config)
    return clone


def _skeleton(model: Any) -> Any:
    """The same modules without memory for their weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to warn of, the model itself has warned of
        skeleton = type(model)(copy.deepcopy(model.config))
        adapters = getattr(model, "peft_config", None) or {}
        wrapper = None
        for name, settings in copy.deepcopy(adapters).items():
            import peft

            # Some initialisations compute with the weights, which are not there.
            if hasattr(settings, "init_lora_weights"):
                settings.init_lora_weights = True
            if wrapper is None:
                wrapper = peft.get_peft_model(skeleton, settings, name)
            else:
                wrapper.add_adapter(name, settings)
    if adapters:
        skeleton.peft_config = copy.deepcopy(adapters)
    return skeleton


def _computes_alike(source: nn.Module, target: nn.Module) -> bool:
    """Whether the modules are of one class, which nobody changed; FSDP2 makes a subclass of a module's class."""
    return (
        isinstance(source, type(target))
        and type(source).__name__.removeprefix("FSDP") == type(target).__name__
        and "forward" not in vars(source)
    )


def _take_over(source: nn.Module, target: nn.Module, tensors: dict[int, torch.Tensor]) -> None:
    """Give a module the state of another one, without its children.

    Args:
        tensors: the clone's tensors by `id` of the model's; what is missing is copied and entered, so that a weight
            that stands in two places of the model stands in two places of the clone.
    """

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in tensors:
            own = tensor.detach().clone()
            is_parameter = isinstance(tensor, nn.Parameter)
            tensors[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if is_parameter else own
        return tensors[id(tensor)]

    for kind in ("_parameters", "_buffers"):
        present = getattr(source, kind)
        setattr(target, kind, {name: None if t is None else taken(t) for name, t in present.items()})
    for name, value in vars(source).items():
        if name in _OF_TORCH:
            continue
        if isinstance(value, torch.Tensor):
            setattr(target, name, taken(value))
        elif name == "_gradient_checkpointing_func":
            setattr(target, name, value)
        elif _is_plain(value) and hasattr(target, name):  # what the target has not is FSDP2's, for instance
            setattr(target, name, copy.deepcopy(value))


def _is_plain(value: Any) -> bool:
    """Numbers, texts, and collections of them: the state of a module that is no tensor and no module."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (list, tuple, set) else isinstance(value, _PLAIN)
