"""Low-rank adapters (peft), and which weights of a module are trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vineppo.config.schema import LoraConfig
from vineppo.types import UserError


def with_adapters(model: Any, config: LoraConfig) -> Any:
    """Put fresh adapters into a model, which changes it, and freeze its other weights; the peft model around it.

    Raises:
        UserError: where peft is not installed, or the model has no layers of those names.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("model.lora needs peft: pip install 'vineppo[lora]'") from error
    targets: Any = "all-linear" if config.targets == ("all-linear",) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # every run starts from the same adapters, whatever was drawn before
        try:
            return peft.get_peft_model(model, settings)
        except ValueError as error:
            linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise UserError(
                f"model.lora.targets {', '.join(config.targets)} are not in this model; its layers: {', '.join(linear)}"
            ) from error


def trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint must hold of a module: everything, or where some weights are frozen only the others."""
    state, frozen = module.state_dict(), _has_frozen(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trained} if frozen else state


def load_trained_state(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Take over what `trained_state` returned."""
    module.load_state_dict(state, strict=not _has_frozen(module))


def _has_frozen(module: nn.Module) -> bool:
    return not all(p.requires_grad for p in module.parameters())
