"""The base of samplers that wrap another sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vineppo.types import Capabilities, Completion, OnFinished, Sampler, SampleRequest, Weights


@dataclass
class WrappedSampler:
    """Forwards all calls to another sampler; subclasses change some of them. Implements `types.Sampler`.

    Attributes:
        sampler: the wrapped sampler.
    """

    sampler: Sampler

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
        """Return the result of `sample` of the wrapped sampler: one list of completions per request."""
        return self.sampler.sample(requests, on_finished)

    def update_weights(self, version: int, weights: Weights) -> None:
        """Call `update_weights` of the wrapped sampler."""
        self.sampler.update_weights(version, weights)

    def close(self) -> None:
        """End the processes of the wrapped sampler, if it has any."""
        close(self.sampler)


def close(sampler: Sampler) -> None:
    """End the processes of a sampler, if it has any: if it has a method `close`."""
    end = getattr(sampler, "close", None)
    if end is not None:
        end()
