"""Write and read the state of a learner in a checkpoint: trained weights, optimizers and numbers of updates.

One process writes the file `learner.pt`. Several processes write the directory `learner`, each its shards
(`run.shards`). Any number of processes can read both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vineppo.learning.optim import Optimizer
from vineppo.learning.sharding import Ranks, like, release
from vineppo.model.lora import load_trained_state, trained_state
from vineppo.run.checkpoint import read_state, write_state
from vineppo.run.shards import WHOLE, has_shards, names_of_shards, read_shards, write_shards


@dataclass(frozen=True)
class Trained:
    """A network that is trained, and its optimizer."""

    name: str
    """`policy` or `critic`."""
    network: torch.nn.Module
    optimizer: Optimizer


def write_learner(folder: Path, networks: Sequence[Trained], counts: Mapping[str, int], ranks: Ranks) -> None:
    """Write the state of a learner to a folder. With several processes, all of them must call this function.

    Args:
        folder: the folder, on a file system that all processes share.
        networks: the policy, and the value network if there is one.
        counts: the numbers `updates` and `scheduled` of the learner.
        ranks: the processes.
    """
    if ranks.count > 1:
        write_shards(folder, _tensors(networks) | {name: torch.tensor(number) for name, number in counts.items()})
        return
    state: dict[str, Any] = {"critic": None, "critic_optimizer": None, **counts}
    for one in networks:
        state |= {one.name: trained_state(one.network), _of_optimizer(one): one.optimizer.state_dict()}
    write_state(folder / WHOLE, state)


def read_learner(folder: Path, networks: Sequence[Trained], ranks: Ranks) -> tuple[int, int]:
    """Read a state that `write_learner` wrote, with this or another number of processes, into networks and optimizers.

    Returns:
        The numbers (`updates`, `scheduled`) of the learner.
    Raises:
        UserError: if the state is missing or cannot be read.
        Exception: KeyError, RuntimeError, ValueError or TypeError if it does not fit the networks.
    """
    return _read_shards(folder, networks) if has_shards(folder) else _read_file(folder, networks, ranks)


def _of_optimizer(one: Trained) -> str:
    """Return the name of the state of an optimizer in the file that one process writes."""
    return "optimizer" if one.name == "policy" else f"{one.name}_optimizer"


def _tensors(networks: Sequence[Trained], present: Callable[[str], bool] | None = None) -> dict[str, torch.Tensor]:
    """Return the state of networks and optimizers as a dictionary from names to tensors, which may be sharded.

    Args:
        present: whether a tensor of an optimizer is needed, by name; None means those that exist. Those that are needed
            and do not exist are created.
    """
    tensors: dict[str, torch.Tensor] = {}
    for one in networks:
        release(one.network)
        tensors |= {f"{one.name}/{name}": tensor for name, tensor in trained_state(one.network).items()}
        names = [f"{one.name}_optimizer/{name}" for name, p in one.network.named_parameters() if p.requires_grad]
        tensors |= one.optimizer.tensors(names, present)
    return tensors


def _read_shards(folder: Path, networks: Sequence[Trained]) -> tuple[int, int]:
    """Read the state that several processes wrote."""
    saved, counts = names_of_shards(folder), {name: torch.tensor(0) for name in ("updates", "scheduled")}
    read_shards(folder, _tensors(networks, lambda name: name in saved) | counts)
    return int(counts["updates"]), int(counts["scheduled"])


def _read_file(folder: Path, networks: Sequence[Trained], ranks: Ranks) -> tuple[int, int]:
    """Read the state that one process wrote."""
    state: dict[str, Any] = read_state(folder / WHOLE)
    for one in networks:
        release(one.network)
        own = trained_state(one.network) if ranks.count > 1 else {}
        load_trained_state(one.network, {name: like(t, own.get(name, t)) for name, t in state[one.name].items()})
        one.optimizer.load_state_dict(state[_of_optimizer(one)])
    return state["updates"], state["scheduled"]
