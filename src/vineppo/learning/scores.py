"""Collect the log-probabilities of training samples from several forward passes, for the learner.

Letters in shapes: N trained tokens, A alternatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vineppo.learning.sharding import Ranks
from vineppo.model.logits import TokenScores
from vineppo.model.sequences import Sequences, build_sequences, divide
from vineppo.types import TrainingSample


@dataclass(frozen=True)
class Savings:
    """Which ways to save computation the learner uses. None of them changes an update, except for rounding."""

    packed: bool = True
    """Pack the samples of a micro-batch into one row (`model.packing`), if the model supports it."""
    first_forward: bool = True
    """Take the old log-probabilities from the forward pass of the first minibatch where they are the same."""
    chunked: bool = True
    """Compute the logits in chunks where they are many (`model.output`)."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of training samples under the policy before the updates of the iteration."""

    logprobs: list[list[float]]
    """Log-probabilities of the trained tokens, one list per sample, in nats."""
    alternatives: list[list[float]]
    """Log-probabilities of the alternatives, one list per sample, in nats."""
    entropy: float
    """Weighted mean of the entropies of the next-token distributions at the trained tokens, in nats per token."""
    excess: float
    """Weighted mean over the trained tokens of log-probability plus entropy, in nats per token. Its expectation is 0 if
    the tokens were sampled from the scored distributions."""
    excess_error: float
    """Standard error of `excess` if the tokens were sampled from the scored distributions, each once."""


class ScoreSheet:
    """Adds up the scores of training samples, micro-batch by micro-batch, until all samples have scores.

    Args:
        samples: the samples that are scored.
    """

    def __init__(self, samples: Sequence[TrainingSample]):
        self.samples = samples
        self._logprobs: list[list[float]] = [[] for _ in samples]
        self._alternatives: list[list[float]] = [[] for _ in samples]
        self._entropies: list[list[float]] = [[] for _ in samples]
        self._entropy = self._excess = self._variance = 0.0
        # Scores that are still on the device: (indices of the samples, log-probabilities, entropies, three sums).
        self._waiting: list[tuple[Sequence[int], torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]] = []

    @property
    def logprobs(self) -> list[list[float]]:
        """Log-probabilities of the trained tokens, one list per sample, in nats."""
        self._settle()
        return self._logprobs

    @property
    def alternatives(self) -> list[list[float]]:
        """Log-probabilities of the alternatives, one list per sample, in nats."""
        self._settle()
        return self._alternatives

    @property
    def entropies(self) -> list[list[float]]:
        """Entropies of the next-token distributions at the trained tokens, one list per sample, in nats.

        The lists are empty for samples that were scored without entropies.
        """
        self._settle()
        return self._entropies

    def add(self, indices: Sequence[int], scores: TokenScores, weights: torch.Tensor) -> None:
        """Add the scores of a micro-batch, without waiting for the device.

        Args:
            indices: the indices of its samples.
            scores: their scores. The means of `scores()` need their entropies and variances.
            weights: weight of each trained token, shape (N,).
        """
        logprobs, entropies = scores.logprobs.detach(), None
        sums: tuple[torch.Tensor, ...] = ()
        if scores.entropies is not None and scores.variances is not None:
            entropies = scores.entropies.detach()
            sums = (
                (weights * entropies).sum(),
                (weights * (logprobs[: len(entropies)] + entropies)).double().sum(),
                (weights**2 * scores.variances).double().sum(),
            )
        self._waiting.append((indices, logprobs, entropies, sums))

    def _settle(self) -> None:
        """Wait for the device, and add the scores that are still on it."""
        waiting, self._waiting = self._waiting, []
        for indices, logprobs, entropies, sums in waiting:
            counts = [sum(self.samples[i].loss_mask) for i in indices]
            if entropies is not None:
                entropy, excess, variance = map(float, sums)
                self._entropy, self._excess = self._entropy + entropy, self._excess + excess
                self._variance += variance
                of_tokens = iter(entropies.tolist())
                for i, count in zip(indices, counts, strict=True):
                    self._entropies[i] = list(itertools.islice(of_tokens, count))
            flat, start = logprobs.tolist(), 0
            for i, count in zip(indices, counts, strict=True):
                self._logprobs[i], start = flat[start : start + count], start + count
            for i in indices:
                count = len(self.samples[i].alternatives)
                self._alternatives[i], start = flat[start : start + count], start + count

    def merge(self, ranks: Ranks, part: ScoreSheet, indices: Sequence[int]) -> None:
        """Add the scores that all ranks have put on their sheets `part`.

        Args:
            part: an empty sheet of the same samples to which this rank has added the scores of its micro-batches; this
                sheet itself in one process.
            indices: the indices of the samples of these micro-batches.
        """
        if part is self:
            return
        self._settle()
        part._settle()
        rows = {i: (part.logprobs[i], part.alternatives[i], part.entropies[i]) for i in indices}
        for found, sums in ranks.gather((rows, (part._entropy, part._excess, part._variance))):
            for i, row in found.items():
                self._logprobs[i], self._alternatives[i], self._entropies[i] = row
            self._entropy, self._excess = self._entropy + sums[0], self._excess + sums[1]
            self._variance += sums[2]

    def scores(self) -> Scores:
        """Return the scores of all samples."""
        self._settle()
        weight = sum(sum(s.trained_weights) for s in self.samples) or 1
        means = (self._entropy / weight, self._excess / weight, self._variance**0.5 / weight)
        return Scores(self._logprobs, self._alternatives, *means)


def sequences_of(samples: Sequence[TrainingSample], packed: bool, device: torch.device) -> Sequences:
    """Return the input of a model for the samples of a micro-batch, packed or padded."""
    ids, masks = [s.token_ids for s in samples], [s.loss_mask for s in samples]
    return build_sequences(ids, masks, [s.alternatives for s in samples], packed, device)


def micro_batches_of(samples: Sequence[TrainingSample], max_tokens: int, packed: bool) -> list[list[int]]:
    """Return the indices of the samples, divided into lists. The samples of a list share one forward pass."""
    return divide([s.token_ids for s in samples], [s.loss_mask for s in samples], max_tokens, packed)


def weights_of(samples: Sequence[TrainingSample], device: torch.device) -> torch.Tensor:
    """Return the weights of the trained tokens of samples, one sample after another, shape (N,)."""
    return torch.tensor([w for s in samples for w in s.trained_weights], device=device)
