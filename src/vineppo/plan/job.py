"""A run on a cluster, from which memory and seconds are computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vineppo.config.schema import Config
from vineppo.credit import find_algorithm
from vineppo.plan.amounts import Amounts
from vineppo.plan.machines import Cluster
from vineppo.plan.memory import kv_limit
from vineppo.plan.shape import Shape, count_trainable, kv_bytes


@dataclass(frozen=True)
class Job:
    """Settings, model, work and machines of a run."""

    config: Config
    """Configuration of the run."""
    shape: Shape
    """Size of the model."""
    amounts: Amounts
    """Amounts of one iteration."""
    cluster: Cluster
    """Nodes, GPUs and links."""
    tensor_parallel: int = 1
    """Number of GPUs over which a sampler splits its weights; 1 gives every GPU a whole copy."""

    @property
    def uses_vllm(self) -> bool:
        """Whether the sampler is vLLM, which keeps weights of its own and captures its decode step in a graph."""
        return self.config.sampler.engine == "vllm" or self.tensor_parallel > 1

    @property
    def needs_critic(self) -> bool:
        """Whether a value network is trained."""
        return find_algorithm(self.config.algorithm).needs_critic

    @property
    def number_bytes(self) -> int:
        """Number of bytes of a number of the model."""
        return 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def samplers(self) -> int:
        """Number of samplers."""
        return self.cluster.ranks // self.tensor_parallel

    @property
    def minibatch(self) -> int:
        """Number of sequences of a minibatch."""
        return min(self.config.learner.minibatch_size, self.amounts.rollouts)

    @property
    def own_sequences(self) -> int:
        """Number of sequences of a minibatch that the busiest GPU trains on."""
        return math.ceil(self.minibatch / self.cluster.ranks)

    @property
    def micro_batch(self) -> float:
        """Number of tokens of the largest micro-batch of one GPU."""
        length = self.amounts.sequence_tokens
        return max(length, min(self.config.learner.micro_batch_tokens, self.own_sequences * length))

    @property
    def kv_limit(self) -> float:
        """Maximum number of bytes of keys and values of a GPU."""
        masters = 4 if self.number_bytes == 2 and self.config.model.lora.r == 0 else 0
        optimizer = count_trainable(self.config, self.shape) * (8 + masters)
        weights, ranks, memory = self.shape.parameters * self.number_bytes, self.cluster.ranks, self.cluster.gpu.memory
        # Each of several processes has a whole copy of the policy, with which it samples, and a shard of everything.
        shards = (optimizer + weights * (ranks > 1)) / ranks
        return kv_limit(self.config, memory, memory - weights / self.tensor_parallel - shards)

    def sequences_per_sampler(self, count: float) -> int:
        """Return how many of `count` sequences the busiest sampler gets."""
        return math.ceil(count / self.samplers)

    def row_tokens(self, length: float) -> float:
        """Return for how many tokens a sampler reserves keys and values of a sequence.

        vLLM reserves blocks of tokens as a sequence grows. The PyTorch sampler reserves the budget of the longest one.

        Args:
            length: mean number of tokens of a sequence with its prompt.
        """
        if self.uses_vllm:
            return length
        return max(length, self.amounts.prompt_tokens + self.config.rollouts.max_new_tokens)

    def rows_at_once(self, length: float, count: int) -> int:
        """Return how many of `count` sequences a sampler decodes at the same time.

        Args:
            length: mean number of tokens of a sequence with its prompt.
        """
        rollouts = self.config.rollouts
        bytes_per_row = self.row_tokens(length) * kv_bytes(self.shape, self.number_bytes) / self.tensor_parallel
        return max(1, min(count, rollouts.max_rows, int(self.kv_limit / bytes_per_row)))
