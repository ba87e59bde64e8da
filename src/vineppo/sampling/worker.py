"""The part of a distributed sampler that runs in a worker process: a copy of the model, and a sampler that uses it.

The copy is built from the class and the configuration of the model (`Outline`), so that a worker needs no file of the
model. Its weights come from the trainer. They are sent as arrays of bytes (`packed`), which an object store passes to
the processes of a machine without a copy for each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vineppo.config.schema import LoraConfig, ModelConfig
from vineppo.config.settings import replace
from vineppo.model.codec import Codec
from vineppo.model.policy import Policy
from vineppo.sampling.build import Engine, build_sampler, sampler_line
from vineppo.sampling.language_model import LanguageModel
from vineppo.sampling.torch.pace import pace_of
from vineppo.sampling.version import StaleWeights
from vineppo.types import Sampler, SampleRequest, TrainingWarning, UserError

Arrays = Mapping[str, tuple[np.ndarray, str, tuple[int, ...]]]
"""Name of each tensor -> (its bytes, the name of its dtype, its shape)."""


def packed(tensors: Iterable[tuple[str, torch.Tensor]]) -> Arrays:
    """Return tensors as arrays of bytes on the CPU. Tensors that share their memory, such as tied weights, share it."""
    arrays: dict[str, tuple[np.ndarray, str, tuple[int, ...]]] = {}
    known: dict[tuple[Any, ...], np.ndarray] = {}
    kept = []  # Memory that is freed could be used again, and the next tensor would be taken for an earlier one.
    for name, tensor in tensors:
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in known:
            known[key] = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            kept.append(tensor)
        arrays[name] = (known[key], str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
    return arrays


def load_packed(model: Any, arrays: Arrays) -> None:
    """Copy the tensors that `packed` returned into a model.

    Weights that are tied in the model and differ among the tensors (adapters on one of them were merged) are untied.

    Raises:
        UserError: if the model has other tensors.
    """
    state = model.state_dict()
    if state.keys() != arrays.keys():
        different = sorted(state.keys() ^ arrays.keys())
        raise UserError(f"the weights do not fit the model of the sampling worker, which differs in {different[0]}")
    owners: dict[int, str] = {}
    for name, (array, dtype, shape) in arrays.items():
        tensor = _unpacked(array, dtype, shape)
        target = state[name]
        owner = owners.setdefault(target.data_ptr(), name)
        if owner != name and target.numel() and not np.array_equal(array, arrays[owner][0]):
            parent, _, leaf = name.rpartition(".")
            target = nn.Parameter(target.clone(), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, target)
        target.data.copy_(tensor)


def _unpacked(array: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype)).reshape(shape)


@dataclass(frozen=True)
class Outline:
    """What a worker needs to build a copy of a policy, apart from its weights. It can be pickled."""

    model: Any
    """The class of the model, or None for a model with code of its own, which the worker loads from `config.path`."""
    settings: Any
    """The transformers configuration of the model."""
    dtype: torch.dtype
    buffers: Arrays
    """The buffers that are not among the weights, such as the frequencies of rotary positions."""
    codec: Codec
    config: ModelConfig
    """The settings of the model, with an absolute path."""

    @classmethod
    def of(cls, policy: Policy, config: ModelConfig) -> Outline:
        """Return the outline of a policy that was loaded with the given settings, or built in memory."""
        model, kind = policy.model, type(policy.model)
        remote = kind.__module__.startswith("transformers_modules")
        weights = model.state_dict()
        buffers = packed((name, buffer) for name, buffer in model.named_buffers() if name not in weights)
        settings = copy.deepcopy(model.config)
        return cls(None if remote else kind, settings, model.dtype, buffers, policy.codec, config)

    def policy(self, device: str) -> Policy:
        """Build the policy on a device, with arbitrary weights and without adapters."""
        if self.model is None:
            return Policy.load(replace(self.config, device=device, lora=LoraConfig()))
        model = self.model._from_config(copy.deepcopy(self.settings), dtype=self.dtype)
        for name, _ in list(model.named_buffers()):
            if name in self.buffers:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent)._buffers[leaf] = _unpacked(*self.buffers[name])
        return Policy(model.to(device).requires_grad_(False), self.codec)


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker samples. It can be pickled."""

    engine: Engine
    """Which sampler to build."""
    max_rows: int
    """Maximum number of rows that are decoded at the same time."""
    kv_memory: int
    """Maximum number of bytes of keys and values."""
    device: str = "cpu"
    """Device of the model."""
    threads: int = 0
    """Number of threads of PyTorch and of the engine; 0: PyTorch's choice."""
    check_every: int = 0
    """`sampler.check_every`, for the PyTorch sampler."""
    graph: bool = False
    """`sampler.graph`, for the PyTorch sampler."""
    why_torch: str = "sampler.engine is torch"
    """Why `engine` is torch."""

    def line(self, policy: LanguageModel) -> str:
        """Return one line that says with what the worker samples."""
        sampler = (
            f"sampling with PyTorch: {self.why_torch}" if self.engine == "torch" else sampler_line(policy, self.engine)
        )
        return f"{sampler}, PyTorch {torch.__version__}"


@dataclass(frozen=True)
class Outcome:
    """What a call in a worker returned: a value, or the exception that it raised."""

    value: Any = None
    error: Exception | None = None
    warnings: tuple[str, ...] = ()
    """Texts of the warnings of the call. The output of a worker process is not shown to the user."""

    def get(self) -> Any:
        """Return the value, or raise the exception. Each warning of the call is given as a `TrainingWarning`."""
        for text in self.warnings:
            warnings.warn(f"sampling worker: {text}", TrainingWarning, stacklevel=2)
        if self.error is not None:
            raise self.error
        return self.value


def _outcome(call: Callable[[], Any]) -> Outcome:
    """Return what the call returned or raised, with its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, error = call(), None
        except Exception as raised:
            value, error = None, raised
    own = [warning for warning in caught if issubclass(warning.category, UserWarning)]
    return Outcome(value, error, tuple(dict.fromkeys(str(warning.message) for warning in own)))


class SamplingWorker:
    """A model and its sampler in a worker process. The methods return an `Outcome` and raise nothing.

    Args:
        outline: the model.
        settings: how to sample with it.
    """

    def __init__(self, outline: Outline, settings: WorkerSettings):
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.sampler: Sampler | None = None
        self.version = -1
        self.load_error: Exception | None = None

        def build() -> str:
            self.policy, rows, memory = outline.policy(settings.device), settings.max_rows, settings.kv_memory
            pace = pace_of(self.policy.device, settings.check_every, settings.graph)
            self.sampler = build_sampler(self.policy, settings.engine, max_rows=rows, kv_memory=memory, pace=pace)
            return settings.line(self.policy)

        self.built = _outcome(build)

    def ready(self) -> Outcome:
        """Return one line that says with what the worker samples."""
        return self.built

    def load(self, version: int, arrays: Arrays) -> Outcome:
        """Use new weights for all later calls of `sample`."""
        if self.built.error is not None:
            return self.built

        def copy_weights() -> int:
            assert self.sampler is not None
            load_packed(self.policy.model, arrays)
            self.sampler.update_weights(version, lambda: self.policy.model.state_dict().items())
            return version

        outcome = _outcome(copy_weights)
        self.version, self.load_error = -1 if outcome.error is not None else version, outcome.error
        return outcome

    def sample(self, version: int, requests: Sequence[SampleRequest]) -> Outcome:
        """Return the completions of the requests, one list each.

        The outcome is StaleWeights if the worker does not have the weights of the version, or the error of the last
        `load` if that failed.
        """
        sampler = self.sampler
        if sampler is None:
            return self.built
        if self.load_error is not None and version != self.version:
            return Outcome(error=self.load_error)
        if version != self.version:
            return Outcome(
                error=StaleWeights(
                    f"a sampling worker has the weights of update {self.version}, and samples with those of update "
                    f"{version} were requested; call update_weights after every change of the learner's weights"
                )
            )
        return _outcome(lambda: sampler.sample(requests))
