"""Predict the memory and the seconds of a run on a cluster, and say which setting makes a run fit that does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vineppo.config.schema import Config
from vineppo.plan.amounts import Amounts, guessed_amounts, iterations
from vineppo.plan.assumptions import Assumption, assumptions_of
from vineppo.plan.cluster_memory import USABLE, memory_per_gpu
from vineppo.plan.cluster_mends import does_not_fit
from vineppo.plan.cluster_seconds import iteration_seconds
from vineppo.plan.job import Job
from vineppo.plan.machines import Cluster
from vineppo.plan.shape import Shape, shape_from_config
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
    """What is not possible yet and what more GPUs would not make faster, in sentences."""
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
        tensor_parallel: number of GPUs over which a sampler splits its weights, which training cannot do yet; 1 gives
            every GPU a whole copy.
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
    job = Job(config, shape, amounts, cluster, tensor_parallel)
    memory = memory_per_gpu(job)
    available = USABLE * cluster.gpu.memory
    if memory["peak"] > available:
        raise UserError(does_not_fit(job))
    seconds = iteration_seconds(job)
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
        limits=_limits(job, seconds),
        assumptions=assumptions_of(job),
    )


def _limits(job: Job, seconds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return what is not possible yet and what more GPUs would not make faster, in sentences."""
    found = []
    minibatch, ranks, rollouts = job.minibatch, job.cluster.ranks, job.amounts.rollouts
    if job.tensor_parallel > 1:
        found.append(
            "not possible yet: training keeps the whole policy on every GPU, and splits an engine only over GPUs of "
            "its own (sampler.vllm.devices)"
        )
    if job.own_sequences * ranks > minibatch:
        found.append(
            f"a minibatch has {minibatch} sequences for {ranks:,} GPUs, so "
            f"{1 - minibatch / (job.own_sequences * ranks):.0%} of their time in updates is not used"
        )
    if job.sequences_per_sampler(rollouts) == 1 and job.samplers > 1:
        found.append(f"{rollouts} rollouts for {job.samplers:,} samplers: a sampler cannot take less than one response")
    total = sum(sum(parts.values()) for parts in seconds.values())
    serial = sum(parts.get("first process", 0.0) for parts in seconds.values())
    if serial > 0.1 * total:
        found.append(f"the first process works alone for {serial / total:.0%} of an iteration")
    moved = seconds["update"]["all-gather"] + seconds["update"]["reduce-scatter"] + sum(seconds["transfer"].values())
    if moved > 0.2 * total:
        found.append(
            f"moving weights and gradients takes {moved / total:.0%} of an iteration: a larger learner.minibatch_size "
            "moves them less often"
        )
    return found
