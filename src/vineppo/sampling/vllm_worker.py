"""Code that vLLM loads into its worker processes: weights from files, and tokens that a completion must not start with.

vLLM imports this module by its name (`worker_extension_cls`, `logits_processors`). The sampler in the process of the
trainer does not import it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SlotLogitsProcessor
except ImportError:  # a version of vLLM without the model runner V2
    SlotLogitsProcessor = object

FILES = "vineppo_files"
"""Name of the weight transfer backend of this module."""
EXCLUDED = "excluded_first"
"""Key in `SamplingParams.extra_args` of the token ids that a completion must not start with."""


TRAINER = "VINEPPO_TRAINER"
"""Environment variable with the id of the process that started the engine."""


class Extension:
    """Base class that vLLM adds to its workers. Because of it, every worker imports this module."""


@dataclass
class NoInfo:
    """Information for the start of the backend: none."""


@dataclass
class OneFile:
    """A part of an update: some of the weights."""

    path: str
    """A safetensors file with tensors under the names that the model has in a checkpoint."""


class FileTransfer(WeightTransferEngine):
    """Weight transfer backend that reads weights from files, for a trainer and an engine on the same machine.

    The weights pass through vLLM's layerwise reloading, which packs the weights of each layer again for its kernels.
    `load_weights` alone would leave out the packing, so that the kernels would go on with old weights.
    """

    init_info_cls, update_info_cls = NoInfo, OneFile

    def init_transfer_engine(self, info: NoInfo) -> None:
        """Do nothing, because files need no connection."""

    def start_weight_update(self) -> None:
        """Prepare all layers to receive weights in the format of a checkpoint."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, info: OneFile) -> None:
        """Load the weights of a file."""
        self.model.load_weights(tensors_of(info.path))

    def finish_weight_update(self) -> None:
        """Pack the weights of the layers that have not been packed yet, and those of a tied output layer."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        pack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Do nothing, because no file is open."""


def pack_tied_heads(model: Any) -> None:
    """Pack the weights of output layers that are tied to the embedding again.

    On a CPU, such a layer computes with a packed copy of the embedding. A checkpoint has no weights for the layer, so
    vLLM 0.32 does not pack them again when the embedding has changed: the logits would be those of old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {layer.weight.data_ptr() for layer in layers if not isinstance(layer, ParallelLMHead)}
    for layer in layers:
        tied = isinstance(layer, ParallelLMHead) and layer.weight.data_ptr() in embeddings
        if tied and isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            layer.quant_method.process_weights_after_loading(layer)


def tensors_of(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the (name, tensor) pairs of a safetensors file."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - the file is not a dictionary
            yield name, file.get_tensor(name)


class ExcludedFirst(AdapterLogitsProcessor, SlotLogitsProcessor):
    """Gives the tokens in `extra_args["excluded_first"]` of a request the probability 0 at its first new token.

    The two model runners of vLLM have different interfaces, and this class has both. V1 creates the object with three
    arguments (config, device, whether memory is pinned) and calls `update_state` and `apply(logits)`. V2 creates it
    with two (config, state of the requests) and calls `add_request` and `apply(logits, context)`.
    """

    def __init__(self, vllm_config: Any, *state: Any):
        if len(state) == 2:
            AdapterLogitsProcessor.__init__(self, vllm_config, *state)
        self.requests = state[0] if len(state) == 1 else None
        """State of the requests of the runner V2."""
        self.excluded: dict[int, list[int]] = {}
        """Slot of a request -> excluded token ids, for the runner V2."""

    def is_argmax_invariant(self) -> bool:
        """Return False, because the most likely token may be excluded."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """Return the function that changes the logits of a request, or None if it excludes nothing (V1)."""
        ids = (params.extra_args or {}).get(EXCLUDED)
        if not ids:
            return None

        def without(output_ids: list[int], logits: Any) -> Any:
            """Return the logits (V,) of the next token after `output_ids`."""
            if not output_ids:
                logits[ids] = float("-inf")
            return logits

        return without

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Store the excluded tokens of the request that gets a slot. Return whether there are any (V2)."""
        self.excluded[req_idx] = (sampling_params.extra_args or {}).get(EXCLUDED) or []
        return bool(self.excluded[req_idx])

    def apply(self, logits: Any, context: Any = None) -> Any:
        """Change the logits of a batch in place, shape (rows, V), and return them.

        Args:
            context: layout of the batch; None with the runner V1.
        """
        if context is None:
            return super().apply(logits)
        assert self.requests is not None
        # Without speculative decoding, which the sampler does not use, a request has one row.
        for row, slot in enumerate(context.idx_mapping_np.tolist()):
            ids = self.excluded.get(slot)
            if ids and context.seq_lens_upper_bound_np[row] <= self.requests.prompt_len.np[slot]:
                logits[row, ids] = float("-inf")
        return logits


def end_with(trainer: int, seconds: float = 2.0) -> None:
    """Wait until a process has ended, and then end this process, and its parent if that is the engine's process.

    vLLM does not notice that the process that started it was killed. It would keep its memory on the GPU.

    Args:
        trainer: id of the process.
        seconds: time between two checks of the process.
    """
    parent = os.getppid()
    while _exists(trainer):
        time.sleep(seconds)
    # A process whose parent has ended gets another parent, which has nothing to do with vLLM.
    if parent not in (1, trainer) and os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os._exit(1)


def _exists(process: int) -> bool:
    """Return whether there is a process with this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _watch_trainer() -> None:
    """Start a thread that ends this process with the trainer, if this is another process."""
    trainer = int(os.environ.get(TRAINER, "0"))
    if trainer and trainer != os.getpid():
        threading.Thread(target=end_with, args=(trainer,), daemon=True).start()


if FILES not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(FILES, FileTransfer)
_watch_trainer()
