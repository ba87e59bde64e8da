"""The PyTorch sampler, which is fast at sampling many continuations of few prefixes.

The sampler uses the weights of a policy in the same process. The attention keys and values of a prefix are computed
once for all its samples. If a prefix begins with another prefix, as later states of a response begin with earlier ones,
only the longer one is computed. Finished sequences are removed from the batch. Token t of sample j is drawn with one
uniform random number that depends only on (request seed, j, t). A sample therefore does not depend on other sequences
in the batch, except for rounding of the logits.

A *wave* is a set of rows that are decoded in one batch (wave.py). Waves are decoded one after another.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from vineppo.sampling.language_model import LanguageModel
from vineppo.sampling.stops import StopTokens
from vineppo.sampling.torch.attention import tree_supported
from vineppo.sampling.torch.drafts import DraftedSampling
from vineppo.sampling.torch.graph import Steps
from vineppo.sampling.torch.pace import Pace, pace_of
from vineppo.sampling.torch.packed import packed_weights
from vineppo.sampling.torch.wave import Wave
from vineppo.sampling.trunks import draft_length, empty_results, trunks_of
from vineppo.sampling.units import equally_sampled, waves_of
from vineppo.types import Capabilities, Completion, OnFinished, SampleRequest, Weights


class TorchSampler:
    """Samples with the weights of a policy in the same process; implements `types.Sampler`.

    Args:
        policy: the policy. Its weights are shared and not copied, so every call of `sample` uses the current weights.
        max_rows: maximum number of rows of a wave.
        kv_memory: maximum number of bytes of the keys and values of a wave.
        pace: how often the sampler waits for the device; None: `pace_of` the device of the policy.
    """

    capabilities = Capabilities(excluded_first=True, reproducible=True, drafts=True)

    def __init__(
        self, policy: LanguageModel, *, max_rows: int = 2048, kv_memory: int = 4 << 30, pace: Pace | None = None
    ):
        self.policy = policy
        self.pace = pace or pace_of(policy.device)
        self.steps = Steps(self.pace.graph, policy.device)
        self.stops = StopTokens(policy.codec, policy.model.get_output_embeddings().weight.shape[0])
        self.version = 0
        self.max_rows, self.kv_memory = max_rows, kv_memory
        self.tree_attention = tree_supported(policy.model)
        if not self.tree_attention:
            warnings.warn(
                f"{type(policy.model).__name__} has layers that do not use transformers' attention interface in a "
                "supported way: sampling recomputes the whole sequence for every token, which is slow",
                stacklevel=2,
            )

    def update_weights(self, version: int, weights: Weights) -> None:
        """Store `version`, the number of policy updates that the weights include.

        The function `weights`, which returns the new weights, is not called, because the sampler uses the tensors of
        the policy.
        """
        self.version = version

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the completions of requests, as `types.Sampler.sample` says.

        Requests with different temperatures or stop strings are never decoded in the same batch.

        Raises:
            UserError: if the keys and values of a single sequence do not fit into `kv_memory`.
        """
        if not any(map(draft_length, requests)):
            return self._sample(requests, (), on_finished)
        codec = self.policy.codec
        drafted = DraftedSampling(
            self.policy.model, codec.eos_ids, codec.decode, self.policy.device, self.version, self._sample
        )
        return drafted.sample(requests, on_finished)

    def _sample(
        self, requests: Sequence[SampleRequest], first_positions: Sequence[int], on_finished: OnFinished | None
    ) -> list[list[Completion]]:
        """Do the work of `sample` without drafts.

        Args:
            first_positions: for each request, the position of its first new token; empty: 0 for all.
        """
        results = empty_results(requests, self.version)
        waves = [
            wave
            for indices in equally_sampled(requests)
            for wave in waves_of(trunks_of(requests, indices, first_positions), self.max_rows, self._kv_tokens())
        ]
        with packed_weights(self.policy.model) if waves else contextlib.nullcontext():
            try:
                for wave in waves:
                    for row, completion in Wave(self, requests, wave, on_finished).run():
                        results[row.request][row.sample] = completion
            finally:
                self.steps.release()
        return [[c for c in completions if c is not None] for completions in results]

    def _kv_tokens(self) -> int:
        """Return the number of tokens whose keys and values fit into `kv_memory`.

        Without tree attention, no keys and values are stored. The result is then so large that it is no limit.
        """
        if not self.tree_attention:
            return 1 << 62
        return self.kv_memory // kv_bytes_per_token(self.policy.model)


def kv_bytes_per_token(model: Any) -> int:
    """Return the number of bytes of the keys and values of one token in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize)
