"""Define the optimizer and the learning-rate schedule for the policy, the value network and supervised fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from vineppo.learning.sharding import full, like
from vineppo.types import UserError


def lr_factor(update: int, warmup: int, total: int, decay: str) -> float:
    """Return the learning rate of an update as a fraction of the peak learning rate.

    The fraction rises linearly during the warm-up and is 1 at the last update of the warm-up. Afterwards it stays 1,
    falls linearly to 0, or falls to 0 along half a period of a cosine.

    Args:
        update: number of the update, counted from 0.
        warmup: number of updates of the warm-up.
        total: number of updates after which a linear or cosine decay reaches 0.
        decay: "constant", "linear" or "cosine".
    """
    if update < warmup:
        return (update + 1) / warmup
    if decay == "constant":
        return 1.0
    remaining = max(0.0, (total - update) / max(1, total - warmup))
    return (1 - math.cos(math.pi * remaining)) / 2 if decay == "cosine" else remaining


PART = 1 << 28
"""Maximum number of weights that are updated at once if some have 16 bits, unless one parameter has more. The float32
copies of their gradients take 1 GiB."""


class GradientError(UserError):
    """The norm of a gradient is not finite."""


class Optimizer:
    """AdamW with gradient clipping by global norm, for parameters with `requires_grad`.

    For 16-bit weights, the optimizer updates float32 copies (master weights) and rounds them to the 16-bit weights
    after each step. Without master weights, most updates would be lost, because with the small learning rates of
    reinforcement learning they are smaller than the rounding errors of bfloat16.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], betas: tuple[float, float], weight_decay: float
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().clone() for p in self.parameters]
        # On a CPU, the fused kernel is about three times as fast as the default. It assumes that gradients have the
        # strides of their parameters, which autograd ensures.
        fused = all(master.device.type == "cpu" for master in self.masters) or None
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, betas=betas, weight_decay=weight_decay, fused=fused)

    def step(self, lr: float, max_grad_norm: float) -> float:
        """Clip the gradient, update the weights, and clear the gradient.

        Args:
            lr: learning rate of this update.
            max_grad_norm: maximum global norm of the gradient; 0 turns clipping off.
        Returns:
            The global norm of the gradient before clipping.
        Raises:
            GradientError: if the norm of the gradient is not finite. In this case the weights are not changed.
        """
        limit = max_grad_norm or float("inf")
        narrow = any(master is not p for p, master in zip(self.parameters, self.masters, strict=True))
        norm = _global_norm(self.parameters) if narrow else torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        total = float(full(norm))
        if not total < float("inf"):
            raise GradientError(f"the gradient's norm is {total}")
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if narrow:
            self._step_in_parts((limit / (norm + 1e-6)).clamp(max=1.0))
        else:
            self.adamw.step()
        self.clear_gradients()
        return total

    def _step_in_parts(self, factor: torch.Tensor) -> None:
        """Update the weights with gradients multiplied by a factor.

        AdamW updates the masters that have a gradient. So only some of them have one at a time, which limits the memory
        of the float32 copies of the gradients.
        """
        grads = [parameter.grad for parameter in self.parameters]
        self.clear_gradients()
        for part in self._parts():
            for i in part:
                grad, grads[i] = grads[i], None
                self.masters[i].grad = None if grad is None else grad.float().mul_(factor.to(grad.device))
            self.adamw.step()
            for i in part:
                parameter, master = self.parameters[i], self.masters[i]
                if master is not parameter and master.grad is not None:
                    parameter.data.copy_(master)
                master.grad = None

    def _parts(self) -> Iterator[list[int]]:
        """Yield the indices of the parameters, in parts of at most `PART` weights or one parameter."""
        part: list[int] = []
        size = 0
        for i, parameter in enumerate(self.parameters):
            if part and size + parameter.numel() > PART:
                yield part
                part, size = [], 0
            part.append(i)
            size += parameter.numel()
        if part:
            yield part

    def clear_gradients(self) -> None:
        """Remove the gradients of the parameters."""
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return {"adamw": state of AdamW, "masters": list of the master weights}."""
        masters = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        return {"adamw": self.adamw.state_dict(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `state_dict` returned, also into sharded parameters.

        A state that was saved without the fused kernel goes on without it, so that a resumed run has the same bits.
        """
        moments = {
            number: {name: like(tensor, self.masters[number]) for name, tensor in of_one.items()}
            for number, of_one in state["adamw"]["state"].items()
        }
        self.adamw.load_state_dict({**state["adamw"], "state": moments})
        masters = [m for m, p in zip(self.masters, self.parameters, strict=True) if m is not p]
        for master, saved in zip(masters, state["masters"], strict=True):
            master.copy_(like(saved, master))

    def tensors(self, names: Sequence[str], present: Callable[[str], bool] | None = None) -> dict[str, torch.Tensor]:
        """Return the tensors of the state by name, which share their memory with the state.

        Args:
            names: name of each parameter.
            present: whether a tensor is needed, by name; those that are needed and do not exist are created. None
                means those that exist.
        Returns:
            `NAME/step`, `NAME/exp_avg` and `NAME/exp_avg_sq` of each parameter that has been updated, and
            `NAME/master` of 16-bit weights.
        """
        tensors = {}
        for name, parameter, master in zip(names, self.parameters, self.masters, strict=True):
            if master is not parameter:
                tensors[f"{name}/master"] = master
            moments = self.adamw.state.get(master, {})
            if present is not None and present(f"{name}/step") and not moments:
                moments = {"step": torch.tensor(0.0)}
                moments |= {moment: torch.zeros_like(master.detach()) for moment in ("exp_avg", "exp_avg_sq")}
                self.adamw.state[master] = moments
            tensors |= {f"{name}/{moment}": tensor for moment, tensor in moments.items()}
        return tensors


def _global_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients together, computed in float32 with a copy of one gradient at a time."""
    norms = [torch.linalg.vector_norm(p.grad.float()) for p in parameters if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)
