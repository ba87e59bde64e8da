"""Guards of a training run: stop the run before an update if the sampler and the trainer do not agree.

The log-probabilities of the sampled tokens are computed twice, by the sampler and by the trainer. If they differ, or if
the tokens are not distributed as the trainer expects, then the importance ratios are wrong and training would go on
with a wrong gradient. Typical causes are old weights in the sampler, another temperature, and random numbers that are
used twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from vineppo.config.schema import GuardConfig
from vineppo.learning.experience import trained_part
from vineppo.training.parts import Parts
from vineppo.training.probe import Agreement, Probe, ProbeResult, agreement, repeated
from vineppo.types import Completion, Metrics, Rollout, RolloutGroup, TrainingSample, UserError

_FLOAT32_GAP, _LOW_PRECISION_GAP = 0.01, 5.0
"""Default bounds of the log-probability gap in nats, at temperature 1. Without a fault it is about 3e-5 in float32. In
bfloat16 it is 0.1 to 0.9 in most iterations with SmolLM2-135M, and the largest one seen is 2.3. One cause is that
PyTorch stores logits between 32 and 64 as multiples of 0.25."""
_REFERENCE_CHANGE = 0.1
"""Largest bound in nats of the change of the reference's log-probabilities. They are always computed in the same way,
so rounding does not change them."""
_STANDARD_ERRORS = 6.0
"""A mean that differs from its expectation by more than this number of standard errors counts as a fault."""
_SAMPLES = 32
"""Maximum number of samples whose log-probabilities are compared before and after an update."""


class SamplerFault(UserError):
    """The sampler does not sample from the distributions that the trainer computes."""


@dataclass
class Deviation:
    """A sum over many tokens or samples that has an expectation of 0, and the variance of the sum.

    If the variances of the terms are not known, `variance` is the sum of their squares, which estimates it.
    """

    total: float = 0.0
    variance: float = 0.0
    count: float = 0.0

    def add(self, total: float, variance: float, count: float) -> None:
        """Add the sum, variance and count of new terms."""
        self.total, self.variance, self.count = self.total + total, self.variance + variance, self.count + count

    @property
    def mean(self) -> float:
        """The mean of the terms."""
        return self.total / max(1.0, self.count)

    @property
    def standard_errors(self) -> float:
        """The sum in units of its standard deviation; 0 if the variance is 0."""
        return self.total / math.sqrt(self.variance) if self.variance > 0 else 0.0


@dataclass
class Guards:
    """The checks of a run that raise `SamplerFault`. Attributes accumulate over the iterations of this process.

    Attributes:
        parts: the parts of the run.
        settings: bounds and the cadence of the probe.
        run_seed: seed of the run.
        temperature: sampling temperature of the rollouts.
        max_new_tokens: maximum length of a response in tokens.
    """

    parts: Parts
    settings: GuardConfig
    run_seed: int
    temperature: float
    max_new_tokens: int
    excess: Deviation = field(default_factory=Deviation)
    """Log-probability plus entropy of the sampled tokens."""
    repeats: Deviation = field(default_factory=Deviation)
    """Completions that repeat the one before them, minus the expected number."""
    first_probe: ProbeResult | None = None
    last_probe: ProbeResult | None = None
    direction: float | None = None
    """Correlation of the advantages with the changes of the log-probabilities in the last checked iteration."""
    other_temperatures: set[float] = field(default_factory=set)
    """Temperatures above 0 other than that of the rollouts, with which completions were sampled for training."""

    def __post_init__(self) -> None:
        self.probe = Probe(self.parts, self.run_seed)
        self._is_due = False

    @property
    def max_gap(self) -> float:
        """Bound of the log-probability gap in nats: the setting, or a default for the model's dtype."""
        if self.settings.max_logprob_gap is not None:
            return self.settings.max_logprob_gap
        is_float32 = next(self.parts.policy.model.parameters()).dtype == torch.float32
        # Dividing the logits by the temperature multiplies the rounding errors of the log-probabilities.
        return (_FLOAT32_GAP if is_float32 else _LOW_PRECISION_GAP) / min(1.0, self.temperature)

    def before_iteration(self, iteration: int) -> None:
        """Run the probe, if it is due before this iteration. The completions of the iteration are then checked too.

        Raises:
            SamplerFault: if the sampler does not sample from the trainer's distributions, or if the reference model
                has changed.
        """
        every = self.settings.probe_every
        self._is_due = bool(every and (iteration - 1) % every == 0)
        self.parts.sampler.kept = [] if self._is_due else None
        if not self._is_due:
            return
        result = self.probe.run(iteration, self.temperature, self.max_new_tokens)
        where = f"the probe before iteration {iteration}"
        self._check_agreement(result.agreement, where)
        self._check_repeats(result.repeats, result.expected_repeats, where)
        first = self.first_probe = self.first_probe or result
        changes = [abs(a - b) for a, b in zip(result.reference_logprobs, first.reference_logprobs, strict=True)]
        if max(changes, default=0.0) > min(self.max_gap / 10, _REFERENCE_CHANGE):
            raise SamplerFault(
                f"{where} found that the reference model has changed: its log-probability of a known token differs by "
                f"{max(changes):.3g} from that at the start; the KL penalty would be wrong. Check that the optimizer "
                "does not train the reference model, and that the reference model does not share the policy's memory"
            )
        self.last_probe = result

    def check_rollouts(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Check sampled rollouts.

        Raises:
            SamplerFault: if a rollout is incomplete, or if responses to the same problem repeat each other, unless the
                algorithm samples its rollouts itself.
        """
        where = f"iteration {iteration}"
        for group in groups:
            for rollout in group.rollouts:
                self._check_rollout(rollout, f"a response to {group.problem.id} in {where}")
        # An algorithm with its own sampling may return responses that share sampled tokens, which are not independent.
        if self.parts.algorithm.sample is None:
            completions = [
                [Completion(r.response_ids, r.sampler_logprobs, r.finish_reason) for r in group.rollouts]
                for group in groups
            ]
            self._check_repeats(*repeated(completions), where)

    def _check_rollout(self, rollout: Rollout, name: str) -> None:
        """Raise SamplerFault if a rollout is incomplete. The message calls the rollout `name`."""
        ids, logprobs = rollout.response_ids, rollout.sampler_logprobs
        if len(logprobs) != len(ids) or not ids:
            raise SamplerFault(
                f"{name} has {len(ids)} tokens and {len(logprobs)} log-probabilities; a sampler must return at least "
                "one token, and one log-probability for each"
            )
        vocabulary = self.parts.policy.model.get_output_embeddings().weight.shape[0]
        unknown = [token for token in ids if not 0 <= token < vocabulary]
        if unknown:
            raise SamplerFault(f"{name} has token id {unknown[0]}; the model's vocabulary has {vocabulary} tokens")
        wrong = [logprob for logprob in logprobs if not -math.inf < logprob <= 1e-3]
        if wrong:
            raise SamplerFault(f"{name} has a log-probability of {wrong[0]:.3g}; allowed: finite numbers up to 0")
        ended = ids[-1] in self.parts.codec.eos_ids or any(text in rollout.text for text in self.parts.stop)
        if rollout.finish_reason == "stop" and not ended:
            raise SamplerFault(
                f"{name} has finish reason stop, but it ends neither with an end-of-sequence token nor with a stop "
                "string; the sampler must return the token that ended the response, because it is trained"
            )

    def before_update(
        self, groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample], iteration: int
    ) -> Callable[[Metrics], None]:
        """Return the function that the learner calls with the metrics of the samples before its first update.

        The function raises `SamplerFault` if the log-probability gap is above its bound, or if the tokens are not
        distributed as the trainer expects. The second check needs all tokens of all rollouts, each with weight 1,
        because an algorithm that chooses among its rollouts changes the distribution of the tokens. So does
        `learner.mask_truncated`, which chooses the responses that ended.
        """
        tokens = sum(sum(sample.loss_mask) for sample in samples)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        # An algorithm with its own sampling may return responses that share sampled tokens, which are not independent.
        is_complete = (
            self.parts.algorithm.sample is None
            and not self.parts.learner.config.mask_truncated
            and all(sample.rollout is not None and sample.weights is None for sample in samples)
            and tokens == sum(len(rollout.response_ids) for rollout in rollouts)
        )

        def check(metrics: Metrics) -> None:
            where = f"iteration {iteration}"
            if "policy/sampler_logprob_gap" in metrics:
                self._check_gap(metrics["policy/sampler_logprob_gap"], where)
            if is_complete and "policy/logprob_excess" in metrics:
                excess, error = metrics["policy/logprob_excess"], metrics["policy/logprob_excess_error"]
                self._check_excess(excess * tokens, (error * tokens) ** 2, tokens, where)
            self._check_kept(where)

        return check

    def after_update(self, samples: Sequence[TrainingSample]) -> None:
        """Compare the advantages with the changes of the log-probabilities, if this iteration had a probe.

        Tokens with a positive advantage should become more likely, and tokens with a negative one less likely.
        """
        if not self._is_due or not samples:
            return
        chosen = samples[:_SAMPLES]
        new = self.parts.learner.logprobs(self.parts.policy, chosen).logprobs
        pairs = [
            (advantage, after - before)
            for sample, row in zip(chosen, new, strict=True)
            for advantage, before, after in zip(
                trained_part(sample.advantages, sample), trained_part(sample.sampler_logprobs, sample), row, strict=True
            )
            if advantage
        ]
        norms = [math.sqrt(sum(pair[i] ** 2 for pair in pairs)) for i in (0, 1)]
        self.direction = sum(a * b for a, b in pairs) / (norms[0] * norms[1]) if all(norms) else None

    def _check_kept(self, where: str) -> None:
        """Check the completions of this iteration that the sampler kept: rollouts and Monte-Carlo continuations."""
        kept, self.parts.sampler.kept = self.parts.sampler.kept or [], None
        self.other_temperatures |= {request.temperature for request, _ in kept} - {0.0, self.temperature}
        pairs = [(request, completion) for request, completion in kept if request.temperature == self.temperature]
        if pairs:
            self._check_agreement(agreement(self.parts, pairs), f"a sampled continuation of {where}")

    def _check_agreement(self, found: Agreement, where: str) -> None:
        self._check_gap(found.gap, where)
        if found.tokens:
            self._check_excess(found.excess, found.variance, found.tokens, where)

    def _check_gap(self, gap: float, where: str) -> None:
        if not gap <= self.max_gap:
            raise SamplerFault(
                f"{where}: the sampler's and the trainer's log-probability of a token differ by {gap:.3g}; "
                f"allowed: {self.max_gap:g} (guards.max_logprob_gap). Likely causes: the sampler has old weights or no "
                "adapters, another temperature, active dropout, other token ids or positions than the trainer, or a "
                "lower precision"
            )

    def _check_excess(self, total: float, variance: float, tokens: int, where: str) -> None:
        self.excess.add(total, variance, tokens)
        mean, errors = self.excess.mean, self.excess.standard_errors
        if abs(mean) > self.settings.max_logprob_excess and abs(errors) > _STANDARD_ERRORS:
            side = "too likely" if mean > 0 else "too unlikely"
            raise SamplerFault(
                f"{where}: the sampled tokens are {side} under the policy: log-probability plus entropy is {mean:+.3f} "
                f"nats per token on average, {abs(errors):.0f} standard errors from 0; allowed: up to "
                f"{self.settings.max_logprob_excess:g} (guards.max_logprob_excess). Likely causes: the sampler uses "
                "another temperature, top-p, top-k or old weights, but reports log-probabilities of the policy"
            )

    def _check_repeats(self, repeats: int, expected: float, where: str) -> None:
        self.repeats.add(repeats - expected, expected, 1)
        if self.repeats.total > _STANDARD_ERRORS * math.sqrt(self.repeats.variance) + _STANDARD_ERRORS:
            raise SamplerFault(
                f"{where}: {repeats} responses repeat another response to the same prompt, where "
                f"{expected:.2g} are expected; the samples of a request must use different random numbers"
            )
