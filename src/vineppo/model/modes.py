"""Switch off the dropout of a model, and switch on gradient checkpointing."""

from __future__ import annotations

from typing import Any

from vineppo.types import UserError


def with_checkpointing(model: Any) -> Any:
    """Enable gradient checkpointing in place, and return the model.

    Gradient checkpointing recomputes activations in the backward pass, which saves memory and takes more time.

    Raises:
        UserError: if the model does not support gradient checkpointing.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(model).__name__} does not support gradient checkpointing; set model.gradient_checkpointing to false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def without_dropout(model: Any) -> Any:
    """Switch off the dropout of a model in place, and return the model.

    All layers are put into evaluation mode, except for layers with gradient checkpointing. These layers stay in
    training mode, because transformers recomputes activations only in training mode. Their dropout rate is set to 0.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # Some models pass this attribute to F.dropout as the rate.
    return model
