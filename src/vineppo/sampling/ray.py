"""A sampler whose workers are Ray actors, on one machine or on several.

The requests of a call are cut into units (sampling/units.py), and a pool distributes the units (sampling/pool.py). So
the completions have the same bits for any number of actors, also after an actor died. The weights are put into Ray's
object store once per update, from which every actor of a machine reads them.

This module can be imported without Ray.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vineppo.config.schema import ModelConfig, SamplerConfig
from vineppo.config.settings import replace
from vineppo.model.lora import merged_weights
from vineppo.model.policy import Policy
from vineppo.sampling.build import Engine, why_torch
from vineppo.sampling.pool import Pool, WorkerDied
from vineppo.sampling.torch.attention import tree_supported
from vineppo.sampling.torch.sampler import kv_bytes_per_token
from vineppo.sampling.units import cut
from vineppo.sampling.worker import Arrays, Outcome, Outline, SamplingWorker, WorkerSettings, packed
from vineppo.types import Capabilities, Completion, OnFinished, SampleRequest, TrainingWarning, UserError, Weights

_GIB = 1 << 30
_UNIT_ROWS = {"engine": 16, "cpu": 64, "gpu": 256}
"""Default of `sampler.unit_rows` for the compiled engine, and for the PyTorch sampler on a CPU and on a GPU."""
_STORED_VERSIONS = 3
"""Space for this many copies of the weights in the object store of a cluster that is started here."""


class RayCrew:
    """Ray actors that sample units; implements `pool.Crew`. A handle is the reference to an actor's result.

    Args:
        ray: the module `ray`, connected to a cluster.
        size: number of actors.
        outline: the model.
        settings: how every actor samples. With a GPU as device, each actor has a GPU, or else a CPU core.
    """

    def __init__(self, ray: ModuleType, size: int, outline: Outline, settings: WorkerSettings):
        self.ray, self.size, on_gpu = ray, size, settings.device != "cpu"
        # A restarted actor would have no weights. `replace` starts a new one, and gives it the weights.
        resources = {"num_cpus": 0 if on_gpu else 1, "num_gpus": 1 if on_gpu else 0, "max_restarts": 0}
        self._kind = ray.remote(SamplingWorker).options(**resources)
        self._arguments = (ray.put(outline), settings)
        self._weights: tuple[int, Any] | None = None
        self.actors = [self._kind.remote(*self._arguments) for _ in range(size)]

    def ready(self) -> list[str]:
        """Wait until all actors are built, and return one line for each that says with what it samples.

        Raises:
            UserError: if an actor cannot be built.
        """
        try:
            outcomes: list[Outcome] = self.ray.get([actor.ready.remote() for actor in self.actors])
        except self.ray.exceptions.RayError as error:
            raise UserError(f"sampler.pool is ray, but a Ray actor could not start: {_last_line(error)}") from error
        return [str(outcome.get()) for outcome in outcomes]

    def load(self, version: int, arrays: Arrays) -> None:
        """Put weights into the object store, and let every actor use them, without waiting.

        An actor executes its calls in their order, so that it has the weights before its next unit.
        """
        self._weights = (version, self.ray.put(arrays))
        for actor in self.actors:
            actor.load.remote(*self._weights)

    def start(self, worker: int, version: int, requests: Sequence[SampleRequest]) -> Any:
        """Let an actor sample requests with the weights of a version. Return the reference to the result."""
        return self.actors[worker].sample.remote(version, requests)

    def wait(self, handles: Sequence[Any], seconds: float | None) -> list[Any]:
        """Return the finished references, as soon as there is one, or none after a number of seconds."""
        finished, _ = self.ray.wait(list(handles), num_returns=1, timeout=seconds)
        more, _ = self.ray.wait(list(handles), num_returns=len(handles), timeout=0)
        return list(dict.fromkeys([*finished, *more]))

    def result(self, handle: Any) -> list[list[Completion]]:
        """Return the completions of a finished reference.

        Raises:
            WorkerDied: if the actor died, or its result was lost.
            Exception: the exception that the sampler of the actor raised.
        """
        try:
            outcome: Outcome = self.ray.get(handle)
        except self.ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"a Ray actor failed: {_last_line(error)}") from error
        except self.ray.exceptions.RayError as error:
            raise WorkerDied(_last_line(error)) from error
        return outcome.get()

    def replace(self, worker: int) -> None:
        """Start a new actor with the current weights in the place of one that died, without waiting for it."""
        self._kill(self.actors[worker])
        self.actors[worker] = self._kind.remote(*self._arguments)
        if self._weights is not None:
            self.actors[worker].load.remote(*self._weights)

    def close(self) -> None:
        """End all actors."""
        for actor in self.actors:
            self._kill(actor)

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError, ValueError):  # It may have ended.
            self.ray.kill(actor)


class RaySampler:
    """Samples with Ray actors, each of which has a copy of the policy; implements `types.Sampler`.

    Call `close` to end the actors. They also end with this process.

    Args:
        policy: the policy, whose weights are sent to the actors. Adapters are merged into them.
        model: the settings with which the policy was loaded.
        settings: the settings of the sampler.
    Raises:
        UserError: if Ray is not installed, the cluster cannot be reached or is too small, or an actor cannot be built.
    """

    def __init__(self, policy: Policy, model: ModelConfig, settings: SamplerConfig):
        _check_adapters(policy)
        reason = why_torch(policy, settings.engine)
        if reason and settings.engine == "engine":
            raise UserError(f"sampler.engine is engine, but {reason}; set sampler.engine to auto or torch")
        on_gpu, self.version = policy.device.type != "cpu", 0
        default = _UNIT_ROWS["gpu" if on_gpu else "cpu" if reason else "engine"]
        self.max_rows, kv_memory = settings.unit_rows or default, int(settings.unit_memory * _GIB)
        self.kv_tokens = kv_memory // kv_bytes_per_token(policy.model)
        if reason and not tree_supported(policy.model):
            self.kv_tokens = 1 << 62  # The PyTorch sampler stores no keys and values for such a model.
        self.capabilities = Capabilities(excluded_first=True, reproducible=True, drafts=True)
        tensors = packed(merged_weights(policy.model))
        ray, self._owned = _connected(settings, sum(array.nbytes for array, _, _ in tensors.values()))
        size = settings.workers or _default_size(ray, on_gpu)
        _check_size(ray, size, on_gpu, settings)
        outline = Outline.of(policy, replace(model, path=_absolute(model.path)))
        device, threads = ("cuda", 0) if on_gpu else ("cpu", 1)
        limits: tuple[Engine, int, int] = ("torch" if reason else "engine", self.max_rows, kv_memory)
        worker = WorkerSettings(*limits, device, threads, settings.check_every, settings.graph, reason)
        self.crew = RayCrew(ray, size, outline, worker)
        self.pool = Pool(self.crew)
        lines = sorted(set(self.crew.ready()))
        if len(lines) > 1:
            warnings.warn(
                f"the Ray workers differ ({'; '.join(lines)}), so that the bits of a completion depend on which of "
                "them samples it; use machines with the same processor and the same packages",
                TrainingWarning,
                stacklevel=2,
            )
        self.line = f"{lines[0]}, in {size} Ray worker{'s' if size > 1 else ''}"
        self.crew.load(0, tensors)

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return one list of `num_samples` completions per request, in the order of the requests.

        Args:
            on_finished: called with the completions of a unit when the unit has ended.
        Raises:
            UserError: if the keys and values of a single sequence do not fit into `sampler.unit_memory`, or if several
                actors died while they sampled the same unit.
            StaleWeights: if an actor does not have the weights of `version`.
        """
        units = cut(requests, self.max_rows, self.kv_tokens, "sampler.unit_memory")
        completions = self.pool.sample(requests, units, self.version, on_finished)
        if died := self.pool.last.died:
            lost = len(set(self.pool.last.lost))
            warnings.warn(
                f"Ray workers that died and were replaced: {len(died)} ({died[-1]}); units that were sampled again, "
                f"with the same result: {lost} of {len(units)}",
                TrainingWarning,
                stacklevel=2,
            )
        return completions

    def update_weights(self, version: int, weights: Weights) -> None:
        """Send new weights to the actors, through the object store."""
        self.crew.load(version, packed(weights()))
        self.version = version

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        self.crew.close()
        if self._owned:
            self.crew.ray.shutdown()


def _connected(settings: SamplerConfig, weight_bytes: int) -> tuple[ModuleType, bool]:
    """Return (the module `ray`, connected to a cluster; whether the cluster was started here).

    A connection that this process already has is used.

    Args:
        weight_bytes: size of the weights.
    """
    with _environment():
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UserError("sampler.pool is ray, but Ray is not installed; pip install 'vineppo[ray]'") from error
        if ray.is_initialized():
            return ray, False
        options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if not settings.address:
            store = _STORED_VERSIONS * weight_bytes + _GIB // 4
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": store}
            if settings.workers:
                options["num_cpus"] = max(settings.workers, os.cpu_count() or 1)
        else:
            options["address"] = settings.address
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises Exception itself if a process of a local cluster does not start.
            raise UserError(_why_not_connected(settings.address, _last_line(error))) from error
    return ray, not settings.address


def _why_not_connected(address: str, reason: str) -> str:
    """Return the message for a cluster that cannot be reached, or that does not start if the address is empty."""
    if address:
        return (
            f"sampler.address: Ray could not connect to {address}: {reason}; start a cluster with `ray start --head` "
            "and give its address, such as auto or 10.0.0.1:6379, or leave sampler.address empty"
        )
    return (
        f"sampler.pool is ray, but Ray could not start a cluster on this machine: {reason}; try again when the machine "
        "is less busy, or start a cluster with `ray start --head` and set sampler.address to auto"
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Set environment variables for Ray, unless they are set. They stay set after the context.

    With them, Ray reports no usage to its makers, leaves the visible GPUs unchanged, and gives actors the priority of
    this process. By default, actors have a lower priority and would hardly run beside other work on the same machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    yield


def _default_size(ray: ModuleType, on_gpu: bool) -> int:
    """Return the number of actors if it is not set: one per GPU, or one per CPU core but one for the trainer."""
    resources = ray.cluster_resources()
    return int(resources.get("GPU", 0)) if on_gpu else max(1, int(resources.get("CPU", 1)) - 1)


def _check_size(ray: ModuleType, size: int, on_gpu: bool, settings: SamplerConfig) -> None:
    """Raise UserError if the cluster has not enough GPUs or CPU cores for the actors."""
    kind = "GPU" if on_gpu else "CPU"
    present = int(ray.cluster_resources().get(kind, 0))
    if on_gpu and not present:
        raise UserError(
            "model.device is a GPU, but the Ray cluster has none; add machines that have GPUs with "
            "`ray start --address ADDRESS`, or set model.device to cpu"
        )
    if not 0 < size <= present:
        raise UserError(
            f"sampler.workers is {settings.workers}, but the Ray cluster has {present} {kind}s and every worker needs "
            f"one; lower sampler.workers, or add machines to the cluster with `ray start --address ADDRESS`"
        )


def _check_adapters(policy: Policy) -> None:
    """Raise UserError for adapters on 16-bit weights, because the merged weights would lose small adapters."""
    if policy.adapters is not None and policy.model.dtype.itemsize == 2:
        dtype = str(policy.model.dtype).removeprefix("torch.")
        raise UserError(
            f"sampler.pool is ray, and model.dtype is {dtype}: adapters are merged into the weights that Ray workers "
            "get, and rounding to 16 bits removes most of what small adapters change; set model.dtype to float32, or "
            "sampler.pool to none"
        )


def _absolute(path: str) -> str:
    """Return the path of a directory as an absolute path, because actors have another working directory."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _last_line(error: BaseException) -> str:
    """Return the last line of an error that is not empty, without Ray's list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
