"""Say which settings make a run fit on a cluster: every proposal is computed with the same estimate of the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vineppo.config.settings import replace
from vineppo.plan.cluster_memory import PERMANENT, SAMPLING, UPDATE, USABLE, memory_per_gpu
from vineppo.plan.job import Job
from vineppo.plan.machines import Cluster
from vineppo.plan.shape import GIB

MOST_GPUS_PER_NODE, MOST_NODES = 8, 64
"""Largest cluster that is proposed."""


@dataclass(frozen=True)
class _Change:
    """Settings and machines that differ from those of the user."""

    words: tuple[str, ...]
    """What the user has to type."""
    job: Job
    """The run with these changes."""


def does_not_fit(job: Job) -> str:
    """Return a one-line error message with the kinds that take most of the memory, and settings that make it fit.

    The first setting that keeps the result is proposed. If there is none, the smallest larger cluster is proposed, and
    16-bit weights or adapters, which change the result.
    """
    memory, available = memory_per_gpu(job), USABLE * job.cluster.gpu.memory
    phase, own = ("sampling", SAMPLING) if memory["peak sampling"] >= memory["peak update"] else ("updates", UPDATE)
    largest = sorted((*PERMANENT, *own), key=lambda kind: -memory[kind])[:3]
    parts = ", ".join(f"{kind} {memory[kind] / GIB:.1f}" for kind in largest)
    needs = (
        f"a GPU needs about {memory['peak'] / GIB:.1f} GiB for {phase} ({parts}) and {available / GIB:.1f} of its "
        f"{job.cluster.gpu.memory / GIB:.0f} GiB can be used"
    )

    def first_that_fits(changes: Iterable[_Change]) -> str:
        fitting = (change for change in changes if memory_per_gpu(change.job)["peak"] <= available)
        return " and ".join(next((change.words for change in fitting), ()))

    start = _Change((), job)
    if kept := first_that_fits(_that_keep_the_result(start)):
        return f"{needs}; it fits with {kept} (the result is the same)"
    others = [words for words in map(first_that_fits, (_more_machines(start), _other_training(start))) if words]
    if others:
        return f"{needs}; it fits with {', or with '.join(others)}"
    return f"{needs}; no setting that plan knows makes it fit: take a smaller model or GPUs with more memory"


def _that_keep_the_result(start: _Change) -> Iterator[_Change]:
    """Yield changes of memory only: single ones, then all together."""
    yield from (*_smaller_caches(start), *_smaller_batches(start), *_checkpointing(start))
    batch = (_smaller_batches(start) or [start])[-1]
    cache = (_smaller_caches(batch) or [batch])[-1]
    yield (_checkpointing(cache) or [cache])[0]


def _more_machines(start: _Change) -> Iterator[_Change]:
    """Yield larger clusters, each as it is and then with changes that keep the result."""
    for cluster in _larger_clusters(start.job.cluster):
        job = dataclasses.replace(start.job, cluster=cluster)
        larger = _Change((*start.words, f"--cluster {cluster.name}"), job)
        yield larger
        yield from _that_keep_the_result(larger)


def _other_training(start: _Change) -> Iterator[_Change]:
    """Yield 16-bit weights, adapters, and both, each as it is and then with changes that keep the result."""
    model = start.job.config.model
    narrow = [_with(start, "model.dtype bfloat16", model=replace(model, dtype="bfloat16"))]
    if model.dtype != "float32":
        narrow = []
    adapters = [
        _with(base, "model.lora.r 16", model=replace(base.job.config.model, lora=replace(model.lora, r=16)))
        for base in [start, *narrow]
        if not model.lora.r
    ]
    for other in [*narrow, *adapters]:
        yield other
        yield from _that_keep_the_result(other)


def _with(start: _Change, word: str, **sections: object) -> _Change:
    """Return a change with one more word and changed sections of the configuration."""
    job = dataclasses.replace(start.job, config=replace(start.job.config, **sections))
    return _Change((*start.words, word), job)


def _smaller_caches(start: _Change) -> list[_Change]:
    """Return changes with smaller limits of keys and values, the largest first."""
    rollouts = start.job.config.rollouts
    sizes = [size for size in (32, 16, 8, 4, 2, 1) if size * GIB < start.job.kv_limit]
    return [
        _with(start, f"rollouts.kv_memory {size}", rollouts=replace(rollouts, kv_memory=float(size))) for size in sizes
    ]


def _smaller_batches(start: _Change) -> list[_Change]:
    """Return changes with smaller micro-batches, the largest first."""
    learner, length = start.job.config.learner, start.job.amounts.sequence_tokens
    sizes = [1 << k for k in range(17, 9, -1) if length <= 1 << k < learner.micro_batch_tokens]
    return [
        _with(start, f"learner.micro_batch_tokens {n}", learner=replace(learner, micro_batch_tokens=n)) for n in sizes
    ]


def _checkpointing(start: _Change) -> list[_Change]:
    """Return the change to gradient checkpointing, or nothing if it is used already."""
    model = start.job.config.model
    if model.gradient_checkpointing:
        return []
    return [_with(start, "model.gradient_checkpointing true", model=replace(model, gradient_checkpointing=True))]


def _larger_clusters(cluster: Cluster) -> list[Cluster]:
    """Return clusters with twice, four times, ... as many GPUs: first in a node, then in more nodes."""
    kind, found = cluster.name.split("x", 2)[2], []
    nodes, per_node = cluster.nodes, cluster.per_node
    while 2 * nodes <= MOST_NODES:
        nodes, per_node = (nodes, 2 * per_node) if 2 * per_node <= MOST_GPUS_PER_NODE else (2 * nodes, per_node)
        found.append(Cluster(f"{nodes}x{per_node}x{kind}", nodes, per_node, cluster.gpu, cluster.links))
    return found
