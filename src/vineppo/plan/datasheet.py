"""Predict the seconds and memory of a run on an accelerator that this machine does not have.

The prediction is a rough estimate from the speed and memory in the data sheet of the accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.learning.objective import scored_in_training
from vineppo.plan.amounts import Plan, guessed_amounts, iterations
from vineppo.plan.memory import memory_by_kind
from vineppo.plan.shape import GIB, Shape, count_trainable, kv_bytes, shape_from_config
from vineppo.types import UserError


@dataclass(frozen=True)
class Gpu:
    """Speed and memory of an accelerator (or of several in parallel) according to its data sheet."""

    flops: float
    """16-bit floating-point operations per second, without sparsity."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""
    memory: float
    """Size of the memory in bytes."""


GPUS = {
    "t4": Gpu(65e12, 0.32e12, 16 * GIB),
    "l4": Gpu(121e12, 0.30e12, 24 * GIB),
    "a10": Gpu(125e12, 0.60e12, 24 * GIB),
    "rtx4090": Gpu(165e12, 1.01e12, 24 * GIB),
    "a100": Gpu(312e12, 2.04e12, 80 * GIB),
    "h100": Gpu(989e12, 3.35e12, 80 * GIB),
    "h200": Gpu(989e12, 4.80e12, 141 * GIB),
}
"""The accelerators that `vineppo plan --gpu` accepts, by name."""

TRAINING, DECODING = 0.12, 0.06
"""Shares of `Gpu.flops` that training and decoding (sampling) are assumed to reach. They were chosen so that the
predictions for the 1.1B model of the VinePPO paper come near the seconds per iteration that were reported for it. The
entry "What a data sheet says of the paper's runs" in dev/LOG.md compares the numbers."""


def planned_for(config: Config, name: str, response_tokens: int | None) -> Plan:
    """Predict a run on an accelerator from its data sheet.

    Args:
        config: configuration of the run.
        name: one of `GPUS`, such as `h100`, or several in parallel, such as `8xh100`.
        response_tokens: assumed number of tokens in a response. None assumes a third of `rollouts.max_new_tokens`.
    Raises:
        UserError: if the name is unknown, or the size of the model cannot be determined.
    """
    gpu, shape = gpu_of(name), shape_from_config(config)
    amounts = guessed_amounts(config, response_tokens)
    length, mc_tokens, rows = (
        int(amounts.rollout_tokens / amounts.rollouts),
        amounts.mc_tokens,
        config.rollouts.max_rows,
    )
    # Number of tokens of all prompts and responses. A forward pass takes two operations per token and parameter, and a
    # backward pass takes twice as long.
    trained = amounts.rollouts * amounts.sequence_tokens
    per_token = 2 * shape.parameters / (TRAINING * gpu.flops)
    # Number of networks: the policy, and the value network if the algorithm has one.
    networks = 1 + find_algorithm(config.algorithm).needs_critic
    forward = trained * per_token * separate_passes(config, amounts.rollouts)
    seconds = {
        "sample": decoding_seconds(shape, gpu, amounts.rollout_tokens, length, rows),
        "credit": decoding_seconds(shape, gpu, mc_tokens, length, rows)
        if mc_tokens
        else (networks - 1) * trained * per_token,
        "update": forward + 3 * trained * per_token * config.learner.epochs * networks,
    }
    memory = memory_by_kind(config, shape, amounts, count_trainable(config, shape), gpu.memory)
    source = f"rough estimate from the data sheet of {name}, {length} tokens per response"
    return Plan(source, amounts, seconds, iterations(config, amounts, seconds), memory, gpu.memory, ())


def separate_passes(config: Config, rollouts: float) -> float:
    """Return the number of forward passes over all samples of an iteration before its first update.

    The policy's pass gives the old log-probabilities. Samples of the first minibatch need none if their own training
    pass gives them (`scored_in_training`). The reference model's pass gives the KL term.

    Args:
        rollouts: number of rollouts per iteration.
    """
    learner, kl = config.learner, config.learner.kl
    with_kl = kl.share if kl.coefficient > 0 else 0.0
    dropout = config.model.lora.dropout > 0
    # Share of the samples that need no pass if they are in the first minibatch.
    joined = with_kl * scored_in_training(learner, True, dropout)
    joined += (1 - with_kl) * scored_in_training(learner, False, dropout)
    return 1 - joined * min(1.0, learner.minibatch_size / rollouts) + with_kl


def gpu_of(name: str) -> Gpu:
    """Return the speed and memory of an accelerator such as `h100`, or of several in parallel such as `8xh100`.

    Several accelerators are assumed to have the sum of their speeds and memories, without any cost of communication.

    Raises:
        UserError: if the name is unknown.
    """
    count, _, kind = name.partition("x") if name.split("x")[0].isdigit() else ("1", "", name)
    if kind not in GPUS or int(count) < 1:
        raise UserError(
            f"unknown --gpu {name}; allowed: {', '.join(GPUS)}, or a number of one of them, for example 8xh100"
        )
    gpu, n = GPUS[kind], int(count)
    return Gpu(gpu.flops * n, gpu.bandwidth * n, gpu.memory * n)


def decoding_seconds(shape: Shape, gpu: Gpu, tokens: float, length: int, rows: int) -> float:
    """Estimate the seconds to decode a number of tokens.

    The result is the time for arithmetic or the time for reading memory, whichever is larger. Each decoding step reads
    all weights once. To decode one token, the KV cache of the earlier tokens of its response is read.

    Args:
        shape: size of the model.
        gpu: speed of the accelerator.
        tokens: total number of tokens to decode.
        length: number of tokens in each response.
        rows: number of responses that are decoded at the same time.
    """
    batches = max(1.0, tokens / (rows * length))
    # Bytes that are read. Weights and KV cache have 2 bytes per number, and half of a response is cached on average.
    reading = batches * length * 2 * shape.parameters + tokens * length / 2 * kv_bytes(shape, 2)
    return max(2 * shape.parameters * tokens / (DECODING * gpu.flops), reading / gpu.bandwidth)
