"""Updates that raise the probability of given responses, for `vineppo sft` and `vineppo offline`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vineppo.learning.optim import GradientError, Optimizer, lr_factor
from vineppo.model.batch import micro_batches, pad
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.types import UserError

Demonstration = tuple[tuple[int, ...], int]
"""(token ids of the prompt, the response and the token that ends it; number of prompt tokens)."""


def accumulate(policy: Policy, batch: Sequence[Demonstration], max_tokens: int) -> tuple[float, int]:
    """Compute the gradient of the mean loss per token of a batch by backpropagation, in micro-batches.

    Args:
        max_tokens: maximum number of padded tokens of a micro-batch.
    Returns:
        (loss in nats per token, number of trained tokens).
    """
    total = sum(len(ids) - start for ids, start in batch)
    loss_sum = 0.0
    for group in micro_batches([len(ids) for ids, _ in batch], max_tokens):
        items = [batch[i] for i in group]
        token_ids, mask = padded(items, policy.device)
        logprobs, _ = token_logprobs(policy.model, token_ids, mask, 1.0)
        loss = -logprobs.sum() / total
        loss.backward()
        loss_sum += loss.item()
    return loss_sum, total


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
