"""List the numbers that a prediction for a cluster uses and that are not settings, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vineppo.plan import cluster_seconds as rates
from vineppo.plan.cluster_memory import RUNTIME, USABLE
from vineppo.plan.job import Job
from vineppo.plan.machines import ETHERNET, Cluster
from vineppo.plan.shape import GIB

Source = Literal["datasheet", "measured", "assumed", "given"]


@dataclass(frozen=True)
class Assumption:
    """One number or rule that a prediction uses."""

    source: Source
    """`datasheet`: the manufacturer's. `measured`: by this project, the text says where. `given`: by the user.
    `assumed`: neither."""
    text: str
    """The assumption, in one line."""


def assumptions_of(job: Job) -> list[Assumption]:
    """Return the assumptions of a prediction."""
    amounts = job.amounts
    return [
        *_of_machines(job.cluster),
        *_of_speed(job),
        Assumption(
            "assumed", f"{USABLE:.0%} of a GPU's memory can be used, {RUNTIME / GIB:.0f} GiB of it by libraries"
        ),
        Assumption(
            "assumed",
            f"prompts of {amounts.prompt_tokens:.0f} tokens, steps of 30 tokens, responses of "
            f"{amounts.rollout_tokens / amounts.rollouts:.0f} tokens on average (--response_tokens); the longest "
            f"response of an iteration has {job.config.rollouts.max_new_tokens}",
        ),
        Assumption(
            "assumed",
            "every GPU trains with a shard (FSDP2: two all-gathers and one reduce-scatter in float32 per micro-batch) "
            "and samples with weights that stay in memory; nothing overlaps",
        ),
        Assumption(
            "assumed",
            "not counted: attention in training (2% at 512 tokens for 0.5B), communication inside a split sampler, "
            "stragglers and failures (benchmarks/scale.py), evaluation, checkpoints",
        ),
    ]


def _of_machines(cluster: Cluster) -> list[Assumption]:
    """Return the assumptions about GPUs and links."""
    gpu, links = cluster.gpu, cluster.links
    found = [
        Assumption(
            "datasheet",
            f"{gpu.flops / 1e12:.0f} TFLOP/s in 16 bits, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.memory / GIB:.0f} GiB",
        )
    ]
    if cluster.per_node > 1:
        found.append(
            Assumption(
                "given" if "nvlink" in links.given else "datasheet",
                f"{links.nvlink / 1e9:.0f} GB/s between the GPUs of a node, both directions together",
            )
        )
    if cluster.nodes > 1:
        source: Source = (
            "given" if "network" in links.given else "assumed" if links.network == ETHERNET else "datasheet"
        )
        found.append(
            Assumption(source, f"{links.network * 8 / 1e9:.0f} Gbit/s per node and direction between the nodes")
        )
    if cluster.ranks > 1:
        found.append(Assumption("assumed", f"collective communication reaches {rates.LINK:.0%} of the slowest link"))
    return found


def _of_speed(job: Job) -> list[Assumption]:
    """Return the assumptions about the speed of training and of decoding."""
    config, tensor_parallel = job.config, job.tensor_parallel
    dtype, checkpointing = config.model.dtype, config.model.gradient_checkpointing
    measured = rates.UPDATE_SECONDS[dtype, checkpointing]
    found = [
        Assumption(
            "measured",
            f"training reaches {rates.training_share(config):.1%} of the 16-bit operations per second: an update of "
            f"0.5B with 8,192 tokens in {dtype}, {'with' if checkpointing else 'without'} gradient checkpointing, took "
            f"{measured} s on one H200 (docs/results/gpu/gpu.md); larger models have larger matrix products, which "
            "alone reached 80% there, so their updates are probably faster than predicted",
        ),
        Assumption(
            "measured",
            f"decoding reaches {rates.DECODING:.0%} of the operations per second: 1.1B with 2,048 rows in bfloat16 on "
            "one H200 (docs/results/gpu/second/gpu.md), a lower bound",
        ),
        Assumption("assumed", f"weights, keys and values are read at {rates.READING:.0%} of the memory bandwidth"),
        Assumption(
            "measured",
            f"the first process takes {1000 * rates.RANK_0_SECONDS:g} ms per completion, with the included task on a "
            "CPU (docs/results/scale/simulation.md)",
        ),
    ]
    if job.uses_vllm:
        split = f", which splits its weights over {tensor_parallel} GPUs," if tensor_parallel > 1 else ""
        found.append(
            Assumption("assumed", f"the sampler is vLLM{split} and its GPU never waits for launches (captured graphs)")
        )
    else:
        found.append(
            Assumption(
                "measured",
                f"a decode step of the PyTorch sampler takes at least {1000 * rates.LAUNCH_SECONDS:.2f} ms per layer, "
                "because the GPU waits for launches: 1.1B on one H200, with a check at every token and without CUDA "
                "graphs (docs/results/gpu/second/gpu.md)",
            )
        )
        if config.sampler.graph:
            found.append(
                Assumption(
                    "assumed",
                    "CUDA graphs (sampler.graph) and checks at every eighth token (sampler.check_every) save nothing, "
                    f"because no GPU has run them; without them the GPU works for {rates.WORKING:.0%} of a decode step "
                    "(measured, 0.5B with 512 rows), and graphs alone cannot shorten a step further",
                )
            )
    return found
