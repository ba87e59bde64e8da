"""Switches dropout of a model off, and recomputation of activations on."""

from __future__ import annotations

from typing import Any

from vineppo.types import UserError


def with_checkpointing(model: Any) -> Any:
    """Enable recomputation of activations in the backward pass; returns the model."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"{type(model).__name__} cannot recompute activations; set gradient_checkpointing to false")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def without_dropout(model: Any) -> Any:
    """Switch dropout off; returns the model.

    All layers are put into evaluation mode, except those that recompute activations, which transformers does only in
    training mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # some model families pass this rate to F.dropout
    return model
