"""Logits and log-probabilities of given tokens, computed at selected positions only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def selected_logits(model: Any, token_ids: torch.Tensor, select: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return next-token logits at the selected positions, shape (N, V), in row-major order of `select`.

    Positions are selected before the output layer, so that the V logits of other positions are never computed.
    Operations that the model applies to its logits (scaling, soft caps) are still applied.

    Args:
        token_ids: right-padded, shape (B, T).
        select: positions whose next-token logits are wanted, bool, shape (B, T).
        options: passed to the model, for example for the tree attention of the sampler.
    """
    with _positions_before_head(model, select):
        return model(input_ids=token_ids, use_cache=False, **options).logits[0]  # (N, V)


@contextlib.contextmanager
def _positions_before_head(model: Any, select: torch.Tensor) -> Iterator[None]:
    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][select].unsqueeze(0),)  # (1, N, H)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def token_logprobs(
    model: Any,
    token_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    temperature: float,
    with_entropy: bool = False,
    alternatives: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log-probabilities of the masked tokens under the distribution of sampling at `temperature`.

    Args:
        token_ids: right-padded, shape (B, T).
        loss_mask: tokens to evaluate, bool, shape (B, T); the first column must be False.
        alternatives: (places, ids), both (A,): other tokens to evaluate, and the index of the masked token that each
            of them replaces. They need no additional forward pass.
    Returns:
        (logprobs, entropies), both (N,) in row-major order of the mask, in nats, float32; entropies is None unless
        `with_entropy`. With alternatives, logprobs is (N + A,) and ends with those of the alternatives.
    """
    select = F.pad(loss_mask[:, 1:], (0, 1))  # (B, T): the position before each masked token
    logits = selected_logits(model, token_ids, select).float()  # (N, V)
    if temperature != 1:
        logits = logits / temperature
    distribution = logits.log_softmax(-1)  # (N, V)
    targets = token_ids[loss_mask]  # (N,)
    entropies = -(distribution.exp() * distribution).sum(-1) if with_entropy else None  # (N,)
    logprobs = distribution.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    if alternatives is not None:
        logprobs = torch.cat([logprobs, distribution[alternatives]])  # (N + A,)
    return logprobs, entropies
