"""A sampler that refuses to sample with other weights than the learner has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vineppo.types import Capabilities, Completion, OnFinished, Sampler, SampleRequest, Weights


class StaleWeights(RuntimeError):
    """A sampler has other weights than the learner: a call of `update_weights` is missing."""


@dataclass(frozen=True)
class CurrentSampler:
    """Sampler protocol (types.Sampler) around another sampler: raises where its version is not the learner's.

    Attributes:
        sampler: what samples.
        updates: returns the learner's number of updates; called once per call of `sample`.
    """

    sampler: Sampler
    updates: Callable[[], int]

    @property
    def version(self) -> int:
        """That of the inner sampler."""
        return self.sampler.version

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner sampler."""
        return self.sampler.capabilities

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """As the inner sampler does.

        Raises:
            StaleWeights: when its weights are not those of the learner's last update, or a completion has another
                version.
        """
        current = self.updates()
        if self.version != current:
            raise StaleWeights(
                f"the sampler has the weights of update {self.version} and the learner those of update {current}; call "
                "update_weights after every change of the learner's weights"
            )
        completions = self.sampler.sample(requests, on_finished)
        other = sorted({c.version for group in completions for c in group} - {current})
        if other:
            raise StaleWeights(
                f"a completion was sampled with the weights of update {other[0]} and the learner has those of update "
                f"{current}; the sampler must not return what it began before its last update_weights"
            )
        return completions

    def update_weights(self, version: int, weights: Weights) -> None:
        """Pass them on to the inner sampler."""
        self.sampler.update_weights(version, weights)
