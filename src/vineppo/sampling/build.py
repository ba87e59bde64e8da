"""Choose and build the sampler that generates with the weights of a policy in the same process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import distributed as dist

from vineppo.config.schema import RolloutConfig, SamplerConfig
from vineppo.model.hardware import KV_MEMORY_ON_CPU, cpu_multiplies, kv_memory_in
from vineppo.sampling.engine.families import unsupported
from vineppo.sampling.engine.library import Library, load, why_not_loaded
from vineppo.sampling.engine.sampler import EngineSampler
from vineppo.sampling.language_model import LanguageModel
from vineppo.sampling.torch.pace import Pace, pace_of
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.sampling.vllm import VLLMSampler, require_vllm
from vineppo.types import Sampler, UserError

Engine = Literal["auto", "engine", "torch"]


def sampler_of(policy: LanguageModel, settings: SamplerConfig, rollouts: RolloutConfig) -> Sampler:
    """Build the sampler that the settings of a run select, for the weights of a policy.

    Raises:
        UserError: if the engine that `settings` names cannot be used.
    """
    kv_memory = default_kv_memory(policy) if rollouts.kv_memory is None else int(rollouts.kv_memory * 2**30)
    if settings.engine == "vllm":
        return VLLMSampler(policy, settings.vllm, max_rows=rollouts.max_rows, kv_memory=kv_memory)
    pace = pace_of(policy.device, settings.check_every, settings.graph)
    return build_sampler(policy, settings.engine, max_rows=rollouts.max_rows, kv_memory=kv_memory, pace=pace)


def build_sampler(
    policy: LanguageModel,
    engine: Engine = "auto",
    *,
    max_rows: int = 2048,
    kv_memory: int | None = None,
    pace: Pace | None = None,
) -> Sampler:
    """Build the sampler for a policy.

    Args:
        policy: the policy, whose weights the sampler uses.
        engine: `engine` for the compiled engine, `torch` for the PyTorch sampler; `auto`: the compiled engine if it can
            be used and is faster, or else the PyTorch sampler.
        max_rows: maximum number of sequences that are decoded at the same time.
        kv_memory: maximum number of bytes of keys and values; None: `default_kv_memory`.
        pace: when the PyTorch sampler looks at its tokens; None: `pace_of` the device of the policy.
    Raises:
        UserError: if `engine` is "engine" and the compiled engine cannot be used.
    """
    reason = why_torch(policy, engine)
    if reason and engine == "engine":
        raise UserError(f"sampler.engine is engine, but {reason}; set sampler.engine to auto or torch")
    library, kv_memory = _library_of(policy), kv_memory or default_kv_memory(policy)
    if library is None or reason:
        return TorchSampler(policy, max_rows=max_rows, kv_memory=kv_memory, pace=pace)
    return EngineSampler(policy, library, max_rows=max_rows, kv_memory=kv_memory)


def default_kv_memory(policy: LanguageModel) -> int:
    """Return the default of `rollouts.kv_memory` in bytes, for the memory of the policy's device.

    The optimizer states of the trainable weights are taken into account whether they exist already or not, so that the
    result is the same at the start of a run and when the run is resumed.
    """
    if policy.device.type != "cuda":
        return KV_MEMORY_ON_CPU
    free, total = torch.cuda.mem_get_info(policy.device)
    others = total - free - torch.cuda.memory_reserved(policy.device)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return kv_memory_in(total - others - bytes_for_training(policy.model.parameters(), ranks))


def bytes_for_training(parameters: Iterable[torch.Tensor], ranks: int) -> float:
    """Return the bytes of weights, and of the optimizer states of those that are trained, gradients excluded.

    AdamW keeps two float32 numbers per trained weight, and for a 16-bit weight also a float32 copy.

    Args:
        ranks: number of processes. If there are several, each has a whole copy of the weights, and a shard of the
            weights and of the optimizer states.
    """
    total = 0.0
    for parameter in parameters:
        size, trained = parameter.dtype.itemsize, parameter.requires_grad
        states = (8 + 4 * (size == 2)) * trained
        total += parameter.numel() * (size + (states + size * (ranks > 1)) / ranks)
    return total


def why_torch(policy: LanguageModel, engine: Engine | Literal["vllm"]) -> str:
    """Return why `build_sampler` builds the PyTorch sampler, or an empty text if it builds the compiled engine."""
    if engine == "torch":
        return "sampler.engine is torch"
    library, dtype = _library_of(policy), policy.model.dtype
    if library is None:
        return why_not_loaded()
    if engine == "auto" and dtype != torch.float32 and not library.bf16 and cpu_multiplies(dtype):
        return f"this processor multiplies {str(dtype).removeprefix('torch.')} faster than float32"
    return unsupported(policy.model)


def _library_of(policy: LanguageModel) -> Library | None:
    """Return the compiled library for a policy: one with bfloat16 for a model in bfloat16, or else one with float32.

    A model with adapters is computed in float32. Its adapters are added to the weights, and bfloat16 would lose small
    ones.
    """
    adapted = getattr(policy, "adapters", None) is not None
    bf16 = load(bf16=True) if policy.model.dtype == torch.bfloat16 and not adapted else None
    return bf16 or load()


def sampler_line(policy: LanguageModel, engine: Engine | Literal["vllm"]) -> str:
    """Return one line that says which sampler is built, and why."""
    if engine == "vllm":
        return f"sampling with vLLM {require_vllm()}, which takes half a minute or more to start"
    if reason := why_torch(policy, engine):
        return f"sampling with PyTorch: {reason}"
    library = _library_of(policy)
    return f"sampling with the compiled engine ({library.instructions if library else ''})"
