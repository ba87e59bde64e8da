"""A wrapper that raises an error if a sampler does not have the learner's current weights.

Weights are identified by their *version*, the number of policy updates that they include.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vineppo.sampling.wrapped import WrappedSampler
from vineppo.types import Completion, OnFinished, SampleRequest, UserError, Weights

_REMEMBERED_UPDATES = 64
"""Number of updates for which the seeds of requests are remembered."""
_KEPT_PER_CALL = 16
"""Maximum number of completions of one call that are kept for a check."""


class RepeatedSeeds(UserError):
    """Two requests would use the same random numbers, so their completions would not be independent."""


class StaleWeights(RuntimeError):
    """Error: a sampler, or a completion that the sampler returned, does not have the learner's current weights."""


@dataclass
class CurrentSampler(WrappedSampler):
    """Wraps a sampler, and checks every call of `sample`. Implements `types.Sampler`.

    The wrapped sampler must have the current weights, and no random numbers may be used twice.

    Attributes:
        sampler: the wrapped sampler.
        updates: function that returns how many updates the learner has made.
        tokens: total number of tokens of the completions that `sample` has returned.
    """

    updates: Callable[[], int]
    tokens: int = 0
    kept: list[tuple[SampleRequest, Completion]] | None = None
    """Some completions of every call with their requests, kept for a check; None: none are kept."""
    _seeds: dict[tuple[int, int], int] = field(default_factory=dict, init=False, repr=False)
    """(seed, number of the first sample) of each recent request, and the version of the weights at that time."""

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the result of `sample` of the wrapped sampler: one list of completions per request.

        Raises:
            StaleWeights: if the version of the wrapped sampler, or of a completion, is not the number of updates that
                the learner has made.
            UserError: if a request has a draft and the wrapped sampler does not support drafts.
            RepeatedSeeds: if two of the requests have the same random numbers, or if a request has the random numbers
                of a request that was sampled before a recent update.
        """
        current = self.updates()
        if self.version != current:
            raise StaleWeights(
                f"the sampler has the weights of update {self.version} and the learner those of update {current}; call "
                "update_weights after every change of the learner's weights"
            )
        if not self.capabilities.drafts and any(request.draft is not None for request in requests):
            raise UserError(
                f"a request has a draft, and {type(self.sampler).__name__} does not support drafts; send requests with "
                "drafts only to a sampler whose capabilities.drafts is True"
            )
        self._check_seeds(requests, current)
        completions = self.sampler.sample(requests, on_finished)
        stale = sorted({c.version for group in completions for c in group} - {current})
        if stale:
            raise StaleWeights(
                f"a completion was sampled with the weights of update {stale[0]} and the learner has those of update "
                f"{current}; the sampler must not return completions that it started before the last update_weights"
            )
        self.tokens += sum(len(c.token_ids) for group in completions for c in group)
        if self.kept is not None:
            pairs = [(r, c) for r, group in zip(requests, completions, strict=True) for c in group if c.token_ids]
            self.kept += pairs[:: -(-len(pairs) // _KEPT_PER_CALL) or 1]
        return completions

    def update_weights(self, version: int, weights: Weights) -> None:
        """Call `update_weights` of the wrapped sampler, and forget the seeds of requests before the last 64 updates."""
        self.sampler.update_weights(version, weights)
        self._seeds = {key: used for key, used in self._seeds.items() if used > version - _REMEMBERED_UPDATES}

    def _check_seeds(self, requests: Sequence[SampleRequest], version: int) -> None:
        """Raise RepeatedSeeds if random numbers would be used twice. Greedy requests use no random numbers."""
        keys = [(r.seed, r.first_sample) for r in requests if r.temperature > 0 and r.num_samples and r.max_new_tokens]
        if len(set(keys)) < len(keys):
            raise RepeatedSeeds(
                "two requests of one call have the same seed, so their completions would not be independent; derive "
                "the seed of a request from the problem, the state and the purpose (vineppo.seeds.derive_seed)"
            )
        earlier = sorted({self._seeds[key] for key in keys if key in self._seeds} - {version})
        if earlier:
            raise RepeatedSeeds(
                f"a request has the same seed as a request before update {earlier[0] + 1}, so the two iterations would "
                "use the same random numbers; derive the seed of a request from the iteration too"
            )
        self._seeds |= dict.fromkeys(keys, version)
