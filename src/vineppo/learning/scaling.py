"""Scaling of token advantages over an iteration, and per-token penalties as credit. Pure mathematics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from vineppo.types import TrainingSample


def scale_advantages(
    rows: Sequence[Sequence[float]], scaling: str, weights: Sequence[Sequence[float]] | None = None
) -> list[list[float]]:
    """Scale all token advantages of an iteration together, so that batch layout and worker count cannot matter.

    Args:
        rows: one list of token advantages per response (response tokens only), ragged.
        scaling: `none`; `std` divides by the standard deviation (about the mean); `whiten` also subtracts the mean,
            which makes zero advantages non-zero.
        weights: of the tokens in mean and deviation, shaped like `rows`; None is 1 for all.
    Returns:
        The same shapes. Without any spread (all advantages equal) nothing is divided.
    """
    shift, divisor = shift_and_divisor(rows, scaling, weights)
    return [[(a - shift) / divisor for a in row] for row in rows]


def shift_and_divisor(
    rows: Sequence[Sequence[float]], scaling: str, weights: Sequence[Sequence[float]] | None = None
) -> tuple[float, float]:
    """What `scale_advantages` subtracts from every advantage, and what it then divides by; (0, 1) changes nothing."""
    flat = [a for row in rows for a in row]
    counts = [1.0] * len(flat) if weights is None else [w for row in weights for w in row]
    total = math.fsum(counts)
    if scaling == "none" or not total:
        return 0.0, 1.0
    mean = math.fsum(w * a for w, a in zip(counts, flat, strict=True)) / total
    std = math.sqrt(math.fsum(w * (a - mean) ** 2 for w, a in zip(counts, flat, strict=True)) / total)
    return (mean if scaling == "whiten" else 0.0), (std if std > 1e-8 else 1.0)


def penalty_to_go(penalties_T: Sequence[float], behind: float = 0.0) -> list[float]:
    """Sum of the penalties from each token to the end of its response, shape (T,): the credit of a per-token cost.

    Args:
        behind: penalties behind the last of these tokens.
    """
    out, total = [0.0] * len(penalties_T), behind
    for t in reversed(range(len(penalties_T))):
        total += penalties_T[t]
        out[t] = total
    return out


def penalties_to_go(samples: Sequence[TrainingSample], penalties: Sequence[Sequence[float]]) -> list[list[float]]:
    """`penalty_to_go` of every sample, over its trained tokens, ragged (B, N).

    Where other samples begin to train at the end of a sample, such as the continuations of a shared prefix, the
    penalties behind it are their weighted mean. Otherwise there are none.
    """
    followers: dict[tuple[int, ...], list[tuple[int, int, float]]] = defaultdict(list)
    for index, sample in enumerate(samples):
        places = [place for place, trained in enumerate(sample.loss_mask) if trained]
        counted = ((n, weight) for n, weight in enumerate(sample.trained_weights) if weight)
        first, weight = next(counted, (-1, 0.0))
        if weight:
            followers[sample.token_ids[: places[first]]].append((index, first, weight))
    out: list[list[float]] = [[] for _ in samples]
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].token_ids), reverse=True):
        after = [(weight, out[i][first]) for i, first, weight in followers.get(samples[index].token_ids, ())]
        total = sum(weight for weight, _ in after)
        behind = sum(weight * cost for weight, cost in after) / total if after else 0.0
        out[index] = penalty_to_go(penalties[index], behind)
    return out
