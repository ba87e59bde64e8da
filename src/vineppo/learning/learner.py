"""Define the learner, which updates the weights of the policy and the value network from training samples.

All algorithms use the same learner. A training sample is a token sequence in which each trained token (`loss_mask` 1)
has an advantage and a weight. Each epoch is split into minibatches (one optimizer step each), and each minibatch into
micro-batches (one forward and backward pass each). Sums over tokens are weighted and divided by a number of the whole
minibatch: by default the sum of the weights (`learner.reduction` selects others for the policy loss). Therefore an
update does not depend on the size or order of the micro-batches. With the default reduction, it does not depend on how
a tree of responses is split into samples either.

Letters in shapes: B sequences, T tokens of the longest sequence, N trained tokens, A alternatives (tokens that are
trained in place of a token of a sequence).
"""

from __future__ import annotations

import contextlib
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
    loss_scale,
    minibatches,
    padded,
    ratio_weight,
    total_weight,
    trained_part,
    without_truncated,
)
from vineppo.learning.losses import clipped_policy_loss, clipped_value_loss, kl_estimate
from vineppo.learning.optim import GradientError, Optimizer, lr_factor
from vineppo.learning.scaling import penalties_to_go, scale_advantages, shift_and_divisor
from vineppo.model.batch import Batch, collate, micro_batches, pad
from vineppo.model.critic import ValueNetwork
from vineppo.model.logits import entropies_of, logprob_variances, logprobs_of, token_distributions, token_logprobs
from vineppo.model.lora import load_trained_state, merged_weights, trained_state
from vineppo.model.policy import Policy, Reference
from vineppo.run.checkpoint import read_state, write_state
from vineppo.seeds import derive_seed
from vineppo.types import Metrics, Rollout, TrainingSample, UserError

STATE_FILE = "learner.pt"
"""Name of the learner's file in a checkpoint."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of training samples, computed in one pass over the samples without gradients."""

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


class TorchLearner:
    """Trains the policy and the value network in this process, each with an optimizer. Implements `types.Learner`.

    Args:
        policy: the policy, which is trained in place.
        reference: the policy before training, for the KL penalty, or None if there is no penalty.
        critic: the value network, which is trained in place on the returns of the samples, or None for algorithms
            without a value network.
        config: settings of the objective and of the optimizers.
        critic_settings: settings of the learning rate and of the loss of the value network; None without a value
            network.
        temperature: sampling temperature of the rollouts; log-probabilities are computed with the same temperature.
        total_updates: planned number of updates. A linear or cosine decay of the learning rate reaches 0 after the last
            update.
        seed: seed of the run. The seeds of the order of the samples and of dropout are derived from it.
        max_new_tokens: maximum number of tokens of a response, which the reduction `constant` divides by.
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
        max_new_tokens: int = 1,
    ):
        self.policy, self.reference, self.critic = policy, reference, critic
        self.config, self.critic_settings = config, critic_settings or CriticConfig()
        self.temperature, self.total_updates, self.seed = temperature, total_updates, seed
        self.max_new_tokens = max_new_tokens
        self.optimizer = Optimizer(policy.model.parameters(), config.betas, config.weight_decay)
        self.critic_optimizer = (
            None if critic is None else Optimizer(critic.parameters(), config.betas, config.weight_decay)
        )
        self.updates = 0
        self.scheduled = 0
        """Number of minibatches so far, including empty ones. The learning rate depends on this number and not on
        `updates`."""

    def update(
        self,
        samples: Sequence[TrainingSample],
        iteration: int,
        num_rollouts: int,
        check: Callable[[Metrics], None] | None = None,
    ) -> Metrics:
        """Train on the samples of one iteration, with all epochs of the iteration.

        An epoch has ceil(num_rollouts / minibatch_size) minibatches. If there are few samples, some minibatches are
        empty. An empty minibatch makes no update but advances the learning-rate schedule. Therefore the schedule ends
        with the run for any number of samples.

        Args:
            samples: the training samples of the iteration, of any number.
            iteration: number of the iteration, counted from 1.
            num_rollouts: number of rollouts of the iteration.
            check: called once before the first optimizer step, with the metrics of the samples. If it raises an error,
                the weights are unchanged.
        Returns:
            Metrics that are computed from the samples before the first update (policy/entropy, kl/ref and others),
            means over the updates of the iteration (policy/loss, value/loss and others), and `updates`, the number of
            updates since the start of the run. If there are no samples, the only metric is `updates`.
        Raises:
            UserError: if a sample is invalid, or the norm of a gradient is not finite.
        """
        check_samples(samples, with_returns=self.critic is not None)
        if self.config.mask_truncated:
            samples = without_truncated(samples)
        experience, metrics = self._prepare(samples, num_rollouts) if samples else ([], {})
        if check is not None:
            check(metrics)
        train_policy = self.critic is None or iteration > self.critic_settings.value_only_iterations
        totals: dict[str, float] = defaultdict(float)
        updates_before = self.updates
        for epoch in range(self.config.epochs):
            order = list(range(len(experience)))
            random.Random(derive_seed(self.seed, iteration, "minibatches", epoch)).shuffle(order)
            for indices in minibatches(order, self.config.minibatch_size, num_rollouts):
                if indices:
                    # Number of rollouts that correspond to this part of the samples.
                    share = num_rollouts * len(indices) / len(order)
                    chosen = [experience[i] for i in indices]
                    for key, value in self._update(chosen, train_policy, share, iteration).items():
                        totals[key] += value
                self.scheduled += 1
        num_updates = max(1, self.updates - updates_before)
        return {**metrics, **{key: value / num_updates for key, value in totals.items()}, "updates": self.updates}

    @torch.no_grad()
    def predict_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Predict the value of the state before each response token.

        Returns:
            One list per rollout, with one value in reward units for each response token.
        Raises:
            UserError: if there is no value network.
        """
        if self.critic is None:
            raise UserError(
                "the algorithm calls predict_values but has no value network; set needs_critic=True in its Algorithm"
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
        """Yield the (name, tensor) pairs of the policy's current weights, with adapters merged into the weights."""
        return merged_weights(self.policy.model)

    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer states and numbers of updates to the file `learner.pt` in a folder."""
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
        """Restore the state that `save` wrote to a folder.

        Raises:
            UserError: if `learner.pt` is missing or cannot be read.
        """
        state: dict[str, Any] = read_state(folder / STATE_FILE)
        load_trained_state(self.policy.model, state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.critic is not None and self.critic_optimizer is not None:
            load_trained_state(self.critic, state["critic"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.updates, self.scheduled = state["updates"], state["scheduled"]

    def _prepare(self, samples: Sequence[TrainingSample], num_rollouts: int) -> tuple[list[Experience], Metrics]:
        """Prepare the samples of an iteration for the updates.

        The log-probabilities under the policy and under the reference are computed. The advantages are reduced by the
        KL penalty if `config.kl.place` is "reward", and are then scaled.

        Returns:
            (one `Experience` per sample, metrics of the samples).
        """
        scores, ref = self.logprobs(self.policy, samples), None
        old = scores.logprobs
        if self.reference is not None:
            with self.reference.active() as start:
                ref = self.logprobs(start, samples).logprobs
        rows, weights = [trained_part(s.advantages, s) for s in samples], [s.trained_weights for s in samples]
        metrics: Metrics = {
            "policy/entropy": scores.entropy,
            "policy/sampler_logprob_gap": largest_gap(old, samples),
            "policy/logprob_excess": scores.excess,
            "policy/logprob_excess_error": scores.excess_error,
            "credit/advantage_abs_mean": _weighted_sum(weights, [[abs(a) for a in row] for row in rows])
            / (sum(map(sum, weights)) or 1),
        }
        if ref is not None:
            penalties = [self._penalties(o, r) for o, r in zip(old, ref, strict=True)]
            # The estimates are summed over the tokens of a rollout. The metric is the mean over rollouts.
            metrics["kl/ref"] = (
                sum(_weighted_sum([w], [p]) for w, p in zip(weights, penalties, strict=True)) / num_rollouts
            )
            if self.config.kl.place == "reward":
                rows = [
                    [a - self.config.kl.coefficient * p for a, p in zip(row, to_go, strict=True)]
                    for row, to_go in zip(rows, penalties_to_go(samples, penalties), strict=True)
                ]
        # Rollouts without a reward are left out of the mean and the standard deviation, and 0 remains 0 with `whiten`.
        counted = [(0.0,) * len(w) if s.without_reward else w for s, w in zip(samples, weights, strict=True)]
        # The advantages of alternatives are divided by the same number as those of tokens, but are not shifted.
        divisor = shift_and_divisor(rows, self.config.advantage_scaling, counted)[1]
        rows = scale_advantages(rows, self.config.advantage_scaling, counted)
        scaled = [
            replace(s, advantages=padded(row, s), alternatives=divided(s.alternatives, divisor))
            for s, row in zip(samples, rows, strict=True)
        ]
        refs: Sequence[list[float] | None] = [None] * len(samples) if ref is None else ref
        experience = [
            Experience(s, tuple(o), tuple(a), None if r is None else tuple(r), loss_scale(s, self.config.reduction))
            for s, o, a, r in zip(scaled, old, scores.alternatives, refs, strict=True)
        ]
        return experience, metrics

    def _penalties(self, old: Sequence[float], ref: Sequence[float]) -> list[float]:
        """Return the KL estimate of each trained token of a sample. The arguments and the result have shape (N,)."""
        kl = self.config.kl
        return kl_estimate(torch.tensor(old), torch.tensor(ref), kl.estimator, kl.clamp).tolist()

    @torch.no_grad()
    def logprobs(self, policy: Policy, samples: Sequence[TrainingSample]) -> Scores:
        """Compute the log-probabilities of the trained tokens and of the alternatives under a policy."""
        rows: list[list[float]] = [[] for _ in samples]
        alternatives: list[list[float]] = [[] for _ in samples]
        entropy = excess = variance = 0.0
        for group in self._micro_batches(samples):
            batch = collate([samples[i] for i in group], policy.device)
            distribution = token_distributions(policy.model, batch.token_ids, batch.loss_mask, self.temperature)
            entropies = entropies_of(distribution)  # (N,)
            flat_logprobs = logprobs_of(
                distribution,
                batch.token_ids,
                batch.loss_mask,
                (batch.alternative_places, batch.alternative_ids),
            )  # (N + A,)
            token_weights = batch.weights[batch.loss_mask]  # (N,)
            entropy += float((token_weights * entropies).sum())
            excess += float((token_weights * (flat_logprobs[: len(entropies)] + entropies)).double().sum())
            variance += float((token_weights**2 * logprob_variances(distribution, entropies)).double().sum())
            flat = flat_logprobs.tolist()
            for i in group:
                length = sum(samples[i].loss_mask)
                rows[i], flat = flat[:length], flat[length:]
            for i in group:
                length = len(samples[i].alternatives)
                alternatives[i], flat = flat[:length], flat[length:]
        weight = sum(sum(s.trained_weights) for s in samples) or 1
        return Scores(rows, alternatives, entropy / weight, excess / weight, variance**0.5 / weight)

    def _micro_batches(self, samples: Sequence[TrainingSample]) -> list[list[int]]:
        """Return the indices of the samples, divided into lists. The samples of a list share one forward pass."""
        return micro_batches([len(s.token_ids) for s in samples], self.config.micro_batch_tokens)

    def _update(
        self, minibatch: Sequence[Experience], train_policy: bool, num_rollouts: float, iteration: int
    ) -> Metrics:
        """Make one optimizer step of the policy and one of the value network.

        Args:
            train_policy: whether the policy is trained; False trains only the value network.
            num_rollouts: number of rollouts in the iteration, multiplied by the fraction of the samples that are in the
                minibatch.
            iteration: number of the iteration, for error messages.
        Returns:
            The metrics of the minibatch.
        """
        config = self.config
        metrics: Metrics = {}
        factor = lr_factor(self.scheduled, config.warmup_updates, self.total_updates, config.decay)
        if train_policy:
            metrics |= self._policy_gradient(minibatch, num_rollouts)
            metrics["policy/lr"] = config.lr * factor
            with _gradient_errors_named(iteration, "policy", "learner.lr", config.lr):
                metrics["policy/grad_norm"] = self.optimizer.step(config.lr * factor, config.max_grad_norm)
        if self.critic is not None and self.critic_optimizer is not None:
            metrics["value/loss"] = self._value_gradient(self.critic, minibatch)
            critic_factor = lr_factor(
                self.scheduled, self.critic_settings.value_warmup_updates, self.total_updates, config.decay
            )
            value_lr = self.critic_settings.value_lr
            with _gradient_errors_named(iteration, "value network", "value_lr", value_lr):
                metrics["value/grad_norm"] = self.critic_optimizer.step(value_lr * critic_factor, config.max_grad_norm)
        self.updates += 1
        return metrics

    def _policy_gradient(self, minibatch: Sequence[Experience], num_rollouts: float) -> Metrics:
        """Compute the gradient of the policy loss of a minibatch by backpropagation, and return its metrics."""
        parts = minibatch if self._all_tokens_have_gradients else credited(minibatch)
        counts = Counts(
            total_weight(minibatch) or 1, num_rollouts, total_weight(parts) or 1, ratio_weight(minibatch) or 1
        )
        seed = derive_seed(self.seed, "dropout", self.updates)
        totals: dict[str, float] = defaultdict(float)
        for group in self._micro_batches([e.sample for e in parts]):
            chosen = [parts[i] for i in group]
            # The backward pass is inside, too, because gradient checkpointing computes layers again.
            with self.policy.dropout([derive_seed(seed, i) for i in group], [e.sample.loss_mask for e in chosen]):
                loss, sums = self._policy_loss(chosen, counts)
                loss.backward()
            for key, value in sums.items():
                totals[key] += value
        return dict(totals)

    @property
    def _all_tokens_have_gradients(self) -> bool:
        """Whether an entropy bonus or a KL penalty in the loss gives a gradient also to tokens with advantage 0."""
        return self.config.entropy_coefficient > 0 or (self.reference is not None and self.config.kl.place == "loss")

    def _policy_loss(self, chosen: Sequence[Experience], counts: Counts) -> tuple[torch.Tensor, Metrics]:
        """Compute the contribution of a micro-batch to the policy loss and the metrics of its minibatch.

        Args:
            chosen: the samples of the micro-batch.
            counts: numbers of the whole minibatch, by which the sums over the micro-batch are divided.
        Returns:
            (contribution to the loss as a scalar tensor, contributions to the metrics).
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
        )  # logprobs (N + A,): trained tokens, then alternatives
        N = int(batch.loss_mask.sum())
        old = torch.tensor(
            [x for e in chosen for x in e.old_logprobs] + [x for e in chosen for x in e.old_alternatives], device=device
        )  # (N + A,)
        advantages = torch.cat([batch.advantages[batch.loss_mask], batch.alternative_advantages])  # (N + A,)
        token_weights = batch.weights[batch.loss_mask]  # (N,)
        weights = torch.cat([token_weights, token_weights[batch.alternative_places]])  # (N + A,)
        scales = torch.tensor([e.scale for e in chosen for _ in e.old_logprobs], device=device)  # (N,)
        all_scales = torch.cat([scales, scales[batch.alternative_places]])  # (N + A,)
        policy_loss, clipped = clipped_policy_loss(
            logprobs, old, advantages * all_scales, config.clip_low, config.clip_high, weights
        )
        divisor = self._divisor(counts)
        loss = policy_loss / divisor
        # How far the policy has moved since the first update of the iteration; only a metric.
        kl_old = (token_weights * kl_estimate(logprobs[:N].detach(), old[:N], "k3", 10.0)).sum()
        metrics = {
            "policy/loss": loss.item(),
            "policy/clip_share": float(clipped) / counts.ratios,
            "policy/kl_old": float(kl_old) / counts.seen,
        }
        if entropies is not None:
            loss = loss - config.entropy_coefficient * (token_weights * entropies).sum() / tokens
        if self.reference is not None and config.kl.place == "loss":
            ref = torch.tensor([x for e in chosen for x in e.ref_logprobs or ()], device=device)  # (N,)
            penalties = kl_estimate(logprobs[:N], ref, config.kl.estimator, config.kl.clamp)  # (N,)
            if config.kl.importance_weighted:
                penalties = penalties * (logprobs[:N] - old[:N]).exp()  # (N,)
            if config.kl.reduction == "as_policy":
                penalties = penalties * scales  # (N,)
            divisors = {"sequence_sum": counts.rollouts, "token_mean": tokens, "as_policy": divisor}
            total = (token_weights * penalties).sum()
            loss = loss + config.kl.coefficient * total / divisors[config.kl.reduction]
        return loss, {**metrics, "policy/objective": loss.item()}

    def _divisor(self, counts: Counts) -> float:
        """Return the number by which the sum of the policy loss over a minibatch is divided (`learner.reduction`)."""
        divisors = {
            "token_mean": counts.tokens,
            "sequence_mean": counts.rollouts,
            "constant": counts.rollouts * self.max_new_tokens,
        }
        return divisors[self.config.reduction]

    def _value_gradient(self, critic: ValueNetwork, minibatch: Sequence[Experience]) -> float:
        """Compute the gradient of the value loss of a minibatch by backpropagation, and return the loss.

        Samples without returns, whose rollouts have no reward, are left out.
        """
        chosen = [e for e in minibatch if e.sample.returns is not None]
        tokens, total = total_weight(chosen) or 1, 0.0
        for group in self._micro_batches([e.sample for e in chosen]):
            batch = collate([chosen[i].sample for i in group], self.policy.device)
            loss = self._value_loss(critic, batch) / tokens
            loss.backward()
            total += loss.item()
        return total

    def _value_loss(self, critic: ValueNetwork, batch: Batch) -> torch.Tensor:
        """Return the value loss of a micro-batch, summed over its trained tokens."""
        assert batch.returns is not None and batch.values is not None, (
            "the value loss needs returns and the values predicted before the update"
        )
        predicted = critic(batch.token_ids, batch.loss_mask)  # (N,)
        mask = batch.loss_mask
        return clipped_value_loss(
            predicted, batch.values[mask], batch.returns[mask], self.critic_settings.value_clip, batch.weights[mask]
        )


@contextlib.contextmanager
def _gradient_errors_named(iteration: int, network: str, setting: str, lr: float) -> Iterator[None]:
    """Add the iteration, the network and its learning rate to the message of a `GradientError`."""
    option = setting if "." in setting else f"ALGORITHM.{setting}"
    try:
        yield
    except GradientError as error:
        raise UserError(
            f"iteration {iteration}: {error} ({network}); lower {setting}, which is {lr:g}, and continue from the last "
            f"checkpoint with --resume RUN --{option} {lr / 10:g}, or start a new run with model.dtype float32"
        ) from None


def _weighted_sum(weights: Sequence[Sequence[float]], rows: Sequence[Sequence[float]]) -> float:
    """Return the sum of weight times entry over all entries of all rows. The rows can have different lengths."""
    return sum(w * x for ws, row in zip(weights, rows, strict=True) for w, x in zip(ws, row, strict=True))
