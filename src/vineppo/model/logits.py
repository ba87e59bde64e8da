"""Compute logits and log-probabilities at selected positions only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def selected_logits(model: Any, token_ids: torch.Tensor, select: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the next-token logits at the positions selected by `select`.

    Positions are selected before the output layer, so that the logits of other positions are never computed.
    Operations that the model applies to its logits (scaling, soft caps) are still applied.

    Args:
        token_ids: B sequences, right-padded to T tokens, shape (B, T).
        select: True at the positions whose next-token logits are returned, bool, shape (B, T).
        options: further arguments of the model, for example for the tree attention of the sampler.
    Returns:
        Logits of shape (N, V) for N selected positions and vocabulary size V, ordered by row and then by position.
    """
    with _positions_before_head(model, select):
        return model(input_ids=token_ids, use_cache=False, **options).logits[0]  # (N, V)


@contextlib.contextmanager
def _positions_before_head(model: Any, select: torch.Tensor) -> Iterator[None]:
    def keep(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][select].unsqueeze(0),)  # (1, N, H) with H the hidden size

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
    """Compute the log-probabilities of the tokens selected by `loss_mask`, when sampling at `temperature`.

    Args:
        token_ids: B sequences, right-padded to T tokens, shape (B, T).
        loss_mask: True for the N tokens to evaluate, bool, shape (B, T); the first column must be False.
        with_entropy: whether to compute the entropy of each distribution, too.
        alternatives: (places, ids), each of shape (A,), for A further tokens to evaluate. Each further token has the id
            `ids[a]` and replaces the selected token with index `places[a]`. The further tokens need no additional
            forward pass.
    Returns:
        (logprobs, entropies), in nats, float32. Both have shape (N,), ordered by row and then by position. With
        alternatives, logprobs has shape (N + A,), and the last A entries belong to the alternatives. Without
        `with_entropy`, entropies is None.
    """
    select = F.pad(loss_mask[:, 1:], (0, 1))  # (B, T): the position before each selected token
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
