"""Estimate the seconds of an iteration on a cluster, from measurements on one GPU and from the speeds of the links."""

from __future__ import annotations

import math

from vineppo.config.schema import Config
from vineppo.plan.datasheet import GPUS, separate_passes
from vineppo.plan.job import Job
from vineppo.plan.machines import Cluster
from vineppo.plan.shape import KNOWN, count_trainable, kv_bytes

MEASURED_ON = GPUS["h200"]
"""The GPU of docs/results/gpu."""
_UPDATED = KNOWN["Qwen/Qwen2.5-0.5B-Instruct"].parameters * 16 * 512
"""Parameters times tokens of the updates in docs/results/gpu/gpu.md: 16 sequences with 512 tokens."""
UPDATE_SECONDS = {
    ("bfloat16", False): 0.206,
    ("bfloat16", True): 0.317,
    ("float32", False): 0.854,
    ("float32", True): 0.984,
}
"""(dtype, whether with gradient checkpointing) -> seconds of such an update, forward, backward and optimizer, on an
NVIDIA H200 (docs/results/gpu/gpu.md, table `updates`)."""
LAUNCH_SECONDS = 0.03854 / 22
"""Seconds of a layer in a decode step of the PyTorch sampler, in which the GPU waits for the launch of small kernels:
38.54 ms for the 22 layers of a 1.1B model, nearly the same for 64 and for 2,048 rows
(docs/results/gpu/second/gpu.md)."""
WORKING = 0.23757870322340985
"""Share of the time of such a decode step in which the GPU works, for a 0.5B model and 512 rows
(docs/results/gpu/second/gpu.md, table `calls per token step`). CUDA graphs alone cannot shorten a step further."""
DECODING = 2 * 1_100_048_384 * 2048 / 0.03854 / MEASURED_ON.flops
"""Share of the data sheet's operations per second in that decode step with 2,048 rows, about 12%. It is a lower bound
of what decoding can reach, since the GPU waited."""
READING = 0.7
"""Share of the memory bandwidth of the data sheet at which weights, keys and values are read (assumed)."""
LINK = 0.7
"""Share of the data sheet's speed of a link that collective communication reaches (assumed)."""
RANK_0_SECONDS = 0.0002
"""Seconds of the first process for each completion: requests, decoding of texts, grading, credit, files. Measured for
the included task on a CPU (`docs/results/scale`); graders that compare formulas take longer."""


def training_seconds(config: Config, cluster: Cluster) -> float:
    """Return the seconds of one GPU for one token and one parameter in a training pass, from the measured update."""
    measured = UPDATE_SECONDS[config.model.dtype, config.model.gradient_checkpointing]
    return measured / _UPDATED * MEASURED_ON.flops / cluster.gpu.flops


def forward_seconds(config: Config, cluster: Cluster) -> float:
    """Return the seconds of one GPU for one token and one parameter in a forward pass.

    It is a third of a training pass without gradient checkpointing.
    """
    measured = UPDATE_SECONDS[config.model.dtype, False]
    return measured / 3 / _UPDATED * MEASURED_ON.flops / cluster.gpu.flops


def training_share(config: Config) -> float:
    """Return the share of the data sheet's 16-bit operations per second that the measured update reached.

    Forward and backward pass count as 6 operations per token and parameter, also where checkpointing computes more.
    """
    measured = UPDATE_SECONDS[config.model.dtype, config.model.gradient_checkpointing]
    return 6 * _UPDATED / measured / MEASURED_ON.flops


def iteration_seconds(job: Job) -> dict[str, dict[str, float]]:
    """Estimate the seconds of an iteration.

    Returns:
        Phase (`sample`, `credit`, `update` or `transfer`) -> part of the phase -> seconds. Nothing overlaps.
    """
    config, shape, amounts, cluster = job.config, job.shape, job.amounts, job.cluster
    length = amounts.rollout_tokens / amounts.rollouts
    continuations = amounts.mc_tokens / max(1.0, length / 2)
    forward = forward_seconds(config, cluster) * shape.parameters / cluster.ranks
    # With several nodes, every node receives all weights, even if each of its GPUs keeps a part of them.
    moved = shape.parameters * job.number_bytes / (job.tensor_parallel if cluster.nodes == 1 else 1)
    credit = {"continuations": 0.0, "prefixes": 0.0, "values": 0.0, "first process": RANK_0_SECONDS * continuations}
    if continuations:
        credit["continuations"] = decode_seconds(job, continuations, length / 2, amounts.prompt_tokens + length / 2)
        credit["prefixes"] = forward * amounts.rollouts * amounts.sequence_tokens
    if job.needs_critic:
        credit["values"] = forward * amounts.rollouts * amounts.sequence_tokens
    return {
        "sample": {
            "prompts": forward * config.rollouts.num_problems * amounts.prompt_tokens,
            "rollouts": decode_seconds(job, amounts.rollouts, length, amounts.prompt_tokens),
            "first process": RANK_0_SECONDS * amounts.rollouts,
        },
        "credit": credit,
        "update": update_seconds(job, forward),
        "transfer": {"weights to samplers": _gather(cluster, moved)},
    }


def decode_seconds(job: Job, count: float, mean: float, prompt: float) -> float:
    """Estimate the seconds in which the samplers decode `count` sequences with `mean` tokens on average.

    A sampler needs the longest of three times: the launches of its decode steps (PyTorch sampler only), the arithmetic,
    and reading. The number of decode steps is that of the longest response, which is assumed to have
    `rollouts.max_new_tokens` tokens. If not all sequences fit into one batch, the tokens divided by the rows of a batch
    are added, which is the bound of list scheduling (Graham 1969).

    Args:
        count: number of sequences, for all samplers.
        mean: mean number of decoded tokens of a sequence.
        prompt: mean number of tokens before these.
    """
    shape, speed, together = job.shape, job.cluster.gpu, job.tensor_parallel
    sequences = job.sequences_per_sampler(count)
    rows = job.rows_at_once(prompt + mean, sequences)
    tokens = sequences * mean
    steps = max(mean, job.config.rollouts.max_new_tokens) + (tokens / rows if sequences > rows else 0.0)
    size = job.number_bytes
    share = DECODING if size == 2 else DECODING * UPDATE_SECONDS["bfloat16", False] / UPDATE_SECONDS["float32", False]
    launches = 0.0 if job.uses_vllm else steps * shape.layers * LAUNCH_SECONDS
    arithmetic = 2 * shape.parameters * tokens / (share * speed.flops * together)
    read = steps * shape.parameters * size + tokens * (prompt + mean / 2) * kv_bytes(shape, size)
    return max(launches, arithmetic, read / (READING * speed.bandwidth * together))


def update_seconds(job: Job, forward: float) -> dict[str, float]:
    """Estimate the seconds of the parts of all updates of an iteration.

    The sequences of a minibatch are shared by all GPUs; the GPU with the most sequences determines the time. Every
    micro-batch gathers the weights twice (forward and backward) and reduces the gradients once, in float32.

    Args:
        forward: seconds of a forward pass for one token, if all GPUs share the tokens.
    """
    config, shape, amounts, cluster = job.config, job.shape, job.amounts, job.cluster
    length, own, networks = amounts.sequence_tokens, job.own_sequences, 1 + job.needs_critic
    batches = math.ceil(own * length / job.micro_batch)
    passes = separate_passes(config, amounts.rollouts)
    forward_batches = passes * amounts.rollouts * length / cluster.ranks / job.micro_batch
    weights = _gather(cluster, shape.parameters * job.number_bytes)
    gradients = _gather(cluster, count_trainable(config, shape) * 4.0)
    per_token = training_seconds(config, cluster) * shape.parameters
    return {
        "forward passes": passes * forward * amounts.rollouts * length,
        "training passes": networks * amounts.updates * own * length * per_token,
        "all-gather": weights * (2 * networks * amounts.updates * batches + forward_batches),
        "reduce-scatter": gradients * networks * amounts.updates * batches,
    }


def link_speed(cluster: Cluster) -> float:
    """Return the bytes per second at which every GPU receives data that are spread over all GPUs.

    It is the speed of one direction of a GPU's link to its node, or of the network of a node if that is slower: in
    NCCL's rings every byte enters a node once, by one of its adapters, and goes on from GPU to GPU.
    """
    inside = cluster.links.nvlink / 2
    return inside if cluster.nodes == 1 else min(inside, cluster.links.network)


def _gather(cluster: Cluster, size: float) -> float:
    """Return the seconds in which every GPU gathers `size` bytes that are spread over all GPUs, or reduces as many."""
    return size * (1 - 1 / cluster.ranks) / (LINK * link_speed(cluster))
