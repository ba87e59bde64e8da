"""The GPUs and the environment of vLLM's process, also if a launcher has started several trainers on a machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Literal

from vineppo.run.peers import launched_ranks
from vineppo.sampling.vllm_weights import Transfer
from vineppo.types import UserError

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""Environment variable of torchrun. If it is True, PyTorch expects that torchrun has opened every store that a process
connects to (`torch.distributed.rendezvous`). Nobody opens the store of vLLM's process, which would wait for it."""


def engine_gpus(devices: str, own: int | None) -> list[str]:
    """Return the GPUs of the engine of this process, by their numbers or names in CUDA_VISIBLE_DEVICES.

    Args:
        devices: the setting `sampler.vllm.devices`. Several trainers on a machine divide these GPUs.
        own: index of the trainer's GPU among the visible ones, which the engine shares without `devices`; None if the
            trainer is on the CPU.
    Returns:
        The GPUs; [] for the CPU.
    Raises:
        UserError: if the GPUs cannot be divided, or a trainer of the machine is on one of them.
    """
    given, count, number = [gpu for gpu in devices.split(",") if gpu], *_trainers_of_the_machine()
    if own is None and not given:
        return []
    visible = [gpu.strip() for gpu in os.environ.get(_VISIBLE, "").split(",") if gpu.strip()]
    if not given:
        assert own is not None
        return [visible[own] if visible else str(own)]
    of_trainers = [] if own is None else [own] if count == 1 else list(range(count))
    shared = {visible[index] if index < len(visible) else str(index) for index in of_trainers} & set(given)
    if shared:
        raise UserError(
            f"sampler.vllm.devices is {devices}, but a trainer is on GPU {min(shared)}; name other GPUs, or leave the "
            "setting empty, so that every trainer shares its GPU with its engine"
        )
    if len(given) % count:
        raise UserError(
            f"sampler.vllm.devices is {devices}: {len(given)} GPUs cannot be divided among the {count} processes of "
            f"this machine; name {count} GPUs or a multiple, or start fewer processes"
        )
    size = len(given) // count
    return given[number * size : (number + 1) * size]


def transfer_of(setting: Transfer | Literal["auto"], on_gpu: bool, devices: str) -> Transfer:
    """Return how the weights are sent to the engine: as the setting says, or for `auto` in the fastest possible way.

    Args:
        setting: the setting `sampler.vllm.transfer`.
        on_gpu: whether the trainer is on a GPU.
        devices: the setting `sampler.vllm.devices`.
    Raises:
        UserError: if the setting is `ipc` and there are several trainers: vLLM then sends the weights of all trainers
            to the engine of the first one, and nothing to the others.
    """
    several = launched_ranks()[1] > 1
    if setting == "ipc" and several:
        raise UserError(
            "sampler.vllm.transfer is ipc, which vLLM supports only for one engine per run, but every process of this "
            "run has an engine; set sampler.vllm.transfer to auto or files"
        )
    if setting != "auto":
        return setting
    if not on_gpu:
        return "files"
    return "nccl" if devices else "files" if several else "ipc"


def _trainers_of_the_machine() -> tuple[int, int]:
    """Return (number of processes that a launcher started on this machine, index of this one); (1, 0) if none did."""
    if launched_ranks()[1] == 1:
        return 1, 0
    local = [os.environ.get(name, default) for name, default in (("LOCAL_WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    return int(local[0]), int(local[1])


@contextmanager
def environment_of_engine(gpus: Sequence[str]) -> Iterator[None]:
    """Context manager in which new processes see only some GPUs and open their own stores.

    Args:
        gpus: the GPUs; [] changes nothing about them.
    """
    changes = {_AGENT_STORE: "False"} if _AGENT_STORE in os.environ else {}
    if gpus:
        changes[_VISIBLE] = ",".join(gpus)
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def set_variables(transfer: Transfer) -> None:
    """Set the environment variables of vLLM's process. Variables of vLLM that the user has set are not changed."""
    os.environ["VINEPPO_TRAINER"] = str(os.getpid())  # the workers end with this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would send statistics about its use
    if transfer == "ipc":
        # The handles of GPU memory are Python objects, which vLLM passes to its own process only with this variable.
        os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Context manager in which new processes do not receive Ctrl-C, and this process receives it only afterwards.

    Ctrl-C asks a run to stop after its iteration, for which the engine must go on.
    """
    resource_tracker.ensure_running()  # Python starts it with the first process, and then unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
