"""From credit to weights: training samples -> epochs, minibatches, micro-batches -> optimizer -> metrics.

The same for every algorithm: it sees per-token advantages and never learns who wrote them. Every sum over tokens is
divided by the minibatch's global count, so micro-batches and their order cannot change an update.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from vineppo.config.schema import LearnerConfig, PPOConfig
from vineppo.learning.losses import clipped_policy_loss, clipped_value_loss, kl_estimate
from vineppo.learning.optim import Optimizer, lr_factor
from vineppo.learning.scaling import penalty_to_go, scale_advantages, shift_and_divisor
from vineppo.model.batch import Batch, collate, micro_batches
from vineppo.model.critic import ValueNetwork
from vineppo.model.logits import token_logprobs
from vineppo.model.lora import load_trained_state, trained_state
from vineppo.model.policy import Policy, Reference
from vineppo.seeds import derive_seed
from vineppo.types import Alternative, Metrics, TrainingSample


@dataclass(frozen=True)
class Experience:
    """A training sample with what the trainer itself says of its tokens, response tokens only, shape (T,)."""

    sample: TrainingSample
    old_logprobs: tuple[float, ...]
    old_alternatives: tuple[float, ...]
    """Log-probabilities of the sample's alternatives, shape (A,)."""
    ref_logprobs: tuple[float, ...] | None


class Counts(NamedTuple):
    """What sums over a minibatch are divided by."""

    tokens: int
    sequences: int
    seen: int
    """Tokens that the forward pass looks at, which `policy/kl_old` is a mean over."""


class Learner:
    """Owns the optimizers of the policy and, where there is one, of the value network.

    Args:
        policy: trained in place.
        reference: frozen starting policy of the KL penalty; None where there is no penalty.
        critic: trained in place on the samples' returns; None for algorithms without a value network.
        config: the objective.
        ppo: settings of the critic's optimizer and loss.
        temperature: of the rollouts; log-probabilities are those of the distribution that was sampled.
        total_updates: where a linear decay ends.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        critic: ValueNetwork | None,
        config: LearnerConfig,
        ppo: PPOConfig,
        *,
        temperature: float,
        total_updates: int,
    ):
        self.policy, self.reference, self.critic = policy, reference, critic
        self.config, self.ppo = config, ppo
        self.temperature, self.total_updates = temperature, total_updates
        self.optimizer = Optimizer(policy.model.parameters(), config.betas, config.weight_decay)
        self.critic_optimizer = (
            None if critic is None else Optimizer(critic.parameters(), config.betas, config.weight_decay)
        )
        self.updates = 0

    def update(self, samples: Sequence[TrainingSample], iteration: int, seed: int) -> Metrics:
        """All epochs over one iteration's samples.

        Returns:
            Means over the iteration's updates: policy/*, kl/ref, value/loss, and `updates` (cumulative).
        """
        experience, metrics = self._prepare(samples)
        train_policy = self.critic is None or iteration > self.ppo.value_only_iterations
        totals: dict[str, float] = defaultdict(float)
        begun = self.updates
        for epoch in range(self.config.epochs):
            order = list(range(len(experience)))
            random.Random(derive_seed(seed, iteration, "minibatches", epoch)).shuffle(order)
            for start in range(0, len(order), self.config.minibatch_size):
                minibatch = [experience[i] for i in order[start : start + self.config.minibatch_size]]
                for key, value in self._update(
                    minibatch, train_policy, derive_seed(seed, "dropout", self.updates)
                ).items():
                    totals[key] += value
        done = self.updates - begun
        return {**metrics, **{key: value / done for key, value in totals.items()}, "updates": self.updates}

    def state_dict(self) -> dict[str, Any]:
        """Everything that an interrupted training needs: weights, moments, position."""
        critic, critic_optimizer = self.critic, self.critic_optimizer
        return {
            "policy": trained_state(self.policy.model),
            "optimizer": self.optimizer.state_dict(),
            "critic": None if critic is None else trained_state(critic),
            "critic_optimizer": None if critic_optimizer is None else critic_optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        load_trained_state(self.policy.model, state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            load_trained_state(self.critic, state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.updates = state["updates"]

    def _prepare(self, samples: Sequence[TrainingSample]) -> tuple[list[Experience], Metrics]:
        """Old and reference log-probabilities, the penalty in the reward, and the scaling of advantages."""
        old, old_alternatives, entropy = self.logprobs(self.policy, samples)
        ref = None
        if self.reference is not None:
            with self.reference.active() as start:
                ref = self.logprobs(start, samples)[0]
        rows = [_response_part(s.advantages, s) for s in samples]
        metrics: Metrics = {
            "policy/entropy": entropy,
            "policy/sampler_logprob_gap": _largest_gap(old, samples),
            "credit/advantage_abs_mean": sum(abs(a) for row in rows for a in row) / max(1, sum(map(len, rows))),
        }
        if ref is not None:
            penalties = [self._penalties(o, r) for o, r in zip(old, ref, strict=True)]
            metrics["kl/ref"] = sum(map(sum, penalties)) / len(samples)
            if self.config.kl.place == "reward":
                weight = self.config.kl.coefficient
                rows = [
                    [a - weight * p for a, p in zip(row, penalty_to_go(penalty), strict=True)]
                    for row, penalty in zip(rows, penalties, strict=True)
                ]
        divisor = shift_and_divisor(rows, self.config.advantage_scaling)[1]
        rows = scale_advantages(rows, self.config.advantage_scaling)
        scaled = [
            replace(s, advantages=_padded(row, s), alternatives=_divided(s.alternatives, divisor))
            for s, row in zip(samples, rows, strict=True)
        ]
        refs: Sequence[list[float] | None] = [None] * len(samples) if ref is None else ref
        experience = [
            Experience(s, tuple(o), tuple(a), None if r is None else tuple(r))
            for s, o, a, r in zip(scaled, old, old_alternatives, refs, strict=True)
        ]
        return experience, metrics

    def _penalties(self, old: Sequence[float], ref: Sequence[float]) -> list[float]:
        kl = self.config.kl
        return kl_estimate(torch.tensor(old), torch.tensor(ref), kl.estimator, kl.clamp).tolist()

    @torch.no_grad()
    def logprobs(
        self, policy: Policy, samples: Sequence[TrainingSample]
    ) -> tuple[list[list[float]], list[list[float]], float]:
        """Log-probability of each response token, ragged (B, T), of each alternative, ragged (B, A), and the mean
        entropy in nats per token.
        """
        rows: list[list[float]] = [[] for _ in samples]
        alternatives: list[list[float]] = [[] for _ in samples]
        entropy_sum, count = 0.0, 0
        for group in self._micro_batches(samples):
            batch = collate([samples[i] for i in group], policy.device)
            logprobs, entropies = token_logprobs(
                policy.model,
                batch.token_ids,
                batch.loss_mask,
                self.temperature,
                True,
                (batch.alternative_places, batch.alternative_ids),
            )
            assert entropies is not None
            entropy_sum, count = entropy_sum + float(entropies.sum()), count + len(entropies)
            flat = logprobs.tolist()
            for i in group:
                length = sum(samples[i].loss_mask)
                rows[i], flat = flat[:length], flat[length:]
            for i in group:
                length = len(samples[i].alternatives)
                alternatives[i], flat = flat[:length], flat[length:]
        return rows, alternatives, entropy_sum / max(1, count)

    def _micro_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Indices of the samples that go through the model together."""
        return micro_batches([len(s.token_ids) for s in samples], self.config.micro_batch_tokens)

    def _update(self, minibatch: Sequence[Experience], train_policy: bool, seed: int) -> Metrics:
        """One optimizer step of the policy and of the critic on one minibatch; `seed` is for dropout."""
        config = self.config
        metrics: Metrics = {}
        factor = lr_factor(self.updates, config.warmup_updates, self.total_updates, config.decay)
        if train_policy:
            metrics |= self._policy_gradient(minibatch, seed)
            metrics["policy/lr"] = config.lr * factor
            metrics["policy/grad_norm"] = self.optimizer.step(config.lr * factor, config.max_grad_norm)
        if self.critic is not None and self.critic_optimizer is not None:
            metrics["value/loss"] = self._value_gradient(self.critic, minibatch)
            warm = lr_factor(self.updates, self.ppo.value_warmup_updates, self.total_updates, config.decay)
            metrics["value/grad_norm"] = self.critic_optimizer.step(self.ppo.value_lr * warm, config.max_grad_norm)
        self.updates += 1
        return metrics

    def _policy_gradient(self, minibatch: Sequence[Experience], seed: int) -> Metrics:
        """Add up the gradient of the minibatch's policy loss."""
        parts = minibatch if self._every_token_counts else _credited(minibatch)
        counts = Counts(_num_tokens(minibatch), len(minibatch), _num_tokens(parts))
        totals: dict[str, float] = defaultdict(float)
        for group in self._micro_batches([e.sample for e in parts]):
            with self.policy.dropout(derive_seed(seed, group[0])):
                loss, sums = self._policy_loss([parts[i] for i in group], counts)
            loss.backward()
            for key, value in sums.items():
                totals[key] += value
        return dict(totals)

    @property
    def _every_token_counts(self) -> bool:
        """Whether tokens without an advantage have a gradient as well."""
        return self.config.entropy_coefficient > 0 or (self.reference is not None and self.config.kl.place == "loss")

    def _policy_loss(self, chosen: Sequence[Experience], counts: Counts) -> tuple[torch.Tensor, Metrics]:
        """This micro-batch's share of the minibatch's loss, and of its metrics.

        Args:
            counts: of the whole minibatch.
        """
        config, device, tokens = self.config, self.policy.device, counts.tokens
        batch = collate([e.sample for e in chosen], device)
        logprobs, entropies = token_logprobs(
            self.policy.model,
            batch.token_ids,
            batch.loss_mask,
            self.temperature,
            config.entropy_coefficient > 0,
            (batch.alternative_places, batch.alternative_ids),
        )  # logprobs (N + A,)
        N = int(batch.loss_mask.sum())
        old = torch.tensor(
            [x for e in chosen for x in e.old_logprobs] + [x for e in chosen for x in e.old_alternatives], device=device
        )  # (N + A,)
        advantages = torch.cat([batch.advantages[batch.loss_mask], batch.alternative_advantages])  # (N + A,)
        policy_loss, clipped = clipped_policy_loss(logprobs, old, advantages, config.clip_low, config.clip_high)
        loss = policy_loss / tokens
        metrics = {
            "policy/loss": loss.item(),
            "policy/clip_share": float(clipped) / tokens,
            "policy/kl_old": float(kl_estimate(logprobs[:N].detach(), old[:N], "k3", 10.0).sum()) / max(1, counts.seen),
        }
        if entropies is not None:
            loss = loss - config.entropy_coefficient * entropies.sum() / tokens
        if self.reference is not None and config.kl.place == "loss":
            ref = torch.tensor([x for e in chosen for x in e.ref_logprobs or ()], device=device)  # (N,)
            penalties = kl_estimate(logprobs[:N], ref, config.kl.estimator, config.kl.clamp)  # (N,)
            if config.kl.importance_weighted:
                penalties = penalties * (logprobs[:N] - old[:N]).exp()  # (N,)
            loss = loss + config.kl.coefficient * penalties.sum() / (
                counts.sequences if config.kl.reduction == "sequence_sum" else tokens
            )
        return loss, {**metrics, "policy/objective": loss.item()}

    def _value_gradient(self, critic: ValueNetwork, minibatch: Sequence[Experience]) -> float:
        """Add up the gradient of the minibatch's value loss, which is returned."""
        tokens, total = _num_tokens(minibatch), 0.0
        for group in self._micro_batches([e.sample for e in minibatch]):
            batch = collate([minibatch[i].sample for i in group], self.policy.device)
            loss = self._value_loss(critic, batch) / tokens
            loss.backward()
            total += loss.item()
        return total

    def _value_loss(self, critic: ValueNetwork, batch: Batch) -> torch.Tensor:
        assert batch.returns is not None and batch.values is not None, "a critic learns from returns and old values"
        predicted = critic(batch.token_ids, batch.loss_mask)  # (N,)
        mask = batch.loss_mask
        return clipped_value_loss(predicted, batch.values[mask], batch.returns[mask], self.ppo.value_clip)


def _num_tokens(experience: Sequence[Experience]) -> int:
    """Trained tokens."""
    return sum(sum(e.sample.loss_mask) for e in experience)


def _credited(minibatch: Sequence[Experience]) -> list[Experience]:
    """What of a minibatch can move the policy: the tokens with an advantage, and what leads to them.

    A token whose advantage is 0 has no gradient in the clipped objective, and no token sees those behind it. So
    sequences without an advantage are dropped, others end with their last one, and the rest of their tokens is left
    out of the loss: the same gradient for less work. Credit per step makes most tokens such.
    """
    parts = [part for part in map(_credited_part, minibatch) if any(part.sample.loss_mask)]
    # With nothing to learn the step is still made, of gradient 0: moments decay as they would have.
    return parts or [minibatch[0]]


def _credited_part(whole: Experience) -> Experience:
    sample = whole.sample
    places = [i for i, trained in enumerate(sample.loss_mask) if trained]  # of the response's tokens in the sequence
    choices = [(a, old) for a, old in zip(sample.alternatives, whole.old_alternatives, strict=True) if a.advantage]
    kept = sorted({n for n, i in enumerate(places) if sample.advantages[i]} | {a.position for a, _ in choices})
    number, inside = {n: new for new, n in enumerate(kept)}, {places[n] for n in kept}
    end = max(inside, default=0) + 1
    return Experience(
        TrainingSample(
            token_ids=sample.token_ids[:end],
            loss_mask=tuple(int(i in inside) for i in range(end)),
            sampler_logprobs=sample.sampler_logprobs[:end],
            advantages=sample.advantages[:end],
            alternatives=tuple(replace(a, position=number[a.position]) for a, _ in choices),
        ),
        tuple(whole.old_logprobs[n] for n in kept),
        tuple(old for _, old in choices),
        None,
    )


def _response_part(row: Sequence[float], sample: TrainingSample) -> list[float]:
    return [x for x, trained in zip(row, sample.loss_mask, strict=True) if trained]


def _padded(row: Sequence[float], sample: TrainingSample) -> tuple[float, ...]:
    values = iter(row)
    return tuple(next(values) if trained else 0.0 for trained in sample.loss_mask)


def _divided(alternatives: Sequence[Alternative], divisor: float) -> tuple[Alternative, ...]:
    return tuple(replace(a, advantage=a.advantage / divisor) for a in alternatives)


def _largest_gap(old: Sequence[Sequence[float]], samples: Sequence[TrainingSample]) -> float:
    """Largest difference between the sampler's and the trainer's log-probability of one token, in nats."""
    gaps = [
        abs(a - b)
        for row, sample in zip(old, samples, strict=True)
        for a, b in zip(row, _response_part(sample.sampler_logprobs, sample), strict=True)
    ]
    return max(gaps, default=0.0)
