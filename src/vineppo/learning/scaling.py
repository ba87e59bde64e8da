"""Scale token advantages, and compute the KL penalties that reduce them, for the learner.

The *penalty-to-go* of a token is the sum of the penalties of this token and of all later tokens of the response. A
*trained token* is a token of a training sample with `loss_mask` 1. Letter in shapes: T tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from vineppo.types import TrainingSample


def scale_advantages(
    rows: Sequence[Sequence[float]], scaling: str, weights: Sequence[Sequence[float]] | None = None
) -> list[list[float]]:
    """Scale token advantages with the mean and the standard deviation of all advantages of an iteration.

    The statistics are those of the whole iteration, so that the result does not depend on the minibatch size.

    Args:
        rows: one list per sample with the advantages of its trained tokens. The lists can have different lengths.
        scaling: `none` changes nothing, `std` divides by the standard deviation, and `whiten` subtracts the mean and
            divides by the standard deviation. `whiten` can make advantages of 0 non-zero.
        weights: weight of each token in the mean and the standard deviation, in lists like `rows`; None weights all
            tokens equally. The mean is not subtracted from an advantage with weight 0.
    Returns:
        The scaled advantages, in lists like `rows`. If all advantages are equal, they are not divided.
    """
    shift, divisor = shift_and_divisor(rows, scaling, weights)
    if weights is None:
        return [[(a - shift) / divisor for a in row] for row in rows]
    return [
        [(a - shift if w else a) / divisor for w, a in zip(ws, row, strict=True)]
        for ws, row in zip(weights, rows, strict=True)
    ]


def shift_and_divisor(
    rows: Sequence[Sequence[float]], scaling: str, weights: Sequence[Sequence[float]] | None = None
) -> tuple[float, float]:
    """Return (shift, divisor), such that the scaled advantage is (advantage - shift) / divisor.

    The arguments are those of `scale_advantages`.
    """
    flat = [a for row in rows for a in row]
    counts = [1.0] * len(flat) if weights is None else [w for row in weights for w in row]
    total = math.fsum(counts)
    if scaling == "none" or not total:
        return 0.0, 1.0
    mean = math.fsum(w * a for w, a in zip(counts, flat, strict=True)) / total
    std = math.sqrt(math.fsum(w * (a - mean) ** 2 for w, a in zip(counts, flat, strict=True)) / total)
    return (mean if scaling == "whiten" else 0.0), (std if std > 1e-8 else 1.0)


def penalty_to_go(penalties_T: Sequence[float], later: float = 0.0) -> list[float]:
    """Return the penalty-to-go of each of T consecutive tokens, shape (T,).

    Args:
        penalties_T: penalty of each token, shape (T,).
        later: sum of the penalties after the last of these tokens.
    """
    out, total = [0.0] * len(penalties_T), later
    for t in reversed(range(len(penalties_T))):
        total += penalties_T[t]
        out[t] = total
    return out


def penalties_to_go(samples: Sequence[TrainingSample], penalties: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return one list per sample with the penalties-to-go of its trained tokens.

    A sample can be a prefix that other samples continue. A sample continues the prefix if the tokens before its *first
    token* (the first trained token with a weight above 0) are exactly the tokens of the prefix. In this case, every
    trained token of the prefix also gets the penalties after the end of the prefix: the mean of the penalties-to-go of
    the first tokens of all continuing samples, weighted with the weights of these first tokens.

    Args:
        samples: the training samples of an iteration.
        penalties: one list per sample with the penalties of its trained tokens.
    """
    # Token ids of a prefix -> (index of a sample that continues it, index of the sample's first token among its trained
    # tokens, weight of this token).
    followers: dict[tuple[int, ...], list[tuple[int, int, float]]] = defaultdict(list)
    for index, sample in enumerate(samples):
        positions = [position for position, trained in enumerate(sample.loss_mask) if trained]
        weighted = ((n, weight) for n, weight in enumerate(sample.trained_weights) if weight)
        first, weight = next(weighted, (-1, 0.0))
        if weight:
            followers[sample.token_ids[: positions[first]]].append((index, first, weight))
    # A sample is longer than the prefix that it continues. Longer samples come first, so the penalties-to-go of all
    # continuations are known when their prefix is reached.
    out: list[list[float]] = [[] for _ in samples]
    for index in sorted(range(len(samples)), key=lambda i: len(samples[i].token_ids), reverse=True):
        continuations = [(weight, out[i][first]) for i, first, weight in followers.get(samples[index].token_ids, ())]
        total = sum(weight for weight, _ in continuations)
        later = sum(weight * penalty for weight, penalty in continuations) / total if continuations else 0.0
        out[index] = penalty_to_go(penalties[index], later)
    return out
