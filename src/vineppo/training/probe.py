"""A probe: sample fixed states with the sampler and score the result with the trainer, to find differences early."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, log1p

from vineppo.learning.learner import Scores
from vineppo.seeds import derive_seed
from vineppo.training.parts import Parts
from vineppo.types import Alternative, Completion, SampleRequest, TrainingSample

_SAMPLES = 8
"""Number of completions per state."""
_TOKENS = 16
"""Maximum number of tokens of a completion."""
_MAX_EXCLUDED = 0.99
"""Probability of excluded tokens above which the first token is not compared."""


@dataclass(frozen=True)
class Agreement:
    """Comparison of sampled completions with the distributions that the trainer computes."""

    gap: float
    """Largest absolute difference between the log-probabilities of a token, in nats."""
    excess: float
    """Sum over the tokens of log-probability plus entropy, both from the trainer, in nats. Its expectation is 0."""
    variance: float
    """Variance of `excess` if the tokens were sampled from the trainer's distributions."""
    tokens: int
    """Number of tokens in the sum."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found."""

    agreement: Agreement
    repeats: int
    """Number of completions that are equal to the completion before them of the same request."""
    expected_repeats: float
    """Expectation of `repeats` if the completions are independent."""
    policy_logprobs: tuple[float, ...]
    """Log-probabilities of the known tokens under the policy, in nats. Every probe of a run scores the same tokens."""
    reference_logprobs: tuple[float, ...]
    """Log-probabilities of the known tokens under the reference model; empty without a reference model."""


@dataclass
class Probe:
    """Samples completions of the first training problem and of states of a response to it.

    The states are those that Monte-Carlo values need: the prompt, and the prompt with the first half of a response. If
    the sampler can exclude first tokens, the second state is also sampled without the token that follows it.

    Attributes:
        parts: the parts of the run. The sampler is called directly, so the tokens of a probe do not count as generated.
        run_seed: seed of the run. The seeds of a probe depend on this seed and on the iteration.
    """

    parts: Parts
    run_seed: int
    known: tuple[int, ...] = field(default=(), init=False)
    """The known tokens: a response that the first probe samples."""

    def run(self, iteration: int, temperature: float, max_new_tokens: int) -> ProbeResult:
        """Sample and score the states with the current weights."""
        sampler = self.parts.sampler.sampler
        prompt_ids = self.parts.codec.prompt_ids(self.parts.task.problem("train", 0))
        length = min(_TOKENS, max_new_tokens)

        def request(prefix: tuple[int, ...], count: int, name: str, excluded: tuple[int, ...] = ()) -> SampleRequest:
            seed = derive_seed(self.run_seed, iteration, "probe", name)
            ids, tokens = prompt_ids + prefix, max(1, length - len(prefix))
            return SampleRequest(ids, count, tokens, seed, len(prefix), excluded, temperature=temperature)

        if not self.known:
            self.known = sampler.sample([request((), 1, "known")])[0][0].token_ids
        half = len(self.known) // 2
        requests = [request((), _SAMPLES, "prompt"), request(self.known[:half], _SAMPLES, "state")]
        if sampler.capabilities.excluded_first:
            requests.append(request(self.known[:half], _SAMPLES, "excluded", (self.known[half],)))
        return self._result(requests, sampler.sample(requests), prompt_ids)

    def _result(
        self,
        requests: Sequence[SampleRequest],
        completions: Sequence[Sequence[Completion]],
        prompt_ids: tuple[int, ...],
    ) -> ProbeResult:
        learner, policy = self.parts.learner, self.parts.policy
        known = [_sample(SampleRequest(prompt_ids, 1, len(self.known), 0), _unscored(self.known))]
        repeats, expected = repeated(completions)
        return ProbeResult(
            agreement=agreement(
                self.parts, [(r, c) for r, group in zip(requests, completions, strict=True) for c in group]
            ),
            repeats=repeats,
            expected_repeats=expected,
            policy_logprobs=tuple(learner.logprobs(policy, known).logprobs[0]),
            reference_logprobs=tuple(learner.ref_logprobs(known)[0]) if learner.reference is not None else (),
        )


def agreement(parts: Parts, pairs: Sequence[tuple[SampleRequest, Completion]]) -> Agreement:
    """Score completions with the trainer, and compare with the log-probabilities of the sampler.

    Args:
        pairs: completions with their requests, whose temperature must be that of the learner.
    """
    plain = [pair for pair in pairs if not pair[0].excluded_first]
    # The first token of a completion with excluded tokens has another distribution, so it is left out of the sums.
    excluding = [pair for pair in pairs if pair[0].excluded_first]
    scores, scores_of_excluding = _scored(parts, plain), _scored(parts, excluding)
    tokens = sum(len(completion.token_ids) for _, completion in plain)
    return Agreement(
        gap=max(_gap(plain, scores), _gap(excluding, scores_of_excluding)),
        excess=scores.excess * tokens,
        variance=(scores.excess_error * tokens) ** 2,
        tokens=tokens,
    )


def _scored(parts: Parts, pairs: Sequence[tuple[SampleRequest, Completion]]) -> Scores:
    return parts.learner.logprobs(parts.policy, [_sample(request, completion) for request, completion in pairs])


def repeated(groups: Sequence[Sequence[Completion]]) -> tuple[int, float]:
    """Count the completions that are equal to the one before them in their group.

    Returns:
        (the count, its expectation if the completions of a group are independent). The expectation is the sum of the
        probabilities of the completions before.
    """
    pairs = [(a, b) for group in groups for a, b in itertools.pairwise(group)]
    expected = sum(min(1.0, _probability(a)) for a, _ in pairs)
    return sum(a.token_ids == b.token_ids for a, b in pairs), expected


def _probability(completion: Completion) -> float:
    return exp(min(0.0, sum(completion.logprobs)))


def _sample(request: SampleRequest, completion: Completion) -> TrainingSample:
    """Build a sample whose trained tokens are those of the completion; excluded tokens become alternatives."""
    prefix = len(request.prompt_ids)
    return TrainingSample(
        token_ids=request.prompt_ids + completion.token_ids,
        loss_mask=(0,) * prefix + (1,) * len(completion.token_ids),
        sampler_logprobs=(0.0,) * prefix + completion.logprobs,
        advantages=(0.0,) * (prefix + len(completion.token_ids)),
        alternatives=tuple(Alternative(0, token, 0.0) for token in request.excluded_first),
    )


def _unscored(token_ids: tuple[int, ...]) -> Completion:
    return Completion(token_ids, (0.0,) * len(token_ids), "length")


def _gap(pairs: Sequence[tuple[SampleRequest, Completion]], scores: Scores) -> float:
    """Return the largest difference between the log-probabilities of the sampler and of the trainer.

    At the first token of a completion with excluded tokens, the trainer's log-probability is renormalized over the
    other tokens. Such a token is left out if the excluded tokens have almost the whole probability, because the rest
    is then a difference of nearly equal numbers.
    """
    gap = 0.0
    for (_, completion), row, excluded in zip(pairs, scores.logprobs, scores.alternatives, strict=True):
        share = sum(exp(logprob) for logprob in excluded)
        first = 1 if share > _MAX_EXCLUDED else 0
        expected = [logprob - (log1p(-share) if i == 0 and not first else 0.0) for i, logprob in enumerate(row)]
        pairs_of_logprobs = list(zip(completion.logprobs, expected, strict=True))[first:]
        gap = max([gap, *(abs(a - b) for a, b in pairs_of_logprobs)])
    return gap
