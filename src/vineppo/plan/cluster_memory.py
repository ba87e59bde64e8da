"""Estimate the memory of one GPU of a cluster.

Every GPU has a shard (an equal part) of the policy, of the optimizer, of the reference and of the value network, as
FSDP2 keeps them, and a whole copy of the policy (`learning.sharding`), with which the PyTorch sampler works. vLLM has
one more copy.
"""

from __future__ import annotations

from collections.abc import Mapping

from vineppo.model.logits import CHUNKED_FROM
from vineppo.model.output import CHUNK
from vineppo.plan.job import Job
from vineppo.plan.memory import largest_part, layer_bytes
from vineppo.plan.shape import GIB, Shape, count_trainable, kv_bytes

RUNTIME = 2 * GIB
"""Bytes of a GPU for the CUDA context, the libraries and the buffers of NCCL (assumed)."""
USABLE = 0.95
"""Share of the memory of a data sheet that a process can use: 139.8 of 141 GiB were visible on an H200 (measured), and
4% is left for fragmentation (assumed)."""

PERMANENT = ("runtime", "weights", "optimizer", "reference", "critic", "whole policy", "engine weights")
"""Kinds of memory that are in use during the whole run."""
SAMPLING = ("keys and values", "next-token logits")
"""Kinds that are in use only while the sampler works."""
UPDATE = ("gradients", "gathered layers", "activations", "logits")
"""Kinds that are in use only during updates."""


def memory_per_gpu(job: Job) -> dict[str, float]:
    """Estimate the bytes of one GPU for each purpose.

    With samplers that are split over several GPUs, which training cannot do yet, no GPU has the whole policy.

    Returns:
        Kind of memory -> bytes, for the kinds in PERMANENT, SAMPLING and UPDATE. `peak sampling` and `peak update` have
        the peaks of the two phases, `peak` the larger of them.
    """
    config, shape, amounts, size, ranks = job.config, job.shape, job.amounts, job.number_bytes, job.cluster.ranks
    lora = config.model.lora.r > 0
    trainable = count_trainable(config, shape)
    masters = 4 if size == 2 and not lora else 0  # float32 copies of 16-bit weights, and of some of their gradients
    whole = float(shape.parameters * size)
    weights = whole / ranks
    optimizer = trainable * (8 + masters) / ranks
    gradients = (trainable * (4 if lora else size) + masters * largest_part(trainable, shape)) / ranks
    count = max(amounts.rollouts, amounts.mc_tokens / max(1.0, amounts.rollout_tokens / amounts.rollouts / 2))
    rows = job.rows_at_once(amounts.sequence_tokens, job.sequences_per_sampler(count))
    kinds = {
        "runtime": RUNTIME,
        "weights": weights,
        "optimizer": optimizer,
        "reference": weights if config.learner.kl.coefficient > 0 and not lora else 0.0,
        "critic": (0.0 if lora else weights) + optimizer if job.needs_critic else 0.0,
        "whole policy": whole if ranks > 1 and job.tensor_parallel == 1 else 0.0,
        "engine weights": whole / job.tensor_parallel if job.uses_vllm else 0.0,
        "keys and values": rows * job.row_tokens(amounts.sequence_tokens) * kv_bytes(shape, size) / job.tensor_parallel,
        "next-token logits": float(rows * shape.vocabulary * 4),
        "gradients": gradients * (2 if job.needs_critic else 1),
        "gathered layers": _gathered(shape, size, lora) if ranks > 1 else 0.0,
        **_kept_for_backward(job),
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


def _kept_for_backward(job: Job) -> dict[str, float]:
    """Return the bytes of activations and of logits in the forward and backward pass of a micro-batch."""
    amounts, shape, size, tokens = job.amounts, job.shape, job.number_bytes, job.micro_batch
    trained = tokens * amounts.rollout_tokens / amounts.rollouts / amounts.sequence_tokens
    logits = trained * shape.vocabulary
    if logits >= CHUNKED_FROM:  # They are computed in chunks.
        logits = max(CHUNK, shape.vocabulary)
    # A logit with `size` bytes, its float32 copy and log-softmax, and the gradients of these two.
    return {"activations": tokens * layer_bytes(job.config, shape, size), "logits": float(logits * (size + 16))}
