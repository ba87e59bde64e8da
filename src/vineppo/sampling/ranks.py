"""Sample with several processes (ranks), each of which has a sampler with the whole policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vineppo.learning.sharding import Ranks
from vineppo.sampling.vllm import VLLMSampler
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.types import Completion, OnFinished, SampleRequest, UserError, Weights


@dataclass
class RankSampler(WrappedSampler):
    """Divides requests over the samplers of all ranks, and returns the completions on all ranks.

    Implements `types.Sampler`. All ranks must make the same calls, or rank 0 leads and announces its calls. With the
    compiled engine, the bits of a completion do not depend on the number of ranks.

    Attributes:
        sampler: the sampler of this rank.
        ranks: the ranks.
    """

    ranks: Ranks

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return one list of completions per request. `on_finished` is ignored.

        Raises:
            UserError: if the sampler of a rank raised it. Then all ranks raise it.
        """
        del on_finished
        self.ranks.announce("sample", requests)
        pieces, found, problem = cut(requests, self.ranks.rank, self.ranks.count), [], ""
        try:
            found = self.sampler.sample([request for _, request in pieces]) if pieces else []
        except UserError as error:
            problem = str(error)
        parts = self.ranks.gather((problem, [number for number, _ in pieces], found))
        problem = next((text for text, _, _ in parts if text), "")
        if problem:
            raise UserError(problem)
        completions: list[list[Completion]] = [[] for _ in requests]
        for _, numbers, lists in parts:  # in the order of the samples
            for number, part in zip(numbers, lists, strict=True):
                completions[number] += part
        return completions

    def update_weights(self, version: int, weights: Weights) -> None:
        """Give the current weights to the samplers of all ranks, each those of its own learner."""
        self.ranks.announce("update_weights", version)
        self.sampler.update_weights(version, weights)

    def sleep(self) -> None:
        """Free the memory of the samplers of all ranks until the next call, if they share the learner's GPU."""
        self.ranks.announce("sleep")
        if isinstance(self.sampler, VLLMSampler):
            self.sampler.sleep()


def cut(requests: Sequence[SampleRequest], rank: int, count: int) -> list[tuple[int, SampleRequest]]:
    """Return (index of the request, request) for the part of the requests that a rank samples.

    The samples of all requests, one after another, are divided into `count` equal parts. A request at the border of two
    parts is divided.
    """

    def parts() -> Iterator[tuple[int, SampleRequest]]:
        total = sum(request.num_samples for request in requests)
        start, end, offset = total * rank // count, total * (rank + 1) // count, 0
        for number, request in enumerate(requests):
            first, last = max(start - offset, 0), min(end - offset, request.num_samples)
            if first < last:
                yield number, replace(request, num_samples=last - first, first_sample=request.first_sample + first)
            offset += request.num_samples

    return list(parts())
