"""Define the optimizer and the learning-rate schedule.

Both are used for the policy, for the value network and in supervised fine-tuning.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vineppo.types import UserError


def lr_factor(update: int, warmup: int, total: int, decay: str) -> float:
    """Return the learning rate at an update as a fraction of the peak learning rate. Updates are counted from 0.

    The fraction rises linearly over `warmup` updates and reaches 1 at the last of these updates. Then the fraction
    stays 1 (`decay` is "constant"), or falls linearly and reaches 0 after `total` updates ("linear").
    """
    if update < warmup:
        return (update + 1) / warmup
    if decay == "constant":
        return 1.0
    return max(0.0, (total - update) / max(1, total - warmup))


class Optimizer:
    """AdamW with gradient clipping by global norm.

    For bfloat16 weights, the optimizer keeps and updates float32 copies (master weights). With the small learning rates
    of reinforcement learning, most updates are too small for the 8 bits of precision of bfloat16.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay)

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip the gradient, update the weights, and clear the gradient.

        Args:
            max_grad_norm: maximum global norm of the gradient; 0 turns clipping off.
        Returns:
            The norm of the gradient before clipping.
        Raises:
            UserError: if the norm of the gradient is not finite. In this case the weights are not changed.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm or float("inf")))
        if not norm < float("inf"):
            raise UserError(f"the gradient's norm is {norm}; lower the learning rate, or use model.dtype float32")
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.grad = None
            if master is not parameter:
                master.grad = None
                parameter.data.copy_(master)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return the state of AdamW and the float32 master weights."""
        masters = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        self.adamw.load_state_dict(state["adamw"])
        masters = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        for master, saved in zip(masters, state["masters"], strict=True):
            master.copy_(saved)
