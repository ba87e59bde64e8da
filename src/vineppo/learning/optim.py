"""The optimizer and its learning-rate schedule, for policy, value network and supervised fine-tuning alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vineppo.types import UserError


def lr_factor(update: int, warmup: int, total: int, decay: str) -> float:
    """Share of the peak learning rate at an update (counted from 0).

    Rises linearly over `warmup` updates, reaching 1 at the last of them; then stays (`constant`) or falls linearly to
    0 behind the last update (`linear`).
    """
    if update < warmup:
        return (update + 1) / warmup
    if decay == "constant":
        return 1.0
    return max(0.0, (total - update) / max(1, total - warmup))


class Optimizer:
    """AdamW with global-norm clipping. Weights in bfloat16 get float32 masters: at the small learning rates of
    reinforcement learning, bfloat16's 8 bits would round most updates away.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay)

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip (0: no clipping), step at this learning rate, clear the gradient; returns its norm before clipping.

        Raises:
            UserError: when the gradient's norm is not finite; the weights are left as they were.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        norm = float(torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm or float("inf")))
        if not norm < float("inf"):
            raise UserError(
                f"the gradient's norm is {norm}; lower learner.lr or ppo.value_lr, or use model.dtype float32"
            )
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
        """Moments, and the masters where they differ from the weights."""
        masters = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.adamw.load_state_dict(state["adamw"])
        held = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        for master, saved in zip(held, state["masters"], strict=True):
            master.copy_(saved)
