"""Compute logits and log-probabilities at selected positions only, for the learner and the sampler.

Letters in shapes: B sequences, T tokens of the longest sequence, N selected positions, V tokens in the vocabulary, A
alternatives (tokens that are evaluated in place of selected tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def selected_logits(model: Any, token_ids: torch.Tensor, select: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return the next-token logits at the positions selected by `select`.

    The output layer computes only the logits of these positions. Operations that the model applies to its logits after
    this layer (scaling, soft caps) are still applied.

    Args:
        token_ids: B sequences, right-padded to T tokens, shape (B, T).
        select: True at the positions whose next-token logits are returned, bool, shape (B, T).
        options: further keyword arguments for the call of the model.
    Returns:
        Logits of shape (N, V), ordered by row and then by position.
    """
    with _positions_before_head(model, select):
        return model(input_ids=token_ids, use_cache=False, **options).logits[0]  # (N, V)


@contextlib.contextmanager
def _positions_before_head(model: Any, select: torch.Tensor) -> Iterator[None]:
    """Context manager in which the output layer of the model receives only the hidden states of selected positions.

    The logits of the model then have the shape (1, N, V).
    """

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
    """Compute the log-probabilities of the tokens selected by `loss_mask`, with the logits divided by `temperature`.

    Args:
        token_ids: B sequences, right-padded to T tokens, shape (B, T).
        loss_mask: True for the N selected tokens, bool, shape (B, T). The first column must be False, because no logits
            precede the first token.
        temperature: sampling temperature of the tokens.
        with_entropy: whether to compute the entropy of each next-token distribution, too.
        alternatives: (places, ids) of A alternatives, each of shape (A,), or None. Alternative a has the token id
            `ids[a]`, and is evaluated in place of the selected token with index `places[a]` among the N selected
            tokens. Alternatives need no additional forward pass.
    Returns:
        (logprobs, entropies) in nats, float32. The log-probabilities of the selected tokens come first, ordered by row
        and then by position, followed by those of the alternatives: shape (N,), or (N + A,) with alternatives. The
        entropies have the shape (N,); they are None unless `with_entropy` is true.
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
