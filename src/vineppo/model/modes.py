"""How a model runs: without dropout, and with or without recomputed activations."""

from __future__ import annotations

from typing import Any

from vineppo.types import UserError


def with_checkpointing(model: Any) -> Any:
    """The same model, which recomputes its activations in the backward pass."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"{type(model).__name__} cannot recompute activations; set gradient_checkpointing to false")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def without_dropout(model: Any) -> Any:
    """Evaluation mode, but for layers that recompute their activations: transformers does so in training mode only."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # some families read their own flag
    return model
