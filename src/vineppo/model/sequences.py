"""Give token sequences to a model, padded or packed, with the places of the tokens that are trained.

Letters in shapes: B sequences; a model gets X rows of Y tokens (the padded sequences, or one packed row); N trained
tokens; A alternatives; H numbers of a hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from vineppo.model.batch import micro_batches, pad
from vineppo.model.packing import Packing, pack, packed_batches, packed_mode
from vineppo.types import Alternative


@dataclass(frozen=True)
class Sequences:
    """The input of a model, and the trained tokens of B sequences in the order of the sequences."""

    token_ids: torch.Tensor
    """Shape (X, Y), int64."""
    before: torch.Tensor
    """Index of the token before each trained token, whose logits are those of the trained token, in the rows one after
    another. Shape (N,), int64."""
    targets: torch.Tensor
    """Token ids of the trained tokens, shape (N,), int64."""
    places: torch.Tensor
    """Index of the trained token that each alternative replaces, shape (A,), int64."""
    alternatives: torch.Tensor
    """Token ids of the alternatives, shape (A,), int64."""
    packing: Packing | None
    """None for padded sequences."""

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the call of a model. Packed sequences need the context `mode`, too."""
        if self.packing is None:
            return {"input_ids": self.token_ids, "use_cache": False}
        positions = self.packing.position_ids
        return {"input_ids": self.token_ids, "position_ids": positions, "packing": self.packing, "use_cache": False}

    def at_trained(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden states before the trained tokens, shape (N, H), from all hidden states (X, Y, H)."""
        # The gradient of F.embedding is faster than that of an indexed tensor.
        return F.embedding(self.before, hidden.flatten(0, 1))


def mode(model: Any, packed: bool) -> contextlib.AbstractContextManager[None]:
    """Context manager for the forward and backward passes of a model with packed, or else with padded sequences."""
    return packed_mode(model) if packed else contextlib.nullcontext()


def needed_tokens(token_ids: Sequence[int], loss_mask: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens of a sequence before its last trained token, at least one. Later tokens change no logits.

    The result is a tuple, because packing compares sequences, and a credit function may return lists or arrays.
    """
    last = next((i for i in reversed(range(len(loss_mask))) if loss_mask[i]), 0)
    return tuple(token_ids[: max(1, last)])


def divide(
    token_ids: Sequence[Sequence[int]], loss_masks: Sequence[Sequence[int]], max_tokens: int, packed: bool
) -> list[list[int]]:
    """Divide sequences into micro-batches of at most `max_tokens` packed tokens, or padded tokens.

    Returns:
        One list per micro-batch, with the indices of its sequences. Every index occurs exactly once.
    """
    if not packed:
        return micro_batches([len(ids) for ids in token_ids], max_tokens)
    needed = [needed_tokens(ids, mask) for ids, mask in zip(token_ids, loss_masks, strict=True)]
    return packed_batches(needed, max_tokens)


def build_sequences(
    token_ids: Sequence[Sequence[int]],
    loss_masks: Sequence[Sequence[int]],
    alternatives: Sequence[Sequence[Alternative]],
    packed: bool,
    device: torch.device,
) -> Sequences:
    """Build the input of a model.

    Args:
        token_ids: the token ids of each of the B sequences.
        loss_masks: 1 for the trained tokens of each sequence, 0 for the others. The first entry is 0.
        alternatives: the alternatives of each sequence, whose positions count its trained tokens.
        packed: whether the sequences are packed; otherwise they are padded.
    """
    trained = [np.flatnonzero(np.array(mask)) for mask in loss_masks]
    if packed:
        packing = pack([needed_tokens(*pair) for pair in zip(token_ids, loss_masks, strict=True)], device)
        ids, places = packing.token_ids, [path[at - 1] for path, at in zip(packing.paths, trained, strict=True)]
    else:
        packing, ids = None, pad(token_ids, torch.int64, device)
        places = [number * ids.shape[1] + at - 1 for number, at in enumerate(trained)]
    targets = [np.array(row)[at] for row, at in zip(token_ids, trained, strict=True)]
    offsets = accumulate(map(len, trained), initial=0)
    others = [(start + a.position, a.token_id) for start, row in zip(offsets, alternatives, strict=False) for a in row]
    return Sequences(
        token_ids=ids,
        before=torch.from_numpy(np.concatenate(places)).to(device),
        targets=torch.from_numpy(np.concatenate(targets)).to(device),
        places=torch.tensor([place for place, _ in others], dtype=torch.int64, device=device),
        alternatives=torch.tensor([token for _, token in others], dtype=torch.int64, device=device),
        packing=packing,
    )
