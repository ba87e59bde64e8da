"""Write and read the state of a learner that several processes hold in shards (PyTorch's distributed checkpoints).

A state is a dictionary from names to tensors. Each process writes its shards, and the files can be read by any number
of processes. In a checkpoint, they are the files of the directory `learner`.

PyTorch is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vineppo.run.checkpoint import read_state
from vineppo.types import UserError

if TYPE_CHECKING:
    import torch

FOLDER = "learner"
"""Name of the directory with the shards in a checkpoint."""
WHOLE = "learner.pt"
"""Name of the file that one process writes instead."""


def has_shards(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written by several processes."""
    return (checkpoint / FOLDER / ".metadata").is_file()


def write_shards(checkpoint: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write the shards of a state. All processes must call this function with the same checkpoint."""
    from torch.distributed import checkpoint as dcp

    with _without_note():
        dcp.save(dict(state), checkpoint_id=checkpoint / FOLDER)


def names_of_shards(checkpoint: Path) -> frozenset[str]:
    """Return the names of the tensors in a checkpoint."""
    return frozenset(_metadata(checkpoint))


def read_shards(checkpoint: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Read a state into the given tensors, which may be divided in another way than they were when they were written.

    With several processes, all of them must call this function.

    Raises:
        KeyError: if the names differ from those of the state that was written.
        ValueError: if a tensor has another shape than the one that was written.
        UserError: if the files cannot be read.
    """
    import torch.distributed as dist
    from torch.distributed import checkpoint as dcp

    present = _metadata(checkpoint)
    if set(state) != set(present):
        raise KeyError(f"only the checkpoint or only the model has {', '.join(sorted(set(state) ^ set(present))[:3])}")
    for name, tensor in state.items():
        if tensor.shape != present[name].size:
            raise ValueError(f"{name} has the shape {tuple(present[name].size)}, and the model {tuple(tensor.shape)}")
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    with _without_note():
        dcp.load(dict(state), checkpoint_id=checkpoint / FOLDER, no_dist=alone)


def read_networks(checkpoint: Path) -> dict[str, Any]:
    """Return the trained weights in a checkpoint, whole: {"policy": weights, "critic": weights or None}.

    The weights are dictionaries from names to tensors on the CPU, whether one or several processes wrote them.

    Raises:
        UserError: if the weights are missing or cannot be read.
    """
    if not has_shards(checkpoint):
        state = read_state(checkpoint / WHOLE)
        return {"policy": state["policy"], "critic": state.get("critic")}
    import torch
    from torch.distributed import checkpoint as dcp

    kinds = ("policy", "critic")
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _metadata(checkpoint).items()
        if name.partition("/")[0] in kinds
    }
    with _without_note():
        dcp.load(tensors, checkpoint_id=checkpoint / FOLDER, no_dist=True)
    networks: dict[str, Any] = {kind: {} for kind in kinds}
    for name, tensor in tensors.items():
        kind, _, inner = name.partition("/")
        networks[kind][inner] = tensor
    return {"policy": networks["policy"], "critic": networks["critic"] or None}


@contextlib.contextmanager
def _without_note() -> Iterator[None]:
    """Suppress the warning of PyTorch that a single process reads or writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
        yield


def _metadata(checkpoint: Path) -> dict[str, Any]:
    """Return the description of each tensor in a checkpoint, by name."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        entries: dict[str, Any] = FileSystemReader(checkpoint / FOLDER).read_metadata().state_dict_metadata
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise UserError(
            f"checkpoint {checkpoint}: the files in {FOLDER} cannot be read ({type(error).__name__})"
        ) from error
    return entries
