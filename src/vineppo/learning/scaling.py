"""Scaling of token advantages over an iteration, and penalties summed to the end of a response."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from vineppo.types import TrainingSample


def scale_advantages(
    rows: Sequence[Sequence[float]], scaling: str, weights: Sequence[Sequence[float]] | None = None
) -> list[list[float]]:
    """Scale all token advantages of an iteration together, so that batches and workers do not affect the result.

    Args:
        rows: one list of token advantages per response (response tokens only), ragged.
        scaling: `none`; `std` divides by the standard deviation (about the mean); `whiten` also subtracts the mean,
            which makes zero advantages non-zero.
        weights: weights of the tokens in mean and deviation, shaped like `rows`; None means 1 for all.
    Returns:
        Scaled advantages, shaped like `rows`. If all advantages are equal, they are not divided.
    """
    shift, divisor = shift_and_divisor(rows, scaling, weights)
    return [[(a - shift) / divisor for a in row] for row in rows]


def shift_and_divisor(
    rows: Sequence[Sequence[float]], scaling: str, weights: Sequence[Sequence[float]] | None = None
) -> tuple[float, float]:
    """Return (shift, divisor) of `scale_advantages`: the scaled advantage is (advantage - shift) / divisor."""
    flat = [a for row in rows for a in row]
    counts = [1.0] * len(flat) if weights is None else [w for row in weights for w in row]
    total = math.fsum(counts)
    if scaling == "none" or not total:
        return 0.0, 1.0
    mean = math.fsum(w * a for w, a in zip(counts, flat, strict=True)) / total
    std = math.sqrt(math.fsum(w * (a - mean) ** 2 for w, a in zip(counts, flat, strict=True)) / total)
    return (mean if scaling == "whiten" else 0.0), (std if std > 1e-8 else 1.0)


def penalty_to_go(penalties_T: Sequence[float], later: float = 0.0) -> list[float]:
    """Return the sum of penalties from each token to the end of its response, shape (T,).

    Args:
        later: sum of the penalties after the last of these tokens.
    """
    out, total = [0.0] * len(penalties_T), later
    for t in reversed(range(len(penalties_T))):
        total += penalties_T[t]
        out[t] = total
    return out


def penalties_to_go(samples: Sequence[TrainingSample], penalties: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return `penalty_to_go` of the trained tokens of every sample, ragged (B, N).

    If the trained tokens of other samples start where a sample ends, as for continuations of a shared prefix, the
    weighted mean of their penalties is added to the sample's. Otherwise nothing is added.
    """
    followers: dict[tuple[int, ...], list[tuple[int, int, float]]] = defaultdict(list)
    for index, sample in enumerate(samples):
        positions = [position for position, trained in enumerate(sample.loss_mask) if trained]
        weighted = ((n, weight) for n, weight in enumerate(sample.trained_weights) if weight)
        first, weight = next(weighted, (-1, 0.0))
        if weight:
            followers[sample.token_ids[: positions[first]]].append((index, first, weight))
    out: list[list[float]] = [[] for _ in samples]
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].token_ids), reverse=True):
        continuations = [(weight, out[i][first]) for i, first, weight in followers.get(samples[index].token_ids, ())]
        total = sum(weight for weight, _ in continuations)
        later = sum(weight * penalty for weight, penalty in continuations) / total if continuations else 0.0
        out[index] = penalty_to_go(penalties[index], later)
    return out
