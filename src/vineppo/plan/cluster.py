"""Predict the memory and the seconds of a run on a cluster, and say which setting makes a run fit that does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.config.settings import replace
from vineppo.plan.amounts import Amounts, guessed_amounts, iterations
from vineppo.plan.assumptions import Assumption, assumptions_of
from vineppo.plan.cluster_memory import PERMANENT, SAMPLING, USABLE, memory_per_gpu, sequences_per_sampler
from vineppo.plan.cluster_seconds import iteration_seconds
from vineppo.plan.machines import Cluster
from vineppo.plan.shape import GIB, Shape, shape_from_config
from vineppo.types import UserError


@dataclass(frozen=True)
class ClusterPlan:
    """The prediction for a run on a cluster."""

    cluster: Cluster
    """Nodes, GPUs and links."""
    tensor_parallel: int
    """Number of GPUs over which a sampler splits its weights."""
    shape: Shape
    """Size of the model."""
    amounts: Amounts
    """Rollouts, tokens and updates of one iteration."""
    memory: Mapping[str, float]
    """Kind of memory -> bytes of one GPU, see `cluster_memory.memory_per_gpu`."""
    available: float
    """Bytes of one GPU that the run can use."""
    seconds: Mapping[str, Mapping[str, float]]
    """Phase -> part -> seconds of one iteration, see `cluster_seconds.iteration_seconds`."""
    iterations: int
    """Number of iterations of the run."""
    limits: Sequence[str]
    """What more GPUs would not make faster, in sentences."""
    assumptions: Sequence[Assumption]
    """Every number that the prediction uses and that is not a setting, with its source."""

    @property
    def phases(self) -> dict[str, float]:
        """Phase -> seconds of one iteration."""
        return {phase: sum(parts.values()) for phase, parts in self.seconds.items()}

    @property
    def seconds_per_iteration(self) -> float:
        """Seconds of one iteration, summed over all phases."""
        return sum(self.phases.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary that can be written as JSON."""
        figures = asdict(self)
        figures["cluster"]["links"]["given"] = sorted(self.cluster.links.given)
        return {**figures, "phases": self.phases, "seconds_per_iteration": self.seconds_per_iteration}


def cluster_plan(
    config: Config, cluster: Cluster, *, tensor_parallel: int = 1, response_tokens: int | None = None
) -> ClusterPlan:
    """Predict a run on a cluster.

    Args:
        config: configuration of the run.
        cluster: nodes, GPUs and links.
        tensor_parallel: number of GPUs over which a sampler splits its weights; 1 gives every GPU a whole copy.
        response_tokens: mean number of tokens in a response. None assumes a third of `rollouts.max_new_tokens`.
    Raises:
        UserError: if the size of the model cannot be determined, the GPUs of a node or the attention heads cannot be
            split in this way, or the run does not fit into memory. In the last case, the message proposes settings.
    """
    shape, amounts = shape_from_config(config), guessed_amounts(config, response_tokens)
    if cluster.per_node % tensor_parallel or shape.heads % tensor_parallel:
        raise UserError(
            f"--tensor_parallel is {tensor_parallel}; it must divide the {cluster.per_node} GPUs of a node and the "
            f"{shape.heads} attention heads of the model"
        )
    memory = memory_per_gpu(config, shape, amounts, cluster, tensor_parallel)
    available = USABLE * cluster.gpu.memory
    if memory["peak"] > available:
        raise UserError(_does_not_fit(config, shape, amounts, cluster, tensor_parallel))
    seconds = iteration_seconds(config, shape, amounts, cluster, tensor_parallel)
    phases = {phase: sum(parts.values()) for phase, parts in seconds.items()}
    return ClusterPlan(
        cluster=cluster,
        tensor_parallel=tensor_parallel,
        shape=shape,
        amounts=amounts,
        memory=memory,
        available=available,
        seconds=seconds,
        iterations=iterations(config, amounts, phases),
        limits=_limits(config, amounts, cluster, tensor_parallel, seconds),
        assumptions=assumptions_of(config, cluster, amounts),
    )


def _limits(
    config: Config,
    amounts: Amounts,
    cluster: Cluster,
    tensor_parallel: int,
    seconds: Mapping[str, Mapping[str, float]],
) -> list[str]:
    """Return what more GPUs would not make faster, in sentences."""
    found = []
    minibatch, ranks = min(config.learner.minibatch_size, amounts.rollouts), cluster.ranks
    own = math.ceil(minibatch / ranks)
    if own * ranks > minibatch:
        found.append(
            f"a minibatch has {minibatch} sequences for {ranks} GPUs, so {1 - minibatch / (own * ranks):.0%} of their "
            "time in updates is not used"
        )
    samplers = ranks // tensor_parallel
    if sequences_per_sampler(amounts.rollouts, cluster, tensor_parallel) == 1 and samplers > 1:
        found.append(
            f"{amounts.rollouts} rollouts for {samplers} samplers: one response is the least that a sampler takes"
        )
    total = sum(sum(parts.values()) for parts in seconds.values())
    serial = sum(parts.get("first process", 0.0) for parts in seconds.values())
    if serial > 0.1 * total:
        found.append(f"the first process works alone for {serial / total:.0%} of an iteration")
    moved = seconds["update"]["all-gather"] + seconds["update"]["reduce-scatter"] + sum(seconds["transfer"].values())
    if moved > 0.2 * total:
        found.append(f"moving weights and gradients takes {moved / total:.0%} of an iteration")
    return found


def _does_not_fit(config: Config, shape: Shape, amounts: Amounts, cluster: Cluster, tensor_parallel: int) -> str:
    """Return a one-line error message with the kinds that take most of the memory, and settings that make it fit."""
    memory = memory_per_gpu(config, shape, amounts, cluster, tensor_parallel)
    available = USABLE * cluster.gpu.memory
    phase = "sampling" if memory["peak sampling"] >= memory["peak update"] else "updates"
    only = SAMPLING if phase == "sampling" else ("gradients", "gathered layers", "activations", "logits")
    largest = sorted((*PERMANENT, *only), key=lambda kind: -memory[kind])[:3]
    parts = ", ".join(f"{kind} {memory[kind] / GIB:.1f}" for kind in largest)
    needs = (
        f"a GPU needs about {memory['peak'] / GIB:.1f} GiB for {phase} ({parts}) and {available / GIB:.1f} of its "
        f"{cluster.gpu.memory / GIB:.0f} GiB can be used"
    )
    for change, changed, machines, parallel in _changes(config, cluster, shape, amounts, tensor_parallel):
        if memory_per_gpu(changed, shape, amounts, machines, parallel)["peak"] <= USABLE * machines.gpu.memory:
            return f"{needs}; it fits with {change}"
    return f"{needs}; no setting that plan knows makes it fit: take a smaller model or GPUs with more memory"


def _changes(
    config: Config, cluster: Cluster, shape: Shape, amounts: Amounts, tensor_parallel: int
) -> Iterator[tuple[str, Config, Cluster, int]]:
    """Yield (change in words, configuration, cluster, tensor parallelism), first changes that keep the result.

    First one change at a time, then all changes together that keep the result, then these with more nodes, adapters,
    and 16-bit weights.
    """
    kept, words = config, list[str]()
    caches = [size for size in (32, 16, 8, 4, 2, 1) if size < config.rollouts.kv_memory]
    for size in caches:
        smaller = replace(config, rollouts=replace(config.rollouts, kv_memory=float(size)))
        yield f"rollouts.kv_memory {size}", smaller, cluster, tensor_parallel
    batches = [
        n
        for n in (1 << k for k in range(17, 9, -1))
        if amounts.sequence_tokens <= n < config.learner.micro_batch_tokens
    ]
    for n in batches:
        smaller = replace(config, learner=replace(config.learner, micro_batch_tokens=n))
        yield f"learner.micro_batch_tokens {n}", smaller, cluster, tensor_parallel
    if not config.model.gradient_checkpointing:
        kept = replace(kept, model=replace(kept.model, gradient_checkpointing=True))
        words.append("model.gradient_checkpointing true")
        yield words[-1], kept, cluster, tensor_parallel
    splits = [n for n in _splits(cluster, shape) if n > tensor_parallel]
    for n in splits:
        yield f"--tensor_parallel {n}", config, cluster, n
    if batches:
        kept = replace(kept, learner=replace(kept.learner, micro_batch_tokens=batches[-1]))
        words.append(f"learner.micro_batch_tokens {batches[-1]}")
    if caches and caches[-1] < 4 < config.rollouts.kv_memory:
        kept = replace(kept, rollouts=replace(kept.rollouts, kv_memory=4.0))
        words.append("rollouts.kv_memory 4")
    for n in [tensor_parallel, *splits]:
        split = [f"--tensor_parallel {n}"] if n > tensor_parallel else []
        yield " and ".join([*split, *words]), kept, cluster, n
    yield from _larger_changes(kept, words, cluster, max([tensor_parallel, *splits]))


def _larger_changes(
    kept: Config, words: Sequence[str], cluster: Cluster, tensor_parallel: int
) -> Iterator[tuple[str, Config, Cluster, int]]:
    """Yield changes that cost machines or change the result, together with those that keep it."""
    split = [f"--tensor_parallel {tensor_parallel}"] if tensor_parallel > 1 else []
    for nodes in (cluster.nodes << k for k in range(1, 7)):
        name = f"{nodes}x{cluster.name.partition('x')[2]}"
        more = Cluster(name, nodes, cluster.per_node, cluster.gpu, cluster.links)
        yield " and ".join([f"--cluster {name}", *split, *words]), kept, more, tensor_parallel
    if kept.model.dtype == "float32":
        narrow = replace(kept, model=replace(kept.model, dtype="bfloat16"))
        yield " and ".join(["model.dtype bfloat16", *split, *words]), narrow, cluster, tensor_parallel
    if not kept.model.lora.r:
        adapters = replace(kept, model=replace(kept.model, lora=replace(kept.model.lora, r=16)))
        yield " and ".join(["model.lora.r 16", *split, *words]), adapters, cluster, tensor_parallel


def _splits(cluster: Cluster, shape: Shape) -> list[int]:
    """Return the powers of two that divide the GPUs of a node and the attention heads."""
    powers = [1 << k for k in range(cluster.per_node.bit_length())]
    return [n for n in powers if cluster.per_node % n == 0 and shape.heads % n == 0]
