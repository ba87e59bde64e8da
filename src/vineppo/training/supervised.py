"""Updates that raise the probability of given responses, for `vineppo sft` and `vineppo offline`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vineppo.learning.optim import GradientError, Optimizer, lr_factor
from vineppo.model.batch import micro_batches, pad
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.seeds import derive_seed
from vineppo.types import UserError

Demonstration = tuple[tuple[int, ...], int]
"""(token ids of the prompt, the response and the token that ends it; number of prompt tokens)."""


def accumulate(
    policy: Policy,
    batch: Sequence[Demonstration],
    max_tokens: int,
    temperature: float = 1.0,
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean",
) -> tuple[float, int]:
    """Compute the gradient of the cross-entropy of a batch by backpropagation, in micro-batches.

    Args:
        max_tokens: maximum number of padded tokens of a micro-batch.
        temperature: the logits are divided by this number.
        reduction: `token_mean`: mean over all trained tokens. `sequence_mean`: mean over the tokens of each
            demonstration, then mean over demonstrations.
    Returns:
        (loss in nats per token, number of trained tokens).
    """
    counts = [len(ids) - start for ids, start in batch]
    loss_sum = 0.0
    for group in micro_batches([len(ids) for ids, _ in batch], max_tokens):
        items = [batch[i] for i in group]
        token_ids, mask = padded(items, policy.device)
        logprobs, _ = token_logprobs(policy.model, token_ids, mask, temperature)
        if reduction == "token_mean":
            loss = -logprobs.sum() / sum(counts)
        else:
            parts = logprobs.split([counts[i] for i in group])
            loss = -torch.stack([part.mean() for part in parts]).sum() / len(batch)
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, sum(counts)


def padded(items: Sequence[Demonstration], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token ids, loss mask) of B sequences, each of shape (B, T). The mask is False in prompts and padding."""
    token_ids = pad([ids for ids, _ in items], torch.int64, device)  # (B, T)
    # The prompt is not trained.
    mask = pad([[0] * start + [1] * (len(ids) - start) for ids, start in items], torch.bool, device)  # (B, T)
    return token_ids, mask


def linear_step(optimizer: Optimizer, peak: float, update: int, warmup: int, total: int, max_grad_norm: float) -> float:
    """Make one optimizer step. The learning rate rises linearly in the warm-up, then falls linearly to 0.

    Args:
        peak: the setting `lr`, which is the learning rate at the end of the warm-up.
        update: number of the update, counted from 0.
        warmup: number of updates of the warm-up.
        total: number of updates after which the learning rate is 0.
        max_grad_norm: maximum global norm of the gradient; 0 turns clipping off.
    Returns:
        The global norm of the gradient before clipping.
    Raises:
        UserError: if the norm of the gradient is not finite.
    """
    try:
        return optimizer.step(peak * lr_factor(update, warmup, total, "linear"), max_grad_norm)
    except GradientError as error:
        raise UserError(
            f"update {update + 1}: {error}; lower lr, which is {peak:g}, or use model.dtype float32"
        ) from None


@dataclass
class Passes:
    """Passes over N examples with a new AdamW, each in a new random order, with a linear learning rate over all passes.

    An update uses `batch_size` examples; the last update of a pass has the rest. A random order depends only on
    `address` and the number of the pass.
    """

    optimizer: Optimizer
    count: int
    """N, the number of examples."""
    epochs: int
    """Number of passes after which the learning rate is 0."""
    batch_size: int
    lr: float
    """Peak learning rate."""
    warmup_fraction: float
    """Fraction of all updates in which the learning rate rises linearly."""
    max_grad_norm: float
    address: tuple[int | str, ...]
    """Values from which the seeds of the random orders are derived."""
    updates: int = 0
    """Number of updates so far."""

    @property
    def total(self) -> int:
        """Number of updates of all passes."""
        return self.epochs * -(-self.count // self.batch_size)

    def run(self, epoch: int, gradient: Callable[[Sequence[int]], float]) -> tuple[list[float], list[float]]:
        """Make the updates of one pass.

        Args:
            epoch: number of the pass, counted from 0.
            gradient: function that computes the gradient of the examples with these indices by backpropagation, and
                returns their loss.
        Returns:
            (loss of each update, gradient norm of each update before clipping).
        Raises:
            UserError: if the norm of a gradient is not finite.
        """
        order = list(range(self.count))
        random.Random(derive_seed(*self.address, "order", epoch)).shuffle(order)
        warmup, losses, norms = round(self.warmup_fraction * self.total), [], []
        for start in range(0, self.count, self.batch_size):
            losses.append(gradient(order[start : start + self.batch_size]))
            norms.append(linear_step(self.optimizer, self.lr, self.updates, warmup, self.total, self.max_grad_norm))
            self.updates += 1
        return losses, norms
