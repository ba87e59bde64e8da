"""Combine sequences of different lengths into padded tensors, and divide sequences into micro-batches.

Padding is always on the right, so that with causal attention no token attends to padding. Letters in shapes: B
sequences, T tokens of the longest sequence, A alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vineppo.types import TrainingSample


@dataclass(frozen=True)
class Batch:
    """B training samples as tensors. The meaning of the fields is that in `types.TrainingSample`.

    At padding, all entries are 0 and `loss_mask` is False. `returns` is None if any sample has no returns, and `values`
    is None if any sample has no values. An alternative is a token that is trained in place of a token of a sequence.
    """

    token_ids: torch.Tensor  # (B, T) int64
    loss_mask: torch.Tensor  # (B, T) bool
    sampler_logprobs: torch.Tensor  # (B, T) float32
    advantages: torch.Tensor  # (B, T) float32
    returns: torch.Tensor | None  # (B, T) float32
    values: torch.Tensor | None  # (B, T) float32
    weights: torch.Tensor  # (B, T) float32, 0 for tokens with loss_mask False
    # Index of the token that the alternative replaces, among all trained tokens of the batch (`loss_mask` True).
    alternative_places: torch.Tensor  # (A,) int64
    alternative_ids: torch.Tensor  # (A,) int64
    alternative_advantages: torch.Tensor  # (A,) float32


def pad(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a tensor of shape (B, T) that contains the B rows, padded on the right with zeros."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    filled = torch.arange(int(lengths.max())) < lengths[:, None]  # (B, T)
    out = torch.zeros(filled.shape, dtype=dtype)  # (B, T)
    # One tensor of all entries is much faster than one tensor per row.
    out[filled] = torch.tensor([entry for row in rows for entry in row], dtype=dtype)
    return out.to(device)


def collate(samples: Sequence[TrainingSample], device: torch.device | str = "cpu") -> Batch:
    """Combine training samples into one padded batch."""

    def optional(rows: Sequence[Sequence[float] | None]) -> torch.Tensor | None:
        """Return the padded rows, or None if a sample has no row."""
        present = [row for row in rows if row is not None]
        return pad(present, torch.float32, device) if len(present) == len(rows) else None

    # The position of an alternative is an index into the trained tokens of its sample. Its place is an index into the
    # trained tokens of the whole batch.
    offsets = accumulate((sum(s.loss_mask) for s in samples), initial=0)
    alternatives = [(start + a.position, a) for start, s in zip(offsets, samples, strict=False) for a in s.alternatives]
    return Batch(
        token_ids=pad([s.token_ids for s in samples], torch.int64, device),
        loss_mask=pad([s.loss_mask for s in samples], torch.bool, device),
        sampler_logprobs=pad([s.sampler_logprobs for s in samples], torch.float32, device),
        advantages=pad([s.advantages for s in samples], torch.float32, device),
        returns=optional([s.returns for s in samples]),
        values=optional([s.values for s in samples]),
        weights=pad([_weights(s) for s in samples], torch.float32, device),
        alternative_places=torch.tensor([place for place, _ in alternatives], dtype=torch.int64, device=device),
        alternative_ids=torch.tensor([a.token_id for _, a in alternatives], dtype=torch.int64, device=device),
        alternative_advantages=torch.tensor([a.advantage for _, a in alternatives], dtype=torch.float32, device=device),
    )


def _weights(sample: TrainingSample) -> Sequence[float]:
    """Return the weight of every token of the sequence, shape (T,). Tokens that are not trained have weight 0."""
    if sample.weights is None:
        return sample.loss_mask
    return [weight * trained for weight, trained in zip(sample.weights, sample.loss_mask, strict=True)]


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Divide sequences into micro-batches of at most `max_tokens` tokens, including padding.

    Sequences of similar lengths are put together. A sequence longer than `max_tokens` is alone in its micro-batch.

    Args:
        lengths: number of tokens of each sequence.
    Returns:
        One list per micro-batch, with the indices of its sequences. Every index occurs exactly once.
    """
    # In this order, a new sequence is the longest of its micro-batch, so the others are padded to its length.
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    groups: list[list[int]] = []
    for index in order:
        fits = groups and lengths[index] * (len(groups[-1]) + 1) <= max_tokens
        if fits:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
