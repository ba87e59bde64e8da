"""Send the weights of a policy to vLLM's workers: through files, CUDA IPC or NCCL.

The workers receive them through vLLM's interface for weight updates (`start_weight_update`, `update_weights`,
`finish_weight_update`). This module imports vLLM only in the functions for IPC and NCCL.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file

from vineppo.types import UserError, Weights

Transfer = Literal["files", "ipc", "nccl"]
"""`files`: through files in memory, for the CPU and as a fallback. `ipc`: CUDA IPC, for a trainer and an engine on the
same GPU. `nccl`: for an engine on other GPUs than the trainer."""
_PART = 1 << 29
"""Number of bytes from which a file gets no further tensor."""


class Sender(Protocol):
    """Sends weights to an engine."""

    def send(self, weights: Weights) -> None:
        """Send the weights, and return when all workers use them."""
        ...


def build_sender(llm: Any, transfer: Transfer, model: Any, num_workers: int) -> Sender:
    """Build the sender of an engine.

    Args:
        llm: a `vllm.LLM`, started with the weight transfer backend that belongs to `transfer`.
        model: the model whose weights are sent. Its configuration says which weights are tied.
        num_workers: number of the engine's GPUs.
    """
    if transfer == "files":
        return FileSender(llm, model)
    return TrainerEngineSender(llm, transfer, model, num_workers)


class FileSender:
    """Writes the weights to files of limited size, which the workers read one after another.

    Args:
        llm: the engine.
        model: the model whose weights are sent.
    """

    def __init__(self, llm: Any, model: Any):
        self.llm, self.model = llm, model
        llm.init_weight_transfer_engine({"init_info": {}})

    def send(self, weights: Weights) -> None:
        """Send the weights, and return when all workers use them."""
        self.llm.start_weight_update()
        with tempfile.TemporaryDirectory(prefix="vineppo-weights-", dir=_memory_folder()) as folder:
            for number, part in enumerate(_parts(checkpoint_weights(self.model, weights()))):
                path = Path(folder) / f"{number}.safetensors"
                save_file(part, path)
                self.llm.update_weights({"update_info": {"path": str(path)}})
                path.unlink()  # the workers keep the memory of the file until they have copied it
        self.llm.finish_weight_update()


class TrainerEngineSender:
    """Sends weights with the trainer side of vLLM's backends `ipc` and `nccl`.

    Args:
        llm: the engine.
        transfer: the backend.
        model: the model whose weights are sent.
        num_workers: number of the engine's GPUs.
    """

    def __init__(self, llm: Any, transfer: Transfer, model: Any, num_workers: int):
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        sender = self

        class Source(WeightSource):
            """The weights of the current update."""

            def metadata(self) -> list[Any]:
                """Return the name, dtype and shape of each weight."""
                return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                assert sender.weights is not None, "an update has weights"
                return checkpoint_weights(model, sender.weights())

        self.weights: Weights | None = lambda: model.state_dict().items()
        info = (
            IPCTrainerInitInfo(packed=True, rank=0)
            if transfer == "ipc"
            else NCCLTrainerInitInfo("127.0.0.1", _free_port(), 1 + num_workers, rank=0)
        )
        self.engine = WeightTransferTrainerFactory.trainer_init(info, client=_Client(llm), source=Source())
        self.weights = None

    def send(self, weights: Weights) -> None:
        """Send the weights, and return when all workers use them."""
        self.weights = weights
        self.engine.send_weights()
        self.weights = None


class _Client:
    """Passes the calls of vLLM's trainer side on to an engine that this process has started."""

    def __init__(self, llm: Any):
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)


def checkpoint_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights as a checkpoint of the model has them: without an output layer that is tied to the embedding.

    Args:
        model: the model of transformers to which the weights belong.
        weights: (name, tensor) pairs with the names of the model's `state_dict`.
    Raises:
        UserError: if the configuration ties the output layer to the embedding, but their weights differ.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = (
        f"{names.get(id(module), '')}.weight"
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)) and embedding != head
    ends: dict[str, torch.Tensor] = {}
    for name, tensor in weights:
        if tied and name in (embedding, head):
            ends[name] = tensor
        if not (tied and name == head):
            yield name, tensor.detach()
    shared = len(ends) < 2 or ends[embedding].data_ptr() == ends[head].data_ptr()
    if not shared and not torch.equal(ends[embedding].float(), ends[head].float()):
        raise UserError(
            "the model's configuration ties the output layer to the embedding, but adapters made them differ, which "
            "vLLM cannot represent; leave both out of model.lora.targets, or set sampler.engine to auto"
        )


def _parts(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights on the CPU, in dictionaries that are complete when they have at least `_PART` bytes."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        part[name] = tensor.detach().to("cpu").contiguous()
        size += part[name].nbytes
        if size >= _PART:
            yield part
            part, size = {}, 0
    if part:
        yield part


def _memory_folder() -> str | None:
    """Return a folder in memory if there is one with space for several files; None: the default for temporary files."""
    folder = "/dev/shm"
    if not os.access(folder, os.W_OK):
        return None
    found = os.statvfs(folder)
    return folder if found.f_bavail * found.f_frsize > 4 * _PART else None


def _free_port() -> int:
    """Return the number of a free port of this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
