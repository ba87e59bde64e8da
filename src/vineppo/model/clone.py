"""Copy a transformers model, for the reference model and the value network.

The copy can share some tensors with the original model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vineppo.types import UserError

_TORCH_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}
"""Names of attributes that PyTorch manages in every module, such as parameters, buffers, child modules and hooks. They
are not copied like other attributes."""
_PLAIN = (bool, int, float, str, torch.dtype, type(None))
"""Types of the attributes that are copied, alone or in collections."""


def clone_model(model: Any, share: Iterable[torch.Tensor] = ()) -> Any:
    """Return the copy of a model that `clone_with_adapters` makes, without its peft model."""
    return clone_with_adapters(model, share)[0]


def clone_with_adapters(model: Any, share: Iterable[torch.Tensor] = ()) -> tuple[Any, Any]:
    """Copy a transformers model. The copy has separate weights and computes bit-identical results.

    The copy is built from the model's configuration on PyTorch's meta device, with the same adapters (peft) if the
    model has any. Then the parameters and buffers of each module are copied, and those other attributes that contain
    only numbers and texts. `copy.deepcopy` is not used, because it fails for a model that FSDP2 has sharded.

    Tied weights, dtype, device, `requires_grad`, evaluation mode and gradient checkpointing are preserved. Hooks are
    not copied: the copy of a model that FSDP2 has sharded has the same shards (DTensor), but no hooks that gather them.
    The state of the random number generator is not changed.

    Args:
        model: a transformers model. If it has adapters: the transformers model inside the peft model.
        share: parameters and buffers of `model` that are not copied, so that `model` and the copy share them.
    Returns:
        (the copy, the peft model that contains the copy, or None if `model` has no adapters).
    Raises:
        UserError: if layers were replaced, so that the model differs from a model built from its configuration, or if
            adapters of this kind cannot be built on the meta device.
    """
    try:
        clone, wrapper = _skeleton(model)
    except (RuntimeError, NotImplementedError) as error:  # PyTorch raises both for computations with meta tensors.
        kinds = ", ".join(str(settings.peft_type.value) for settings in getattr(model, "peft_config", {}).values())
        raise UserError(
            f"a model with adapters of kind {kinds} cannot be copied; use LORA adapters, or an algorithm without a "
            "value network and no KL penalty (learner.kl.coefficient 0; for VinePPOTrainer beta 0)"
        ) from error
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
    return clone, wrapper


def _skeleton(model: Any) -> tuple[Any, Any]:
    """Return (model, peft model or None) with the same modules and adapters, on the meta device without memory."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The same warnings were shown when the original model was created.
        skeleton = type(model)(copy.deepcopy(model.config))
        adapters = getattr(model, "peft_config", None) or {}
        wrapper = None
        for name, settings in copy.deepcopy(adapters).items():
            import peft

            # Some ways to initialise adapters compute with the weights, but weights on the meta device have no values.
            # True selects a way that does not.
            if hasattr(settings, "init_lora_weights"):
                settings.init_lora_weights = True
            if wrapper is None:
                wrapper = peft.get_peft_model(skeleton, settings, name)
            else:
                wrapper.add_adapter(name, settings)
    if adapters:
        # The settings of the original model, without the change above.
        skeleton.peft_config = copy.deepcopy(adapters)
    return skeleton, wrapper


def _same_class(source: nn.Module, target: nn.Module) -> bool:
    """Return whether a module of the model and a module of the copy have the same class and `forward` method.

    FSDP2 replaces the class of a module by a subclass, which counts as the same class. The result is False if `forward`
    of `source` was replaced.
    """
    return (
        isinstance(source, type(target))
        and type(source).__name__.removeprefix("FSDP") == type(target).__name__
        and "forward" not in vars(source)
    )


def _copy_state(source: nn.Module, target: nn.Module, tensors: dict[int, torch.Tensor]) -> None:
    """Copy the parameters, buffers and attributes of a module to another module, without its child modules.

    Args:
        source: module of the model.
        target: the corresponding module of the copy.
        tensors: dictionary from the `id` of a tensor of the model to the tensor that the copy uses. A tensor that is
            missing in the dictionary is copied and added. Therefore weights that are tied in the model are tied in the
            copy, too.
    """

    def clone_of(tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor that the copy uses in place of a tensor of the model."""
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
            setattr(target, name, value)  # a function that modules share
        elif _is_plain(value) and hasattr(target, name):  # FSDP2 adds attributes that the copy does not have
            setattr(target, name, copy.deepcopy(value))


def _is_plain(value: Any) -> bool:
    """Return whether a value is a number, a text, a dtype, None, or a collection of such values."""
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (list, tuple, set) else isinstance(value, _PLAIN)
