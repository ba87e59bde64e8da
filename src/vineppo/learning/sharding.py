"""Divide the work of the learner over several processes (ranks), each with a shard of the networks (FSDP2).

All ranks run the same program and know all samples of a minibatch, so every rank knows the numbers by which sums are
divided. The ranks share the micro-batches, and the gradients are summed and not averaged. A forward pass of a sharded
network is a collective operation: every rank must make equally many, so a rank with fewer micro-batches repeats one
whose results count for nothing.

Each rank also keeps the whole policy, with which its sampler samples. The operations of one process, `ONE_RANK`, are
the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vineppo.model.clone import clone_with_adapters
from vineppo.model.critic import ValueNetwork
from vineppo.model.output import share_operations
from vineppo.model.policy import Policy, Reference
from vineppo.objects import message_line
from vineppo.run.peers import PeerEnded, launched_ranks
from vineppo.types import UserError

T = TypeVar("T")

TIMEOUT = datetime.timedelta(days=7)
"""How long a rank waits for the others. It is long, because rank 0 may grade for hours while the others wait for its
next call; a rank that has ended is found by `run.peers`."""


@dataclass(frozen=True)
class Ranks:
    """This process and the others of a run. Without arguments: the only process."""

    rank: int = 0
    """Number of this process, counted from 0."""
    count: int = 1
    """Number of processes, W."""
    mesh: DeviceMesh | None = None
    """The processes as PyTorch describes them; None for one process."""
    leads: bool = False
    """Whether the other ranks follow this one: they make the calls that it announces (`training.following`)."""

    def announce(self, name: str, *arguments: Any) -> None:
        """Make the other ranks call the operation `name` with these arguments, if they follow this rank."""
        if self.leads and self.count > 1:
            dist.broadcast_object_list([(name, arguments)], src=0)

    def announced(self) -> tuple[str, tuple[Any, ...]]:
        """Wait for the next announcement of rank 0, and return (name of the operation, arguments)."""
        received: list[Any] = [None]
        dist.broadcast_object_list(received, src=0)
        name, arguments = received[0]
        return name, arguments

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks. Values are pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T) -> T:
        """Return the value of rank 0 on all ranks."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        result: T = values[0]
        return result

    def share(self, groups: Sequence[T]) -> list[tuple[T, bool]]:
        """Return (micro-batch, whether it counts) for each forward pass of this rank.

        All ranks get equally many. Every micro-batch counts on exactly one rank.
        """
        if self.count == 1 or not groups:
            return [(group, True) for group in groups]
        mine = [(group, True) for group in groups[self.rank :: self.count]]
        return mine + [(groups[0], False)] * (-(-len(groups) // self.count) - len(mine))

    def max_tokens(self, tokens: int, limit: int) -> int:
        """Return the maximum number of tokens of a micro-batch, so that every rank gets work if there is enough.

        Args:
            tokens: number of tokens of all micro-batches.
            limit: maximum in one process.
        """
        return limit if self.count == 1 else max(1, min(limit, -(-tokens // self.count)))

    def sums(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the sums over the ranks of numbers with the same names."""
        if self.count == 1:
            return dict(totals)
        parts = self.gather(dict(totals))
        return {key: sum(part[key] for part in parts) for key in parts[0]}

    def together(self, action: Callable[[], None] | None) -> None:
        """Call a function on rank 0. If it raises an error, all ranks stop.

        Raises:
            PeerEnded: on the other ranks, if the function raised an error.
        """
        try:
            if action is not None:
                action()
        except BaseException:
            self.from_first(False)
            raise
        if not self.from_first(True):
            raise PeerEnded("rank 0 stopped the run")


ONE_RANK = Ranks()
"""The only process of a run."""


def join_ranks(device: str) -> Ranks:
    """Connect this process with the others that a launcher (torchrun, accelerate launch) started.

    Args:
        device: the setting `model.device`. With several ranks, `cuda` means a different GPU for each rank of a machine.
    Returns:
        `ONE_RANK` if there are no others. Rank 0 leads.
    Raises:
        UserError: if the setting names one GPU or another kind of device, if there are more processes than GPUs, or the
            processes cannot connect.
    """
    rank, count = launched_ranks()
    if count == 1:
        return ONE_RANK
    kind = device.partition(":")[0]
    if ":" in device:
        raise UserError(
            f"model.device is {device!r}, but {count} processes were started, which need a device each; set "
            f"model.device to {kind}"
        )
    if kind not in ("cpu", "cuda"):
        raise UserError(
            f"model.device is {device!r}, but {count} processes were started, which train on cuda or cpu only; start "
            "one process without a launcher"
        )
    if kind == "cuda":
        use_own_gpu()
    if not dist.is_initialized():
        try:
            # Objects are sent with gloo, also between GPUs.
            dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            reason = message_line(error)
            raise UserError(
                f"the {count} processes of this run cannot connect: {reason}; start them with torchrun, which sets "
                "MASTER_ADDR and MASTER_PORT"
            ) from error
    return Ranks(rank, count, init_device_mesh(kind, (count,)), leads=rank == 0)


def use_own_gpu() -> None:
    """Select the GPU of this process among those of the machine: the one with the number of the process.

    Raises:
        UserError: if the machine has fewer visible GPUs than processes.
    """
    number, present = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= present:
        mend = f"at most {present} processes on this machine" if present else "the processes with model.device cpu"
        raise UserError(
            f"model.device is cuda, but process {number} of this machine (counted from 0) has no GPU: {present} are "
            f"visible to PyTorch; start {mend}"
        )
    torch.cuda.set_device(number)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Context manager that yields the result of `join_ranks`, and closes the connection at the end of a run."""
    was_connected = dist.is_initialized()
    ranks = join_ranks(device)
    yield ranks
    if ranks.count > 1 and not was_connected:
        dist.barrier()
        dist.destroy_process_group()


def shard(network: nn.Module, ranks: Ranks, units: Sequence[nn.Module] = ()) -> None:
    """Divide the parameters of a network over the ranks, in place (FSDP2). Gradients are summed over the ranks.

    Each layer is one unit whose parameters are gathered for its forward and backward pass. All other parameters, such
    as the embedding and the output layer, which may be tied, form one more unit.

    Args:
        units: modules that form a unit too, because their parameters have another dtype.
    """
    assert ranks.mesh is not None
    reduce = None if all(p.dtype == torch.float32 for p in network.parameters()) else torch.float32
    policy = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
    names = {name for module in network.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in [*(m for m in network.modules() if type(m).__name__ in names), *units]:
        fully_shard(module, mesh=ranks.mesh, mp_policy=policy)
    # The output layer is also used after the forward pass of the model (`model.output`), so it stays gathered until
    # the end of the backward pass.
    fully_shard(network, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no multiplied sum


def sharded_policy(policy: Policy, ranks: Ranks) -> Policy:
    """Return a copy of a policy that is divided over the ranks; the policy itself in one process.

    The weights of rank 0 are used on all ranks.
    """
    if ranks.count == 1:
        return policy
    with torch.no_grad():
        for tensor in (*policy.model.parameters(), *policy.model.buffers()):
            dist.broadcast(tensor, src=0)
    model, adapters = clone_with_adapters(policy.model)
    copy = Policy(model, policy.codec, adapters)
    copy.restorable = policy.restorable
    share_operations(policy.model, model)
    shard(model, ranks)
    return copy


def sharded_reference(reference: Reference | None, policy: Policy, shards: Policy, ranks: Ranks) -> Reference | None:
    """Return the reference of the sharded policy.

    Args:
        reference: the reference of the whole policy.
        policy: the whole policy.
        shards: the result of `sharded_policy`.
    """
    if reference is None or ranks.count == 1:
        return reference
    with reference.active() as start:
        if start is policy:
            return Reference(shards)
        share_operations(policy.model, start.model)
        shard(start.model, ranks)
        return reference


def shard_critic(critic: ValueNetwork | None, ranks: Ranks) -> None:
    """Divide a value network over the ranks, in place."""
    if critic is not None and ranks.count > 1:
        shard(critic, ranks, [critic.head])  # The head has float32 weights, also if the body has 16 bits.
        register_fsdp_forward_method(critic, "of_sequences")


@torch.no_grad()
def gather_weights(shards: nn.Module, whole: nn.Module) -> None:
    """Copy the trained weights of a sharded network into a whole network with the same names."""
    if shards is whole:
        return
    release(shards)
    of_whole = dict(whole.named_parameters())
    for name, parameter in shards.named_parameters():
        if parameter.requires_grad:
            of_whole[name].copy_(full(parameter))


def release(network: nn.Module) -> None:
    """Free the gathered weights of a sharded network after a forward pass without gradients.

    Without this, the next pass would use them again, although an update has changed the shards.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor of a shard, which is a collective operation; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor divided like another tensor, or as it is if the other tensor is whole.

    Args:
        whole: the tensor, which every rank has.
        tensor: a tensor of the same shape, which may be sharded.
    """
    if not isinstance(tensor, DTensor) or whole.shape != tensor.shape:
        return whole
    moved = whole.to(tensor.device, tensor.dtype)
    return distribute_tensor(moved, tensor.device_mesh, tensor.placements, src_data_rank=None)
