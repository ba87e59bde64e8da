"""Scaling of token advantages over an iteration, and per-token penalties as credit. Pure mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence


def scale_advantages(rows: Sequence[Sequence[float]], scaling: str) -> list[list[float]]:
    """Scale all token advantages of an iteration together, so that batch layout and worker count cannot matter.

    Args:
        rows: one list of token advantages per response (response tokens only), ragged.
        scaling: `none`; `std` divides by the standard deviation (about the mean); `whiten` also subtracts the mean,
            which makes zero advantages non-zero.
    Returns:
        The same shapes. Without any spread (all advantages equal) nothing is divided.
    """
    shift, divisor = shift_and_divisor(rows, scaling)
    return [[(a - shift) / divisor for a in row] for row in rows]


def shift_and_divisor(rows: Sequence[Sequence[float]], scaling: str) -> tuple[float, float]:
    """What `scale_advantages` subtracts from every advantage, and what it then divides by; (0, 1) changes nothing."""
    flat = [a for row in rows for a in row]
    if scaling == "none" or not flat:
        return 0.0, 1.0
    mean = math.fsum(flat) / len(flat)
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in flat) / len(flat))
    return (mean if scaling == "whiten" else 0.0), (std if std > 1e-8 else 1.0)


def penalty_to_go(penalties_T: Sequence[float]) -> list[float]:
    """Sum of the penalties from each token to the end of its response, shape (T,): the credit of a per-token cost."""
    out, total = [0.0] * len(penalties_T), 0.0
    for t in reversed(range(len(penalties_T))):
        total += penalties_T[t]
        out[t] = total
    return out
