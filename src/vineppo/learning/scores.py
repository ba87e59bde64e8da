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
        self.logprobs: list[list[float]] = [[] for _ in samples]
        self.alternatives: list[list[float]] = [[] for _ in samples]
        self.entropies: list[list[float]] = [[] for _ in samples]
        """Entropies of the next-token distributions at the trained tokens, one list per sample, in nats. The lists are
        empty for samples that were scored without entropies."""
        self._entropy = self._excess = self._variance = 0.0

    def add(self, indices: Sequence[int], scores: TokenScores, weights: torch.Tensor) -> None:
        """Add the scores of a micro-batch.

        Args:
            indices: the indices of its samples.
            scores: their scores. The means of `scores()` need their entropies and variances.
            weights: weight of each trained token, shape (N,).
        """
        flat_logprobs = scores.logprobs.detach()
        counts = [sum(self.samples[i].loss_mask) for i in indices]
        if scores.entropies is not None and scores.variances is not None:
            entropies = scores.entropies.detach()
            self._entropy += float((weights * entropies).sum())
            self._excess += float((weights * (flat_logprobs[: len(entropies)] + entropies)).double().sum())
            self._variance += float((weights**2 * scores.variances).double().sum())
            of_tokens = iter(entropies.tolist())
            for i, count in zip(indices, counts, strict=True):
                self.entropies[i] = list(itertools.islice(of_tokens, count))
        flat, start = flat_logprobs.tolist(), 0
        for i, count in zip(indices, counts, strict=True):
            self.logprobs[i], start = flat[start : start + count], start + count
        for i in indices:
            count = len(self.samples[i].alternatives)
            self.alternatives[i], start = flat[start : start + count], start + count

    def merge(self, ranks: Ranks, part: ScoreSheet, indices: Sequence[int]) -> None:
        """Add the scores that all ranks have put on their sheets `part`.

        Args:
            part: an empty sheet of the same samples to which this rank has added the scores of its micro-batches; this
                sheet itself in one process.
            indices: the indices of the samples of these micro-batches.
        """
        if part is self:
            return
        rows = {i: (part.logprobs[i], part.alternatives[i], part.entropies[i]) for i in indices}
        for found, sums in ranks.gather((rows, (part._entropy, part._excess, part._variance))):
            for i, row in found.items():
                self.logprobs[i], self.alternatives[i], self.entropies[i] = row
            self._entropy, self._excess = self._entropy + sums[0], self._excess + sums[1]
            self._variance += sums[2]

    def scores(self) -> Scores:
        """Return the scores of all samples."""
        weight = sum(sum(s.trained_weights) for s in self.samples) or 1
        means = (self._entropy / weight, self._excess / weight, self._variance**0.5 / weight)
        return Scores(self.logprobs, self.alternatives, *means)


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
