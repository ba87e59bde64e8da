"""Say which settings make a run fit on a cluster: every proposal is computed with the same estimate of the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vineppo.config.schema import Config
from vineppo.config.settings import replace
from vineppo.plan.amounts import Amounts
from vineppo.plan.cluster_memory import PERMANENT, SAMPLING, UPDATE, USABLE, memory_per_gpu
from vineppo.plan.machines import Cluster
from vineppo.plan.shape import GIB, Shape

MOST_GPUS_PER_NODE, MOST_NODES = 8, 64
"""Largest cluster that is proposed."""


@dataclass(frozen=True)
class _Change:
    """Settings and machines that differ from those of the user."""

    words: tuple[str, ...]
    """What the user has to type."""
    config: Config
    cluster: Cluster
    tensor_parallel: int


def does_not_fit(config: Config, shape: Shape, amounts: Amounts, cluster: Cluster, tensor_parallel: int) -> str:
    """Return a one-line error message with the kinds that take most of the memory, and settings that make it fit.

    The first setting that keeps the result is proposed. If there is none, the smallest larger cluster is proposed, and
    16-bit weights or adapters, which change the result.
    """
    memory = memory_per_gpu(config, shape, amounts, cluster, tensor_parallel)
    phase, own = ("sampling", SAMPLING) if memory["peak sampling"] >= memory["peak update"] else ("updates", UPDATE)
    largest = sorted((*PERMANENT, *own), key=lambda kind: -memory[kind])[:3]
    parts = ", ".join(f"{kind} {memory[kind] / GIB:.1f}" for kind in largest)
    needs = (
        f"a GPU needs about {memory['peak'] / GIB:.1f} GiB for {phase} ({parts}) and "
        f"{USABLE * cluster.gpu.memory / GIB:.1f} of its {cluster.gpu.memory / GIB:.0f} GiB can be used"
    )

    def first_that_fits(changes: Iterable[_Change]) -> str:
        for change in changes:
            peak = memory_per_gpu(change.config, shape, amounts, change.cluster, change.tensor_parallel)["peak"]
            if peak <= USABLE * cluster.gpu.memory:
                return " and ".join(change.words)
        return ""

    start = _Change((), config, cluster, tensor_parallel)
    if kept := first_that_fits(_that_keep_the_result(start, shape, amounts)):
        note = "needs vLLM, which splits a sampler" if "--tensor_parallel" in kept else "the result is the same"
        return f"{needs}; it fits with {kept} ({note})"
    machines = first_that_fits(_more_machines(start, shape, amounts))
    others = [words for words in (machines, first_that_fits(_other_training(start, shape, amounts))) if words]
    if others:
        return f"{needs}; it fits with {', or with '.join(others)}"
    return f"{needs}; no setting that plan knows makes it fit: take a smaller model or GPUs with more memory"


def _that_keep_the_result(start: _Change, shape: Shape, amounts: Amounts) -> Iterator[_Change]:
    """Yield changes of memory only: single ones, then pairs of them, then all together."""
    splits = _splits(start, shape)
    yield from (*_smaller_caches(start), *_smaller_batches(start, amounts), *_checkpointing(start), *splits)
    for split in splits:
        yield from (*_smaller_caches(split), *_smaller_batches(split, amounts), *_checkpointing(split))
    for split in [start, *splits]:
        batch = (_smaller_batches(split, amounts) or [split])[-1]
        cache = (_smaller_caches(batch) or [batch])[-1]
        yield (_checkpointing(cache) or [cache])[0]


def _more_machines(start: _Change, shape: Shape, amounts: Amounts) -> Iterator[_Change]:
    """Yield larger clusters, each as it is and then with changes that keep the result."""
    for cluster in _larger_clusters(start.cluster):
        larger = dataclasses.replace(start, words=(f"--cluster {cluster.name}",), cluster=cluster)
        yield larger
        yield from _that_keep_the_result(larger, shape, amounts)


def _other_training(start: _Change, shape: Shape, amounts: Amounts) -> Iterator[_Change]:
    """Yield 16-bit weights, adapters, and both, each as it is and then with changes that keep the result."""
    model = start.config.model
    narrow = [_with(start, "model.dtype bfloat16", model=replace(model, dtype="bfloat16"))]
    if model.dtype != "float32":
        narrow = []
    adapters = [
        _with(base, "model.lora.r 16", model=replace(base.config.model, lora=replace(model.lora, r=16)))
        for base in [start, *narrow]
        if not model.lora.r
    ]
    for other in [*narrow, *adapters]:
        yield other
        yield from _that_keep_the_result(other, shape, amounts)


def _with(start: _Change, word: str, **sections: object) -> _Change:
    """Return a change with one more word and changed sections of the configuration."""
    return dataclasses.replace(start, words=(*start.words, word), config=replace(start.config, **sections))


def _smaller_caches(start: _Change) -> list[_Change]:
    """Return changes with smaller limits of keys and values, the largest first."""
    rollouts = start.config.rollouts
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size < rollouts.kv_memory]
    return [
        _with(start, f"rollouts.kv_memory {size}", rollouts=replace(rollouts, kv_memory=float(size))) for size in sizes
    ]


def _smaller_batches(start: _Change, amounts: Amounts) -> list[_Change]:
    """Return changes with smaller micro-batches, the largest first."""
    learner = start.config.learner
    sizes = [1 << k for k in range(17, 9, -1) if amounts.sequence_tokens <= 1 << k < learner.micro_batch_tokens]
    return [
        _with(start, f"learner.micro_batch_tokens {n}", learner=replace(learner, micro_batch_tokens=n)) for n in sizes
    ]


def _checkpointing(start: _Change) -> list[_Change]:
    """Return the change to gradient checkpointing, or nothing if it is used already."""
    model = start.config.model
    if model.gradient_checkpointing:
        return []
    return [_with(start, "model.gradient_checkpointing true", model=replace(model, gradient_checkpointing=True))]


def _splits(start: _Change, shape: Shape) -> list[_Change]:
    """Return changes in which more GPUs share a sampler, as far as GPUs of a node and attention heads can be split."""
    per_node, current = start.cluster.per_node, start.tensor_parallel
    sizes = [1 << k for k in range(per_node.bit_length()) if 1 << k > current]
    return [
        dataclasses.replace(start, words=(*start.words, f"--tensor_parallel {n}"), tensor_parallel=n)
        for n in sizes
        if per_node % n == 0 and shape.heads % n == 0
    ]


def _larger_clusters(cluster: Cluster) -> list[Cluster]:
    """Return clusters with twice, four times, ... as many GPUs: first in a node, then in more nodes."""
    kind, found = cluster.name.split("x", 2)[2], []
    nodes, per_node = cluster.nodes, cluster.per_node
    while 2 * nodes <= MOST_NODES:
        nodes, per_node = (nodes, 2 * per_node) if 2 * per_node <= MOST_GPUS_PER_NODE else (2 * nodes, per_node)
        found.append(Cluster(f"{nodes}x{per_node}x{kind}", nodes, per_node, cluster.gpu, cluster.links))
    return found
