"""Compute logits and log-probabilities at selected positions only, for the learner and the sampler.

Letters in shapes: B sequences, T tokens of the longest sequence, N selected positions, V tokens in the vocabulary, A
alternatives (tokens that are evaluated in place of selected tokens).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from vineppo.model.output import chunked_scores, output_of
from vineppo.model.sequences import Sequences

CHUNKED_FROM = 1 << 24
"""Number of logits from which `sequence_scores` computes them in chunks. With fewer logits, chunks save little memory
and take more time."""


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
    with _before_head(model, lambda hidden: hidden[select].unsqueeze(0)):
        return model(input_ids=token_ids, use_cache=False, **options).logits[0]  # (N, V)


@contextlib.contextmanager
def _before_head(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Context manager in which a function changes the hidden states that the output layer of the model receives.

    Args:
        change: returns the states for the output layer, (1, N, H), from those of all tokens, (B, T, H).
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _layer, inputs: (change(inputs[0]),))
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of N trained tokens and of A alternatives, and facts about their distributions, in nats."""

    logprobs: torch.Tensor
    """Those of the trained tokens, then those of the alternatives, shape (N + A,), float32."""
    entropies: torch.Tensor | None
    """Entropy of each next-token distribution, shape (N,); None if it was not computed."""
    variances: torch.Tensor | None
    """Variance of the log-probability of a token drawn from each distribution, shape (N,), without gradients; None if
    it was not computed."""


def sequence_scores(
    model: Any,
    sequences: Sequences,
    temperature: float,
    *,
    entropies: bool = False,
    variances: bool = False,
    chunked: bool = True,
) -> TokenScores:
    """Compute the log-probabilities of the trained tokens and of the alternatives of sequences.

    If the logits are many and the output layer allows it (`output_of`), they are computed in chunks, so that the memory
    does not grow with N * V.

    Args:
        sequences: the sequences. If they are packed, the model must be in `packed_mode`.
        temperature: the logits are divided by this number.
        entropies: whether to compute the entropies, with gradients.
        variances: whether to compute the variances. The entropies are then computed too, without gradients unless
            `entropies` is true.
        chunked: whether the logits may be computed in chunks.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    many = chunked and len(sequences.targets) * vocabulary >= CHUNKED_FROM
    output = output_of(model, sequences.packing is not None) if many else None
    others = (sequences.places, sequences.alternatives)
    if output is not None:
        hidden: list[torch.Tensor] = []

        def keep(states: torch.Tensor) -> torch.Tensor:
            """Keep the hidden states before the trained tokens, and give those of one token to the output layer."""
            hidden.append(sequences.at_trained(states))
            return states[:1, :1]

        with _before_head(model, keep):
            model(**sequences.inputs)
        # In a sharded model, the layer has its whole weight only from the forward pass on.
        output = output_of(model, sequences.packing is not None) or output
        return TokenScores(*chunked_scores(output, hidden[0], sequences.targets, others, temperature))
    with _before_head(model, lambda states: sequences.at_trained(states)[None]):
        logits = model(**sequences.inputs).logits[0]  # (N, V)
    distribution = _distributions(logits, temperature)  # (N, V)
    logprobs = distribution.gather(-1, sequences.targets[:, None]).squeeze(-1)  # (N,)
    with contextlib.nullcontext() if entropies else torch.no_grad():
        found = entropies_of(distribution) if entropies or variances else None
    with torch.no_grad():
        spread = logprob_variances(distribution, found) if variances and found is not None else None
    return TokenScores(torch.cat([logprobs, distribution[others]]), found, spread)


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
    distribution = token_distributions(model, token_ids, loss_mask, temperature)  # (N, V)
    entropies = entropies_of(distribution) if with_entropy else None  # (N,)
    return logprobs_of(distribution, token_ids, loss_mask, alternatives), entropies


def token_distributions(
    model: Any, token_ids: torch.Tensor, loss_mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Compute the log-probabilities of the whole vocabulary at each of the N tokens selected by `loss_mask`.

    See `token_logprobs` for the arguments.

    Returns:
        Log-probabilities in nats, float32, shape (N, V), ordered by row and then by position.
    """
    select = F.pad(loss_mask[:, 1:], (0, 1))  # (B, T): the position before each selected token
    return _distributions(selected_logits(model, token_ids, select), temperature)


def _distributions(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probabilities of the whole vocabulary in float32, shape (N, V), from logits of this shape."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    return logits.log_softmax(-1)


def logprobs_of(
    distribution: torch.Tensor,
    token_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    alternatives: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the log-probabilities (N + A,) of the selected tokens and of A alternatives. See `token_logprobs`.

    Args:
        distribution: the result of `token_distributions`, shape (N, V).
    """
    logprobs = distribution.gather(-1, token_ids[loss_mask][:, None]).squeeze(-1)  # (N,)
    return logprobs if alternatives is None else torch.cat([logprobs, distribution[alternatives]])


def entropies_of(distribution: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each distribution in nats, shape (N,), from log-probabilities of shape (N, V)."""
    return -(distribution.exp() * distribution).sum(-1)


def logprob_variances(distribution: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
    """Return the variance of the log-probability of a token that is drawn from each distribution, shape (N,).

    Args:
        distribution: log-probabilities in nats, shape (N, V).
        entropies: entropy of each distribution, shape (N,). The expected log-probability is minus the entropy.
    """
    return (distribution.exp() * (distribution + entropies[:, None]).square()).sum(-1)
