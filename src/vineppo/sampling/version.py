"""A wrapper that raises an error if a sampler does not have the learner's current weights.

Weights are identified by their *version*, the number of policy updates that they include.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vineppo.types import Capabilities, Completion, OnFinished, Sampler, SampleRequest, Weights


class StaleWeights(RuntimeError):
    """Error: a sampler, or a completion that the sampler returned, does not have the learner's current weights."""


@dataclass
class CurrentSampler:
    """Wraps a sampler, and checks in every call of `sample` that the wrapped sampler has the current weights.

    Implements `types.Sampler`.

    Attributes:
        sampler: the wrapped sampler.
        updates: function that returns how many updates the learner has made.
        tokens: total number of tokens of the completions that `sample` has returned.
    """

    sampler: Sampler
    updates: Callable[[], int]
    tokens: int = 0

    @property
    def version(self) -> int:
        """Version of the wrapped sampler's weights."""
        return self.sampler.version

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities of the wrapped sampler."""
        return self.sampler.capabilities

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the result of `sample` of the wrapped sampler: one list of completions per request.

        Raises:
            StaleWeights: if the version of the wrapped sampler, or of a completion, is not the number of updates that
                the learner has made.
        """
        current = self.updates()
        if self.version != current:
            raise StaleWeights(
                f"the sampler has the weights of update {self.version} and the learner those of update {current}; call "
                "update_weights after every change of the learner's weights"
            )
        completions = self.sampler.sample(requests, on_finished)
        stale = sorted({c.version for group in completions for c in group} - {current})
        if stale:
            raise StaleWeights(
                f"a completion was sampled with the weights of update {stale[0]} and the learner has those of update "
                f"{current}; the sampler must not return completions that it started before the last update_weights"
            )
        self.tokens += sum(len(c.token_ids) for group in completions for c in group)
        return completions

    def update_weights(self, version: int, weights: Weights) -> None:
        """Call `update_weights` of the wrapped sampler."""
        self.sampler.update_weights(version, weights)
