"""From credit to weights: training samples -> epochs, minibatches, micro-batches -> optimizer -> metrics.

The same for every algorithm: it sees per-token advantages and weights, never an algorithm's name. Every sum over tokens
is weighted and divided by the minibatch's global sum of weights: micro-batches and their order cannot change an update,
and neither can the way in which a tree of responses is written down as samples.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vineppo.config.schema import CriticConfig, LearnerConfig
from vineppo.learning.experience import (
    Counts,
    Experience,
    check_samples,
    credited,
    divided,
    largest_gap,
    minibatches,
    padded,
    total_weight,
    trained_part,
)
from vineppo.learning.losses import clipped_policy_loss, clipped_value_loss, kl_estimate
from vineppo.learning.optim import Optimizer, lr_factor
from vineppo.learning.scaling import penalties_to_go, scale_advantages, shift_and_divisor
from vineppo.model.batch import Batch, collate, micro_batches, pad
from vineppo.model.critic import ValueNetwork
from vineppo.model.logits import token_logprobs
from vineppo.model.lora import load_trained_state, merged_weights, trained_state
from vineppo.model.policy import Policy, Reference
from vineppo.run.checkpoint import read_state, write_state
from vineppo.seeds import derive_seed
from vineppo.types import Metrics, Rollout, TrainingSample, UserError

STATE_FILE = "learner.pt"


class TorchLearner:
    """The learner (types.Learner) of one process: optimizers of the policy and, where there is one, the value network.

    Args:
        policy: trained in place.
        reference: frozen starting policy of the KL penalty; None where there is no penalty.
        critic: trained in place on the samples' returns; None for algorithms without a value network.
        config: the objective.
        critic_settings: of the critic's optimizer and loss; None without a critic.
        temperature: of the rollouts; log-probabilities are those of the distribution that was sampled.
        total_updates: where a linear decay ends.
        seed: of the run; order of the samples and dropout are addressed by it.
    """

    def __init__(
        self,
        policy: Policy,
        reference: Reference | None,
        critic: ValueNetwork | None,
        config: LearnerConfig,
        critic_settings: CriticConfig | None,
        *,
        temperature: float,
        total_updates: int,
        seed: int,
    ):
        self.policy, self.reference, self.critic = policy, reference, critic
        self.config, self.critic_settings = config, critic_settings or CriticConfig()
        self.temperature, self.total_updates, self.seed = temperature, total_updates, seed
        self.optimizer = Optimizer(policy.model.parameters(), config.betas, config.weight_decay)
        self.critic_optimizer = (
            None if critic is None else Optimizer(critic.parameters(), config.betas, config.weight_decay)
        )
        self.updates = 0
        self.scheduled = 0
        """Minibatches so far, empty ones included: the place in the schedule of the learning rate."""

    def update(self, samples: Sequence[TrainingSample], iteration: int, num_rollouts: int) -> Metrics:
        """All epochs over one iteration's samples.

        An epoch has ceil(num_rollouts / minibatch_size) minibatches. One that is empty, because samples are few, is no
        update; it still takes its place in the learning rate's schedule, which therefore ends with the run.

        Returns:
            Means over the iteration's updates: policy/*, kl/ref, value/loss, and `updates` (cumulative). Without any
            sample only the last one.
        """
        check_samples(samples, with_returns=self.critic is not None)
        experience, metrics = self._prepare(samples, num_rollouts) if samples else ([], {})
        train_policy = self.critic is None or iteration > self.critic_settings.value_only_iterations
        totals: dict[str, float] = defaultdict(float)
        begun = self.updates
        for epoch in range(self.config.epochs):
            order = list(range(len(experience)))
            random.Random(derive_seed(self.seed, iteration, "minibatches", epoch)).shuffle(order)
            for chosen in minibatches(order, self.config.minibatch_size, num_rollouts):
                if chosen:
                    share = num_rollouts * len(chosen) / len(order)
                    for key, value in self._update([experience[i] for i in chosen], train_policy, share).items():
                        totals[key] += value
                self.scheduled += 1
        done = max(1, self.updates - begun)
        return {**metrics, **{key: value / done for key, value in totals.items()}, "updates": self.updates}

    @torch.no_grad()
    def predict_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The value network's value before each response token: one list of shape (T,) per rollout.

        Raises:
            UserError: where there is no value network.
        """
        if self.critic is None:
            raise UserError(
                "the algorithm asks for values of a value network and has none; set needs_critic=True in its Algorithm"
            )
        values: list[list[float]] = [[] for _ in rollouts]
        lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
        for group in micro_batches(lengths, self.config.micro_batch_tokens):
            chosen = [rollouts[i] for i in group]
            token_ids = pad([r.prompt_ids + r.response_ids for r in chosen], torch.int64, self.policy.device)  # (B, T)
            masks = [[0] * len(r.prompt_ids) + [1] * len(r.response_ids) for r in chosen]
            flat = self.critic(token_ids, pad(masks, torch.bool, self.policy.device)).tolist()
            for i in group:
                count = len(rollouts[i].response_ids)
                values[i], flat = flat[:count], flat[count:]
        return values

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of each of the policy's current weights, adapters merged."""
        return merged_weights(self.policy.model)

    def save(self, folder: Path) -> None:
        """Write weights, moments and position into `learner.pt`."""
        critic, critic_optimizer = self.critic, self.critic_optimizer
        state = {
            "policy": trained_state(self.policy.model),
            "optimizer": self.optimizer.state_dict(),
            "critic": None if critic is None else trained_state(critic),
            "critic_optimizer": None if critic_optimizer is None else critic_optimizer.state_dict(),
            "updates": self.updates,
            "scheduled": self.scheduled,
        }
        write_state(folder / STATE_FILE, state)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote.

        Raises:
            UserError: where the file is missing or cannot be read.
        """
        state: dict[str, Any] = read_state(folder / STATE_FILE)
        load_trained_state(self.policy.model, state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            load_trained_state(self.critic, state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.updates, self.scheduled = state["updates"], state["scheduled"]

    def _prepare(self, samples: Sequence[TrainingSample], num_rollouts: int) -> tuple[list[Experience], Metrics]:
        """Old and reference log-probabilities, the penalty in the reward, and the scaling of advantages."""
        old, old_alternatives, entropy = self.logprobs(self.policy, samples)
        ref = None
        if self.reference is not None:
            with self.reference.active() as start:
                ref = self.logprobs(start, samples)[0]
        rows, weights = [trained_part(s.advantages, s) for s in samples], [s.trained_weights for s in samples]
        metrics: Metrics = {
            "policy/entropy": entropy,
            "policy/sampler_logprob_gap": largest_gap(old, samples),
            "credit/advantage_abs_mean": _weighted_sum(weights, [[abs(a) for a in row] for row in rows])
            / (sum(map(sum, weights)) or 1),
        }
        if ref is not None:
            penalties = [self._penalties(o, r) for o, r in zip(old, ref, strict=True)]
            metrics["kl/ref"] = (
                sum(_weighted_sum([w], [p]) for w, p in zip(weights, penalties, strict=True)) / num_rollouts
            )
            if self.config.kl.place == "reward":
                rows = [
                    [a - self.config.kl.coefficient * p for a, p in zip(row, to_go, strict=True)]
                    for row, to_go in zip(rows, penalties_to_go(samples, penalties), strict=True)
                ]
        divisor = shift_and_divisor(rows, self.config.advantage_scaling, weights)[1]
        rows = scale_advantages(rows, self.config.advantage_scaling, weights)
        scaled = [
            replace(s, advantages=padded(row, s), alternatives=divided(s.alternatives, divisor))
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
        """Log-probability of each trained token, ragged (B, N), of each alternative, ragged (B, A), and the
        weighted mean entropy in nats per token.
        """
        rows: list[list[float]] = [[] for _ in samples]
        alternatives: list[list[float]] = [[] for _ in samples]
        entropy_sum = 0.0
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
            entropy_sum += float((batch.weights[batch.loss_mask] * entropies).sum())
            flat = logprobs.tolist()
            for i in group:
                length = sum(samples[i].loss_mask)
                rows[i], flat = flat[:length], flat[length:]
            for i in group:
                length = len(samples[i].alternatives)
                alternatives[i], flat = flat[:length], flat[length:]
        return rows, alternatives, entropy_sum / (sum(sum(s.trained_weights) for s in samples) or 1)

    def _micro_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Indices of the samples that go through the model together."""
        return micro_batches([len(s.token_ids) for s in samples], self.config.micro_batch_tokens)

    def _update(self, minibatch: Sequence[Experience], train_policy: bool, num_rollouts: float) -> Metrics:
        """One optimizer step of the policy and of the critic on a minibatch that stands for so many rollouts."""
        config = self.config
        metrics: Metrics = {}
        factor = lr_factor(self.scheduled, config.warmup_updates, self.total_updates, config.decay)
        if train_policy:
            metrics |= self._policy_gradient(minibatch, num_rollouts)
            metrics["policy/lr"] = config.lr * factor
            metrics["policy/grad_norm"] = self.optimizer.step(config.lr * factor, config.max_grad_norm)
        if self.critic is not None and self.critic_optimizer is not None:
            metrics["value/loss"] = self._value_gradient(self.critic, minibatch)
            warm = lr_factor(
                self.scheduled, self.critic_settings.value_warmup_updates, self.total_updates, config.decay
            )
            metrics["value/grad_norm"] = self.critic_optimizer.step(
                self.critic_settings.value_lr * warm, config.max_grad_norm
            )
        self.updates += 1
        return metrics

    def _policy_gradient(self, minibatch: Sequence[Experience], num_rollouts: float) -> Metrics:
        """Add up the gradient of the minibatch's policy loss."""
        parts = minibatch if self._every_token_counts else credited(minibatch)
        counts = Counts(total_weight(minibatch) or 1, num_rollouts, total_weight(parts) or 1)
        seed = derive_seed(self.seed, "dropout", self.updates)
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
        own = batch.weights[batch.loss_mask]  # (N,)
        weights = torch.cat([own, own[batch.alternative_places]])  # (N + A,)
        policy_loss, clipped = clipped_policy_loss(
            logprobs, old, advantages, config.clip_low, config.clip_high, weights
        )
        loss = policy_loss / tokens
        metrics = {
            "policy/loss": loss.item(),
            "policy/clip_share": float(clipped) / tokens,
            "policy/kl_old": float((own * kl_estimate(logprobs[:N].detach(), old[:N], "k3", 10.0)).sum()) / counts.seen,
        }
        if entropies is not None:
            loss = loss - config.entropy_coefficient * (own * entropies).sum() / tokens
        if self.reference is not None and config.kl.place == "loss":
            ref = torch.tensor([x for e in chosen for x in e.ref_logprobs or ()], device=device)  # (N,)
            penalties = kl_estimate(logprobs[:N], ref, config.kl.estimator, config.kl.clamp)  # (N,)
            if config.kl.importance_weighted:
                penalties = penalties * (logprobs[:N] - old[:N]).exp()  # (N,)
            loss = loss + config.kl.coefficient * (own * penalties).sum() / (
                counts.rollouts if config.kl.reduction == "sequence_sum" else tokens
            )
        return loss, {**metrics, "policy/objective": loss.item()}

    def _value_gradient(self, critic: ValueNetwork, minibatch: Sequence[Experience]) -> float:
        """Add up the gradient of the minibatch's value loss, which is returned."""
        tokens, total = total_weight(minibatch) or 1, 0.0
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
        return clipped_value_loss(
            predicted, batch.values[mask], batch.returns[mask], self.critic_settings.value_clip, batch.weights[mask]
        )


def _weighted_sum(weights: Sequence[Sequence[float]], rows: Sequence[Sequence[float]]) -> float:
    """Sum of weight times entry over ragged rows."""
    return sum(w * x for ws, row in zip(weights, rows, strict=True) for w, x in zip(ws, row, strict=True))
