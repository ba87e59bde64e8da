"""Estimate how much memory a run needs for the weights, the optimizer, the KV cache and other purposes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.learning.optim import PART
from vineppo.model.hardware import KV_MEMORY_ON_CPU, kv_memory_in
from vineppo.plan.amounts import Amounts
from vineppo.plan.shape import GIB, Shape, kv_bytes


def memory_by_kind(
    config: Config, shape: Shape, amounts: Amounts, trainable: int, gpu_memory: float = 0.0
) -> dict[str, float]:
    """Estimate how many bytes of memory a run needs for each purpose.

    Sampling and updating do not happen at the same time. So the peak contains only the larger of their two amounts of
    memory.

    Args:
        config: configuration of the run.
        shape: size of the model.
        amounts: amounts of one iteration.
        trainable: number of trainable parameters.
        gpu_memory: bytes of the GPU's memory, which decides on the default of `rollouts.kv_memory`; 0 for a CPU.
    Returns:
        Kind of memory -> bytes. `keys and values` and `sampling` are in use only during sampling, and `gradients` and
        `activations` only during updates. `peak` is the peak of the whole run.
    """
    # Bytes per number of the model's weights.
    size = 2 if config.model.dtype == "bfloat16" else 4
    lora, has_critic = config.model.lora.r > 0, find_algorithm(config.algorithm).needs_critic
    weights = shape.parameters * size
    # Bytes per number of the trained weights. LoRA adapters are float32, also if the other weights have 16 bits.
    trained_size = 4 if lora else size
    # AdamW keeps two moments. For 16-bit weights there are also float32 copies of the weights, and of the gradients of
    # some weights at a time.
    optimizer = trainable * (8 + (4 if trained_size == 2 else 0))
    gradients = trainable * trained_size + (4 * largest_part(trainable, shape) if trained_size == 2 else 0)
    reference = weights if config.learner.kl.coefficient > 0 and not lora else 0
    critic = (trainable * trained_size if lora else weights) + optimizer + gradients if has_critic else 0.0
    length = amounts.sequence_tokens
    # Number of sequences that are sampled at the same time. MC rollouts are assumed to have half the mean length of a
    # sequence.
    rows = min(config.rollouts.max_rows, max(amounts.rollouts, amounts.mc_tokens / max(1.0, length / 2)))
    # On a GPU, the PyTorch sampler reserves the budget of the longest sequence for each.
    reserved = amounts.prompt_tokens + config.rollouts.max_new_tokens
    row = max(length, reserved) if gpu_memory and config.sampler.engine != "vllm" else length
    kv = min(kv_limit(config, gpu_memory, gpu_memory - weights - optimizer), rows * row * kv_bytes(shape, size))
    # The logits of one decoding step, for at most 4096 sequences.
    logits = min(rows, 1 << 12) * shape.vocabulary * size
    # On a CPU, the sampler copies the weights if they have 16 bits or LoRA adapters (see sampling/torch/packed.py).
    packed = weights if config.model.device == "cpu" and (size == 2 or lora) else 0
    tokens = _micro_batch(config, amounts)
    activations = _activations(config, shape, size, tokens, amounts.rollout_tokens / amounts.rollouts / length)
    runtime = 0.6 * GIB  # the interpreter, PyTorch and transformers
    permanent = runtime + weights + optimizer + reference + critic
    return {
        "runtime": runtime,
        "weights": weights,
        "optimizer": optimizer,
        "gradients": gradients,
        "reference": reference,
        "critic": critic,
        "keys and values": kv,
        "sampling": logits + packed,
        "activations": activations,
        "peak": permanent + max(kv + logits + packed, gradients + activations),
    }


def largest_part(trainable: int, shape: Shape) -> int:
    """Return how many 16-bit weights are updated at once: a part, or the embeddings if these are more.

    Args:
        trainable: number of trainable parameters.
    """
    return min(trainable, max(PART, shape.vocabulary * shape.hidden))


def kv_limit(config: Config, gpu_memory: float, room: float) -> float:
    """Return the maximum number of bytes of keys and values of a sampler.

    Args:
        gpu_memory: bytes of the memory of a GPU; 0 for a CPU.
        room: bytes of it that weights and optimizer states leave.
    """
    if config.rollouts.kv_memory is not None:
        return config.rollouts.kv_memory * GIB
    return float(kv_memory_in(room) if gpu_memory else KV_MEMORY_ON_CPU)


def _micro_batch(config: Config, amounts: Amounts) -> float:
    """Return the number of tokens in the largest micro-batch, that is, in one forward and backward pass."""
    return min(config.learner.micro_batch_tokens, amounts.rollouts * amounts.sequence_tokens)


def _activations(config: Config, shape: Shape, size: int, tokens: float, trained_share: float) -> float:
    """Estimate the bytes that the forward pass of a micro-batch keeps for the backward pass.

    These bytes contain the activations of all layers and the logits of the trained tokens.

    Args:
        config: configuration of the run.
        shape: size of the model.
        size: number of bytes per activation.
        tokens: number of tokens in the micro-batch.
        trained_share: share of the tokens that are trained, that is, response tokens.
    """
    # For each trained token and each token of the vocabulary, a logit with `size` bytes is kept, and 16 more bytes: a
    # float32 copy of the logit, its log-softmax, and the gradients of these two.
    return tokens * layer_bytes(config, shape, size) + tokens * trained_share * shape.vocabulary * (size + 16)


def layer_bytes(config: Config, shape: Shape, size: int) -> float:
    """Estimate the bytes per token that the layers keep for the backward pass.

    Args:
        config: configuration of the run.
        shape: size of the model.
        size: number of bytes per activation.
    """
    # Bytes for one layer.
    layer = (10 * shape.hidden + 4 * shape.intermediate + 4 * shape.heads * shape.head_dim) * size
    if config.model.gradient_checkpointing:
        # Only the input of each layer is kept. The backward pass computes the activations of one layer at a time again.
        return shape.hidden * size * shape.layers + layer
    return layer * shape.layers


def gpu_memory_of(device: str) -> float:
    """Return the memory of a device in bytes if it is a CUDA GPU, or 0."""
    return available_memory(device) if device.startswith("cuda") else 0.0


def available_memory(device: str) -> float:
    """Return the total memory of a device in bytes, or 0 if it is unknown.

    Args:
        device: a PyTorch device such as `cuda:0`. For the CPU, a memory limit of a container counts too.
    """
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemTotal"))
    except (OSError, StopIteration):
        return 0.0
    try:  # This file has the memory limit of a container.
        return min(total, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # There is no limit. The file is missing or contains the word `max`.
        return total


def does_not_fit(config: Config, amounts: Amounts, memory: Mapping[str, float], available: float) -> str:
    """Return a one-line error message which says that a run does not fit into memory and proposes a setting.

    A setting that does not change the result is preferred.

    Args:
        config: configuration of the run.
        amounts: amounts of one iteration.
        memory: kind of memory -> bytes, as returned by `memory_by_kind`.
        available: available memory in bytes.
    """
    peak = memory["peak"]
    needs = f"the run needs about {peak / GIB:.1f} GiB of memory and {available / GIB:.1f} GiB are available"
    # The memory that is in use during the whole run, and the memory that is left for sampling or for updating.
    permanent = peak - max(memory["keys and values"] + memory["sampling"], memory["gradients"] + memory["activations"])
    room = available - permanent
    if memory["gradients"] + memory["activations"] > room > memory["gradients"]:
        tokens = _micro_batch(config, amounts)
        fitting = tokens * (room - memory["gradients"]) / memory["activations"]
        if fitting >= amounts.sequence_tokens:
            return f"{needs}; it fits with learner.micro_batch_tokens {int(fitting)} (the result is the same)"
        return f"{needs}; try model.gradient_checkpointing true, or model.lora.r 16"
    if memory["keys and values"] + memory["sampling"] > room > memory["sampling"]:
        fitting = (room - memory["sampling"]) / GIB
        return f"{needs}; it fits with rollouts.kv_memory {fitting:.1f} (the result is the same)"
    smaller = "model.dtype bfloat16" if config.model.dtype == "float32" else "a smaller model or a larger machine"
    return f"{needs}; try {'' if config.model.lora.r else 'model.lora.r 16, or '}{smaller}"
