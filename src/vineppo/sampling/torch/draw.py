"""Draw tokens from logits by inverting the cumulative distribution, with one random number per row.

Letters in shapes: B rows, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

_BLOCK = 256
"""Block size of `invert`. If the vocabulary is larger, `invert` draws a token in two stages: first the block of this
many tokens that contains the token, then the token in the block."""
_LOGITS_AT_ONCE = {"cpu": 1 << 19}
"""Maximum number of logits that `draw` processes at once, by type of device. On a CPU they fit into its cache as
float32 numbers (2 MiB)."""
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 28
"""The same for other devices, where a call takes longer than the work in it. The float32 numbers take 1 GiB."""


def draw(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the cumulative distribution, with one random number per row.

    The work is done on the device of the logits, without waiting for it.

    Args:
        logits: next-token logits, shape (B, V).
        temperature: sampling temperature; 0 selects the most likely token.
        uniform: random numbers in [0, 1), float64, on the device of the logits, shape (B,).
    Returns:
        (token ids, log-probabilities), each of shape (B,), int64 and float32. The log-probabilities are in nats, under
        the distribution that the tokens were drawn from; they are 0 at temperature 0.
    """
    if temperature == 0:
        best = logits.argmax(-1)  # (B,)
        return best, torch.zeros(len(best), device=logits.device)
    limit = _LOGITS_AT_ONCE.get(logits.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    size = max(1, min(len(logits), limit // logits.shape[1]))
    # The rows are divided into parts of `size` rows. All parts use the same memory, because allocating memory takes
    # longer than the computation in it.
    weights = torch.empty(size, logits.shape[1], device=logits.device)
    parts = [
        _draw(logits[start : start + size], temperature, uniform[start : start + size], weights)
        for start in range(0, len(logits), size)
    ]
    return torch.cat([ids for ids, _ in parts]), torch.cat([logprobs for _, logprobs in parts])


def _draw(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor, memory: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the work of `draw` for some of the rows, at a temperature above 0.

    Args:
        memory: float32 tensor with at least as many rows as `logits`, and V columns. Its content is overwritten.
    """
    weights = memory[: len(logits)].copy_(logits)  # (B, V), float32
    if temperature != 1:
        weights /= temperature
    highest = weights.amax(-1, keepdim=True)  # (B, 1)
    weights.sub_(highest).exp_()
    drawn, total = invert(weights, uniform[:, None])
    # The log-probability is computed from the logit and not from the weight, because the weight of a very unlikely
    # token is so small that it has lost precision.
    logprobs = (logits.gather(1, drawn).float() / temperature - highest).double() - total.log()  # (B, 1)
    return drawn.squeeze(1), logprobs.squeeze(1).float()


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one index per row, with probabilities proportional to the weights of the row.

    The result is the first index at which the cumulative sum of the weights exceeds `uniform` times the sum of the row.
    A long row is divided into blocks. The sums of the blocks determine the block that contains the index, and then the
    index is searched in this block. This avoids a cumulative sum over the whole row, which is slow for large
    vocabularies.

    Args:
        weights: numbers of at least 0, not all 0 in a row, shape (B, V).
        uniform: random numbers in [0, 1), float64, shape (B, 1).
    Returns:
        (indices, sums of the rows in float64), each of shape (B, 1). The weight at each returned index is above 0.
    """
    B, V = weights.shape
    if V <= _BLOCK:
        sums = weights.cumsum(-1, dtype=torch.float64)  # (B, V)
        return _first_above(sums, uniform * sums[:, -1:]), sums[:, -1:]
    padded = F.pad(weights, (0, -V % _BLOCK)) if V % _BLOCK else weights
    blocks = padded.view(B, -1, _BLOCK)  # (B, number of blocks, _BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, number of blocks)
    level = uniform * sums[:, -1:]  # (B, 1)
    block = _first_above(sums, level)  # (B, 1)
    before = F.pad(sums, (1, 0)).gather(1, block)  # (B, 1): sum of all weights before the block
    # Cumulative sums within the block, shape (B, _BLOCK).
    inside = blocks.gather(1, block[:, :, None].expand(B, 1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(inside, level - before), sums[:, -1:]


def _first_above(sums: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Return for each row the index of the first cumulative sum above the row's level, shape (B, 1).

    Args:
        sums: cumulative sums of n weights of at least 0, shape (B, n). The weight at the returned index is never 0.
        level: one number per row, at least 0 and (except for rounding) below the last cumulative sum, shape (B, 1).
    """
    total = sums[:, -1:]
    # Rounding may raise a level to the total or above it. No cumulative sum is above the total, so the level is then
    # lowered to the largest number below the total.
    level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, level, right=True).clamp_max(sums.shape[1] - 1)
