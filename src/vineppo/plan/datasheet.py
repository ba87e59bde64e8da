"""Plans for accelerators that are not in this machine, from their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.plan.amounts import Plan, guessed_amounts, iterations
from vineppo.plan.memory import memory_by_kind
from vineppo.plan.shape import GIB, Shape, kv_bytes, shape_by_name, trainable
from vineppo.types import UserError


@dataclass(frozen=True)
class Gpu:
    """Figures from the data sheet of an accelerator."""

    flops: float
    """Dense 16-bit floating-point operations per second."""
    bandwidth: float
    """Bytes per second."""
    memory: float
    """Bytes."""


GPUS = {
    "t4": Gpu(65e12, 0.32e12, 16 * GIB),
    "l4": Gpu(121e12, 0.30e12, 24 * GIB),
    "a10": Gpu(125e12, 0.60e12, 24 * GIB),
    "rtx4090": Gpu(165e12, 1.01e12, 24 * GIB),
    "a100": Gpu(312e12, 2.04e12, 80 * GIB),
    "h100": Gpu(989e12, 3.35e12, 80 * GIB),
    "h200": Gpu(989e12, 4.80e12, 141 * GIB),
}

_TRAINING, _DECODING = 0.12, 0.06
"""Shares of the data sheet's `flops` that training and decoding reach, derived from the seconds per iteration in the
VinePPO paper (dev/LOG.md)."""


def planned_for(config: Config, name: str, response_tokens: int | None) -> Plan:
    """Plan a run on an accelerator from its data sheet."""
    gpu, shape = _gpu(name), shape_by_name(config)
    amounts = guessed_amounts(config, response_tokens)
    length, mc_tokens, rows = (
        int(amounts.rollout_tokens / amounts.rollouts),
        amounts.mc_tokens,
        config.rollouts.max_rows,
    )
    trained = amounts.rollouts * amounts.sequence_tokens
    per_token = 2 * shape.parameters / (_TRAINING * gpu.flops)
    networks = 1 + find_algorithm(config.algorithm).needs_critic
    forward = trained * per_token * (1 + (config.learner.kl.coefficient > 0))
    seconds = {
        "sample": _decoding(shape, gpu, amounts.rollout_tokens, length, rows),
        "credit": _decoding(shape, gpu, mc_tokens, length, rows) if mc_tokens else (networks - 1) * trained * per_token,
        "update": forward + 3 * trained * per_token * config.learner.epochs * networks,
    }
    memory = memory_by_kind(config, shape, amounts, trainable=trainable(config, shape))
    source = f"rough estimate from the data sheet of {name}, {length} tokens per response"
    return Plan(source, amounts, seconds, iterations(config, amounts, seconds), memory, gpu.memory, ())


def _gpu(name: str) -> Gpu:
    """Figures of `h100`, or the sum of eight for `8xh100`, which assumes that parallelism has no cost."""
    count, _, kind = name.partition("x") if name.split("x")[0].isdigit() else ("1", "", name)
    if kind not in GPUS or int(count) < 1:
        raise UserError(f"unknown --gpu {name}; allowed: {', '.join(GPUS)}, or several of a kind, for example 8xh100")
    gpu, n = GPUS[kind], int(count)
    return Gpu(gpu.flops * n, gpu.bandwidth * n, gpu.memory * n)


def _decoding(shape: Shape, gpu: Gpu, tokens: float, length: int, rows: int) -> float:
    """Seconds to decode `tokens` in batches of `rows`: the larger of the times for arithmetic and for reading memory.

    Each decoding step reads the weights, and each token reads the keys and values before it.
    """
    batches = max(1.0, tokens / (rows * length))
    reading = batches * length * 2 * shape.parameters + tokens * length / 2 * kv_bytes(shape, 2)
    return max(2 * shape.parameters * tokens / (_DECODING * gpu.flops), reading / gpu.bandwidth)
