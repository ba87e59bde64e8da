"""How often the PyTorch sampler waits for the device, and how it computes a step of decoding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_CHECK_EVERY = 8
"""`check_every` on a GPU. A check waits for the device, and then the device waits for the next step."""
_FEW_ROWS = 32
"""`few_rows` on a GPU, where a step takes about the same time for any smaller number of rows."""


@dataclass(frozen=True)
class Pace:
    """When finished rows of a wave are looked for and removed, and whether steps are captured as graphs.

    A finished row draws tokens until it is removed; those after its end are dropped. `check_every`, `fixed` and `graph`
    change no result, except that `fixed` changes the rounding of attention. The other three fields decide how many rows
    are in a batch, so they can change results by rounding.
    """

    check_every: int = 1
    """Number of tokens per row between two checks of which rows are finished."""
    remove_every: int = 1
    """Finished rows are removed only after a multiple of this number of tokens, a multiple of `check_every`. So all
    divisors of it, as `check_every`, give the same batches."""
    keep_share: float = 0.85
    """Finished rows are removed when at most this share of the rows in the tree is unfinished."""
    few_rows: int = 0
    """With at most this many rows in the tree, none are removed."""
    fixed: bool = False
    """Whether the tensors of a step keep their addresses and sizes from one token to the next."""
    graph: bool = False
    """Whether steps are captured as CUDA graphs and replayed. It needs `fixed`."""

    def __post_init__(self) -> None:
        assert self.remove_every % self.check_every == 0, "remove_every must be a multiple of check_every"
        assert self.fixed or not self.graph, "a graph needs fixed tensors"


def pace_of(device: torch.device, check_every: int = 0, graph: bool = False) -> Pace:
    """Return the pace for a device.

    On a CPU, every token is checked by default, because nothing waits and a finished row costs as much as another one.

    Args:
        check_every: as for `Pace`; 0: 1 on a CPU, and 8 on other devices.
        graph: whether a CUDA device may capture steps as graphs.
    """
    if device.type == "cpu":
        every = check_every or 1
        return Pace(every, every)
    every = check_every or _CHECK_EVERY
    cuda = graph and device.type == "cuda"
    # With graphs, rows are removed when half of them are finished, because each removal needs a new graph.
    return Pace(every, math.lcm(every, _CHECK_EVERY), 0.5 if cuda else 0.85, _FEW_ROWS, fixed=cuda, graph=cuda)
