"""Estimate the memory of one GPU of a cluster.

Every GPU has a shard (an equal part) of the policy, of the optimizer, of the reference and of the value network, as
FSDP2 keeps them, and a sampler with whole weights, or with a part of them (tensor parallelism).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.model.logits import CHUNKED_FROM
from vineppo.model.output import CHUNK
from vineppo.plan.amounts import Amounts
from vineppo.plan.machines import Cluster
from vineppo.plan.memory import layer_bytes
from vineppo.plan.shape import GIB, Shape, count_trainable, kv_bytes

RUNTIME = 2 * GIB
"""Bytes of a GPU for the CUDA context, the libraries and the buffers of NCCL (assumed)."""
USABLE = 0.95
"""Share of the memory of a data sheet that a process can use: 139.8 of 141 GiB were visible on an H200 (measured), and
4% is left for fragmentation (assumed)."""

PERMANENT = ("runtime", "weights", "optimizer", "reference", "critic", "sampler weights")
"""Kinds of memory that are in use during the whole run."""
SAMPLING = ("keys and values", "next-token logits")
"""Kinds that are in use only while the sampler works."""
UPDATE = ("gradients", "gathered layers", "activations", "logits")
"""Kinds that are in use only during updates."""


def uses_vllm(config: Config) -> bool:
    """Return whether the sampler is vLLM, which keeps weights of its own and captures its decode step in a graph."""
    return str(config.sampler.engine) == "vllm"


def number_bytes(config: Config) -> int:
    """Return the number of bytes of a number of the model."""
    return 2 if config.model.dtype == "bfloat16" else 4


def sequences_per_sampler(count: float, cluster: Cluster, tensor_parallel: int) -> int:
    """Return how many of `count` sequences the busiest sampler gets; `tensor_parallel` GPUs share a sampler."""
    return math.ceil(count * tensor_parallel / cluster.ranks)


def rows_at_once(config: Config, shape: Shape, length: float, count: int, tensor_parallel: int) -> int:
    """Return how many of `count` sequences a sampler decodes at the same time.

    Args:
        length: mean number of tokens of a sequence with its prompt.
        tensor_parallel: number of GPUs of a sampler, which share the keys and values of a sequence.
    """
    bytes_per_row = length * kv_bytes(shape, number_bytes(config)) / tensor_parallel
    return max(1, min(count, config.rollouts.max_rows, int(config.rollouts.kv_memory * GIB / bytes_per_row)))


def memory_per_gpu(
    config: Config, shape: Shape, amounts: Amounts, cluster: Cluster, tensor_parallel: int
) -> dict[str, float]:
    """Estimate the bytes of one GPU for each purpose.

    Args:
        config: configuration of the run.
        shape: size of the model.
        amounts: amounts of one iteration.
        cluster: nodes, GPUs and links.
        tensor_parallel: number of GPUs over which a sampler splits its weights.
    Returns:
        Kind of memory -> bytes, for the kinds in PERMANENT, SAMPLING and UPDATE. `peak sampling` and `peak update` have
        the peaks of the two phases, `peak` the larger of them.
    """
    size, ranks = number_bytes(config), cluster.ranks
    lora, has_critic = config.model.lora.r > 0, find_algorithm(config.algorithm).needs_critic
    trainable = count_trainable(config, shape)
    masters = 4 if size == 2 and not lora else 0  # float32 copies of 16-bit weights, and of their gradients
    weights = shape.parameters * size / ranks
    optimizer = trainable * (8 + masters) / ranks
    gradients = trainable * ((4 if lora else size) + masters) / ranks
    copied = ranks > 1 or uses_vllm(config)  # otherwise the sampler computes with the weights of the policy
    count = max(amounts.rollouts, amounts.mc_tokens / max(1.0, amounts.rollout_tokens / amounts.rollouts / 2))
    rows = rows_at_once(
        config, shape, amounts.sequence_tokens, sequences_per_sampler(count, cluster, tensor_parallel), tensor_parallel
    )
    kinds = {
        "runtime": RUNTIME,
        "weights": weights,
        "optimizer": optimizer,
        "reference": weights if config.learner.kl.coefficient > 0 and not lora else 0.0,
        "critic": (0.0 if lora else weights) + optimizer if has_critic else 0.0,
        "sampler weights": shape.parameters * size / tensor_parallel if copied else 0.0,
        "keys and values": rows * amounts.sequence_tokens * kv_bytes(shape, size) / tensor_parallel,
        "next-token logits": float(rows * shape.vocabulary * 4),
        "gradients": gradients * (2 if has_critic else 1),
        "gathered layers": _gathered(shape, size, lora) if ranks > 1 else 0.0,
        **_kept_for_backward(config, shape, amounts, ranks),
    }
    return kinds | _peaks(kinds)


def _peaks(kinds: Mapping[str, float]) -> dict[str, float]:
    """Return the peaks of the two phases, and the larger one."""
    permanent = sum(kinds[kind] for kind in PERMANENT)
    sampling = permanent + sum(kinds[kind] for kind in SAMPLING)
    update = permanent + sum(kinds[kind] for kind in UPDATE)
    return {"peak sampling": sampling, "peak update": update, "peak": max(sampling, update)}


def block_parameters(shape: Shape) -> float:
    """Return the number of parameters of one transformer block, without biases and norms."""
    attention = 2 * shape.hidden * (shape.heads + shape.kv_heads) * shape.head_dim
    return attention + 3 * shape.hidden * shape.intermediate


def _gathered(shape: Shape, size: int, lora: bool) -> float:
    """Return the bytes of what FSDP2 gathers whole in an update.

    These are two blocks (the current one and the next, which is fetched ahead) and everything outside the blocks, which
    is the embeddings and the output layer, each with its gradients if all weights are trained.
    """
    block = block_parameters(shape)
    outside = shape.parameters - shape.layers * block
    return (1 if lora else 2) * size * (2 * block + outside)


def micro_batch(config: Config, amounts: Amounts, ranks: int) -> float:
    """Return the number of tokens of the largest micro-batch of one GPU."""
    own = math.ceil(min(config.learner.minibatch_size, amounts.rollouts) / ranks)
    return max(amounts.sequence_tokens, min(config.learner.micro_batch_tokens, own * amounts.sequence_tokens))


def _kept_for_backward(config: Config, shape: Shape, amounts: Amounts, ranks: int) -> dict[str, float]:
    """Return the bytes of activations and of logits in the forward and backward pass of a micro-batch."""
    size, tokens = number_bytes(config), micro_batch(config, amounts, ranks)
    trained = tokens * amounts.rollout_tokens / amounts.rollouts / amounts.sequence_tokens
    logits = trained * shape.vocabulary
    if logits >= CHUNKED_FROM:  # They are computed in chunks.
        logits = max(CHUNK, shape.vocabulary)
    # A logit with `size` bytes, its float32 copy and log-softmax, and the gradients of these two.
    return {"activations": tokens * layer_bytes(config, shape, size), "logits": float(logits * (size + 16))}
