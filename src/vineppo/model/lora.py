"""Add low-rank adapters (peft) to a model, merge adapters into weights, and save and restore trained weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from vineppo.config.schema import LoraConfig
from vineppo.types import UserError


def with_adapters(model: Any, config: LoraConfig) -> Any:
    """Add new adapters to a transformers model in place, and freeze all other weights of the model.

    Returns:
        The peft model, which contains the given model.
    Raises:
        UserError: if peft is not installed, or if the model has no layers with the names in `config.targets`.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("model.lora needs the package peft; install it with pip install 'vineppo[lora]'") from error
    targets: Any = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # The initial adapters are the same in every run.
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(
                f"model.lora.targets is {', '.join(config.targets)}; the model has no layers with these names; its "
                f"linear layers: {', '.join(linear)}"
            ) from error


def merged_weights(model: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the (name, tensor) pairs of the model's `state_dict`, with all adapters merged into the weights.

    The names are those of the model without adapters. The tensors are equal to those that `merge_and_unload` of peft
    produces, for every kind of adapter. The model is not changed: each layer with adapters is copied and merged, one at
    a time to save memory. Other layers are not copied.

    Args:
        dtype: dtype in which layers with adapters are merged and yielded; None means their own dtype. In a 16-bit
            dtype, the sum of a weight and a small adapter is often rounded to the weight.
    """
    layers = adapter_layers(model)
    for name, tensor in model.state_dict().items():
        if not _inside(name, layers):
            yield name, tensor
    for name, layer in layers.items():
        yield from merged_layer(layer, dtype).state_dict(prefix=f"{name}.").items()


def merged_model(adapters: Any, dtype: torch.dtype) -> Any:
    """Merge the adapters of a peft model into its layers in place, in float32, and return the model without adapters.

    Args:
        dtype: dtype to which the layers that had adapters are rounded after the sum.
    """
    base = adapters.get_base_model()
    names = list(adapter_layers(base))
    for name in names:
        base.get_submodule(name).to(torch.float32)
    merged = adapters.merge_and_unload()
    for name in names:
        merged.get_submodule(name).to(dtype)
    return merged


def adapter_layers(model: Any) -> dict[str, Any]:
    """Return the outermost layers of a model that have adapters of peft, as a dictionary from names to layers."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper
    except ModuleNotFoundError:
        return {}
    layers: dict[str, Any] = {}
    # named_modules yields a layer before the layers inside it. An adapter layer inside another one is skipped, because
    # its tensors are among those of the merged outer layer.
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not _inside(name, layers):
            layers[name] = module
    return layers


def _inside(name: str, layers: dict[str, Any]) -> bool:
    """Return whether a module or tensor lies inside one of the layers, for example "a.b.weight" inside "a.b"."""
    return any(name[:end] in layers for end, character in enumerate(name) if character == ".")


def merged_layer(layer: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a layer with its adapters merged, in a dtype or in the dtype of the layer.

    The layer is copied because peft merges adapters in place.
    """
    copied = copy.deepcopy(layer)
    if dtype is not None:
        copied = copied.to(dtype)
    # peft wraps layers that are trained without an adapter (ModulesToSaveWrapper and others). Only such wrappers have
    # this method.
    if hasattr(copied, "unload_and_optionally_merge_module"):
        whole: nn.Module = copied.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return whole
    copied.merge()
    merged: nn.Module = copied.get_base_layer()
    return merged


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a module that a checkpoint needs, as a dictionary from names to tensors.

    If some weights are frozen, these are only the trained weights. Otherwise the result is the complete `state_dict`.
    """
    state, frozen = module.state_dict(), _has_frozen(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained} if frozen else state


def load_trained_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a state that `trained_state` returned."""
    module.load_state_dict(state, strict=not _has_frozen(module))


def _has_frozen(module: nn.Module) -> bool:
    """Return whether a weight of the module is frozen, that is, not trained."""
    return not all(p.requires_grad for p in module.parameters())
