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
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vineppo.config.schema import CriticConfig, LearnerConfig
from vineppo.learning.experience import (
    Counts,
    Experience,
    check_samples,
    credited,
    loss_scale,
    minibatches,
    ratio_weight,
    scaled_samples,
    total_weight,
    trained_part,
    without_truncated,
)
from vineppo.learning.losses import clipped_value_loss
from vineppo.learning.objective import all_tokens_stay, policy_loss, scored_in_training, tokens_of
from vineppo.learning.optim import GradientError, Optimizer, lr_factor
from vineppo.learning.sample_metrics import kl_metric, kl_of_tokens, sample_metrics
from vineppo.learning.scaling import penalties_to_go
from vineppo.learning.scores import Savings, Scores, ScoreSheet, micro_batches_of, sequences_of, weights_of
from vineppo.learning.sharding import (
    ONE_RANK,
    Ranks,
    gather_weights,
    release,
    shard_critic,
    sharded_policy,
    sharded_reference,
)
from vineppo.learning.state import Trained, read_learner, write_learner
from vineppo.learning.sums import Sums
from vineppo.model.critic import ValueNetwork
from vineppo.model.logits import sequence_scores
from vineppo.model.lora import merged_weights
from vineppo.model.packing import packing_supported
from vineppo.model.policy import Policy, Reference
from vineppo.model.sequences import build_sequences, divide, mode
from vineppo.seeds import derive_seed
from vineppo.types import Metrics, Rollout, TrainingSample, UserError


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
        savings: which ways to save computation are used; other values than the default are for measurements and tests.
        ranks: the processes that share the work (`learning.sharding`). With several, each has a shard of the networks,
            and `policy` is a whole copy, which every update changes in place. All ranks must make the same calls of
            the public methods, except for `logprobs` and `weights`, or rank 0 leads and announces its calls.
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
        savings: Savings = Savings(),  # noqa: B008
        ranks: Ranks = ONE_RANK,
    ):
        self.policy, self.critic, self.ranks = policy, critic, ranks
        self.trained = sharded_policy(policy, ranks)
        """The policy that is trained: a sharded copy of `policy`, or `policy` itself in one process."""
        self.reference = sharded_reference(reference, policy, self.trained, ranks)
        shard_critic(critic, ranks)
        self.config, self.critic_settings = config, critic_settings or CriticConfig()
        self.temperature, self.total_updates, self.seed = temperature, total_updates, seed
        self.max_new_tokens, self.savings = max_new_tokens, savings
        self.optimizer = Optimizer(self.trained.model.parameters(), config.betas, config.weight_decay)
        self.critic_optimizer = (
            None if critic is None else Optimizer(critic.parameters(), config.betas, config.weight_decay)
        )
        self.updates = 0
        self.entropies: list[list[float]] = []
        """Entropy of the policy's next-token distribution at each trained token of each sample of the latest `update`,
        before its first optimizer step, at the sampling temperature, in nats; one list per sample. They are written to
        the records of the run. Empty if `update` got no samples."""
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
        self.ranks.announce("update", samples, iteration, num_rollouts)
        check_samples(samples, with_returns=self.critic is not None)
        if self.config.mask_truncated:
            samples = without_truncated(samples)
        train_policy = self.critic is None or iteration > self.critic_settings.value_only_iterations
        parts = [self._order(len(samples), num_rollouts, iteration, epoch) for epoch in range(self.config.epochs)]
        experience: list[Experience] = []
        metrics: Metrics = {}
        gradient: Metrics | None = None
        self.entropies = []
        if samples:
            first = next(indices for indices in parts[0] if indices)
            if not train_policy or not self.savings.first_forward:
                first = ()
            experience, metrics, gradient = self._prepare(samples, num_rollouts, iteration, first)
        try:
            self.ranks.together(None if check is None else lambda: check(metrics))
        except BaseException:
            self.optimizer.clear_gradients()
            raise
        totals: dict[str, float] = defaultdict(float)
        updates_before = self.updates
        for indices in itertools.chain.from_iterable(parts):
            if indices:
                # Number of rollouts that correspond to this part of the samples.
                share = num_rollouts * len(indices) / len(samples)
                chosen, known = [experience[i] for i in indices], () if gradient is None else (gradient,)
                for key, value in self._update(chosen, train_policy, share, iteration, *known).items():
                    totals[key] += value
                gradient = None
            self.scheduled += 1
        gather_weights(self.trained.model, self.policy.model)
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
        self.ranks.announce("predict_values", rollouts)
        values: list[list[float]] = [[] for _ in rollouts]
        predicted: list[tuple[list[int], torch.Tensor]] = []
        ids = [r.prompt_ids + r.response_ids for r in rollouts]
        masks = [(0,) * len(r.prompt_ids) + (1,) * len(r.response_ids) for r in rollouts]
        packed = self._packs(self.policy)
        limit = self.ranks.max_tokens(sum(map(len, ids)), self.config.micro_batch_tokens)
        for group, _ in self.ranks.share(divide(ids, masks, limit, packed)):
            chosen_ids, chosen_masks = ([rows[i] for i in group] for rows in (ids, masks))
            sequences = build_sequences(chosen_ids, chosen_masks, [()] * len(group), packed, self.policy.device)
            with mode(self.critic.body, packed):
                predicted.append((group, self.critic.of_sequences(sequences)))
        release(self.critic)
        for group, tensor in predicted:  # only now, because it waits for the device
            flat = tensor.tolist()
            for i in group:
                count = len(rollouts[i].response_ids)
                values[i], flat = flat[:count], flat[count:]
        parts = self.ranks.gather(values)
        return [next((row for row in rows if row), []) for rows in zip(*parts, strict=True)]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the (name, tensor) pairs of the policy's current weights, with adapters merged into the weights."""
        return merged_weights(self.policy.model)

    def save(self, folder: Path) -> None:
        """Write trained weights, optimizer states and numbers of updates to a folder.

        One process writes the file `learner.pt`. Several processes write the directory `learner`, each its shards; the
        folder must be on a file system that all of them share.
        """
        self.ranks.announce("save", folder)
        counts = {"updates": self.updates, "scheduled": self.scheduled}
        write_learner(folder, self._networks(), counts, self.ranks)

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote to a folder, with this or another number of processes.

        Raises:
            UserError: if the state is missing or cannot be read.
        """
        self.ranks.announce("load", folder)
        self.updates, self.scheduled = read_learner(folder, self._networks(), self.ranks)
        gather_weights(self.trained.model, self.policy.model)

    def _networks(self) -> list[Trained]:
        """Return the networks that are trained: the policy, and the value network if there is one."""
        networks = [Trained("policy", self.trained.model, self.optimizer)]
        if self.critic is not None and self.critic_optimizer is not None:
            networks.append(Trained("critic", self.critic, self.critic_optimizer))
        return networks

    def _order(self, count: int, num_rollouts: int, iteration: int, epoch: int) -> list[Sequence[int]]:
        """Return the indices of the samples of each minibatch of an epoch, in random order."""
        order = list(range(count))
        random.Random(derive_seed(self.seed, iteration, "minibatches", epoch)).shuffle(order)
        return minibatches(order, self.config.minibatch_size, num_rollouts)

    def _prepare(
        self, samples: Sequence[TrainingSample], num_rollouts: int, iteration: int, first: Sequence[int]
    ) -> tuple[list[Experience], Metrics, Metrics | None]:
        """Prepare the samples of an iteration for the updates.

        The log-probabilities under the policy and under the reference are computed. The advantages are reduced by the
        KL penalty if `config.kl.place` is "reward", and are then scaled.

        A sample of the first minibatch gets its old log-probabilities from the minibatch's forward pass with gradients,
        if that is enough (`scored_in_training`). All other samples get them from a separate pass without gradients.

        Args:
            first: the indices of the samples of the first minibatch; empty if all samples need a separate pass.
        Returns:
            (one `Experience` per sample, metrics of the samples, metrics of the gradient of the first minibatch if it
            has been computed, or None).
        """
        kl_weights, sheet = self._kl_weights(len(samples), iteration), ScoreSheet(samples)
        dropout = self.policy.has_dropout
        joined = {i for i in first if scored_in_training(self.config, kl_weights[i] > 0, dropout)}
        others = [i for i in range(len(samples)) if i not in joined]
        self._score(self.trained, others, sheet, ranks=self.ranks)
        refs = self._ref_logprobs(samples, kl_weights)
        rows = [trained_part(s.advantages, s) for s in samples]
        if self.reference is not None and self.config.kl.place == "reward":
            penalties = [kl_of_tokens(o, r or (), self.config.kl) for o, r in zip(sheet.logprobs, refs, strict=True)]
            rows = [
                [a - self.config.kl.coefficient * p for a, p in zip(row, to_go, strict=True)]
                for row, to_go in zip(rows, penalties_to_go(samples, penalties), strict=True)
            ]
        scaled = scaled_samples(samples, rows, self.config.advantage_scaling)
        experience = [
            Experience(sample, None, (), ref, loss_scale(sample, self.config.reduction), weight)
            for sample, ref, weight in zip(scaled, refs, kl_weights, strict=True)
        ]

        def with_old(chosen: Iterable[int]) -> None:
            """Give the old log-probabilities on the sheet to some of the samples."""
            for i in chosen:
                old, alternatives = tuple(sheet.logprobs[i]), tuple(sheet.alternatives[i])
                experience[i] = replace(experience[i], old_logprobs=old, old_alternatives=alternatives)

        with_old(i for i in range(len(samples)) if i not in joined)
        gradient = None
        if joined:
            share = num_rollouts * len(first) / len(samples)
            gradient = self._policy_gradient([experience[i] for i in first], share, sheet, first)
            with_old(joined)
        self.entropies = sheet.entropies
        metrics = sample_metrics(samples, sheet.scores(), self.config.importance_sampling_cap)
        if self.reference is not None:
            metrics["kl/ref"] = kl_metric(samples, sheet.logprobs, refs, kl_weights, self.config.kl) / num_rollouts
        return experience, metrics, gradient

    def _kl_weights(self, count: int, iteration: int) -> list[float]:
        """Return the factor of the KL term of each sample: 1 / share with probability `config.kl.share`, else 0.

        Without a reference, it is 0.
        """
        share = self.config.kl.share
        if self.reference is None or share == 1:
            return [float(self.reference is not None)] * count
        seeds = (derive_seed(self.seed, iteration, "kl share", index) for index in range(count))
        return [1 / share if random.Random(seed).random() < share else 0.0 for seed in seeds]

    def _ref_logprobs(
        self, samples: Sequence[TrainingSample], kl_weights: Sequence[float]
    ) -> list[tuple[float, ...] | None]:
        """Return the log-probabilities of the trained tokens of each sample under the reference.

        They are None without a reference, and for samples whose KL term has the weight 0.
        """
        refs: list[tuple[float, ...] | None] = [None] * len(samples)
        if self.reference is not None:
            sheet, drawn = ScoreSheet(samples), [i for i, weight in enumerate(kl_weights) if weight]
            with self.reference.active() as start:
                self._score(start, drawn, sheet, metrics=False, ranks=self.ranks)
            for i in drawn:
                refs[i] = tuple(sheet.logprobs[i])
        return refs

    def logprobs(self, policy: Policy, samples: Sequence[TrainingSample]) -> Scores:
        """Compute the log-probabilities of the trained tokens and of the alternatives under a whole policy.

        With several ranks, this rank computes them alone.
        """
        sheet = ScoreSheet(samples)
        self._score(policy, range(len(samples)), sheet)
        return sheet.scores()

    def ref_logprobs(self, samples: Sequence[TrainingSample]) -> list[tuple[float, ...]]:
        """Compute the log-probabilities of the trained tokens of each sample under the reference; [] without one."""
        if self.reference is None:
            return []
        self.ranks.announce("ref_logprobs", samples)
        return [row or () for row in self._ref_logprobs(samples, [1.0] * len(samples))]

    @torch.no_grad()
    def _score(
        self,
        policy: Policy,
        indices: Sequence[int],
        sheet: ScoreSheet,
        metrics: bool = True,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """Add the scores of some samples of a sheet under a policy to the sheet.

        Args:
            metrics: whether the entropies and variances are computed.
            ranks: the ranks that share the work. The policy is sharded if there are several.
        """
        samples, packed = [sheet.samples[i] for i in indices], self._packs(policy)
        part, scored = ScoreSheet(sheet.samples) if ranks.count > 1 else sheet, []
        for group, counts in ranks.share(self._micro_batches(samples, packed, ranks)):
            chosen = [samples[i] for i in group]
            sequences = sequences_of(chosen, packed, policy.device)
            with mode(policy.model, packed):
                scores = sequence_scores(
                    policy.model, sequences, self.temperature, variances=metrics, chunked=self.savings.chunked
                )
            if counts:
                part.add([indices[i] for i in group], scores, weights_of(chosen, policy.device))
                scored += [indices[i] for i in group]
        if ranks.count > 1:
            release(policy.model)
        sheet.merge(ranks, part, scored)

    def _micro_batches(self, samples: Sequence[TrainingSample], packed: bool, ranks: Ranks) -> list[list[int]]:
        """Return the indices of the samples, divided into micro-batches."""
        limit = ranks.max_tokens(sum(len(s.token_ids) for s in samples), self.config.micro_batch_tokens)
        return micro_batches_of(samples, limit, packed)

    def _packs(self, policy: Policy) -> bool:
        """Return whether the samples are packed for the model of a policy without dropout."""
        # A sharded model is not tried, because all ranks would have to try it at the same time.
        model = policy.model if self.ranks.count == 1 else self.policy.model
        return self.savings.packed and packing_supported(model)

    def _update(
        self,
        minibatch: Sequence[Experience],
        train_policy: bool,
        num_rollouts: float,
        iteration: int,
        gradient: Metrics | None = None,
    ) -> Metrics:
        """Make one optimizer step of the policy and one of the value network.

        Args:
            train_policy: whether the policy is trained; False trains only the value network.
            num_rollouts: number of rollouts in the iteration, multiplied by the fraction of the samples that are in the
                minibatch.
            iteration: number of the iteration, for error messages.
            gradient: the result of `_policy_gradient`, if it has been called for this minibatch.
        Returns:
            The metrics of the minibatch.
        """
        config = self.config
        metrics: Metrics = {}
        factor = lr_factor(self.scheduled, config.warmup_updates, self.total_updates, config.decay)
        if train_policy:
            metrics |= self._policy_gradient(minibatch, num_rollouts) if gradient is None else gradient
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

    def _policy_gradient(
        self,
        minibatch: Sequence[Experience],
        num_rollouts: float,
        sheet: ScoreSheet | None = None,
        numbers: Sequence[int] = (),
    ) -> Metrics:
        """Compute the gradient of the policy loss of a minibatch by backpropagation, and return its metrics.

        Args:
            sheet: gets the scores of the samples that have no old log-probabilities yet.
            numbers: the indices of the samples of the minibatch on the sheet.
        """
        config, kl_in_loss = self.config, self.reference is not None and self.config.kl.place == "loss"
        numbered = credited(minibatch, [all_tokens_stay(config, e.kl_weight > 0) for e in minibatch])
        parts = [part for _, part in numbered]
        counts = Counts(
            total_weight(minibatch) or 1, num_rollouts, total_weight(parts) or 1, ratio_weight(minibatch) or 1
        )
        seed = derive_seed(self.seed, "dropout", self.updates)
        packed = self._packs(self.policy) and not self.policy.has_dropout
        totals = Sums()
        part, scored = ScoreSheet(sheet.samples) if sheet is not None and self.ranks.count > 1 else sheet, []
        for (group, new), real in self.ranks.share(list(self._gradient_batches(parts, packed))):
            chosen = [parts[i] for i in group]
            sequences = sequences_of([e.sample for e in chosen], packed, self.policy.device)
            masks = [e.sample.loss_mask for e in chosen]
            # The backward pass is inside, too, because gradient checkpointing computes layers again.
            with mode(self.trained.model, packed), self.trained.dropout([derive_seed(seed, i) for i in group], masks):
                entropies, chunked = config.entropy_coefficient > 0, self.savings.chunked
                scores = sequence_scores(
                    self.trained.model, sequences, self.temperature, entropies=entropies, variances=new, chunked=chunked
                )
                tokens = tokens_of(chosen, scores.logprobs)
                loss, terms = policy_loss(
                    config, tokens, scores, sequences.places, counts, self._divisor(counts), kl_in_loss
                )
                (loss if real else loss * 0).backward()
            if part is not None and new and real:
                indices = [numbers[numbered[i][0]] for i in group]
                part.add(indices, scores, tokens.weights)
                scored += indices
            if not real:
                terms = {name: (torch.zeros_like(number), divisor) for name, (number, divisor) in terms.items()}
            totals.add(terms)
        if sheet is not None and part is not None:
            sheet.merge(self.ranks, part, scored)
        return self.ranks.sums(totals.totals())

    def _gradient_batches(self, parts: Sequence[Experience], packed: bool) -> Iterator[tuple[list[int], bool]]:
        """Yield (indices of the samples of a micro-batch, whether they have no old log-probabilities yet)."""
        for new in (True, False):
            chosen = [i for i, e in enumerate(parts) if (e.old_logprobs is None) == new]
            samples = [parts[i].sample for i in chosen]
            for group in self._micro_batches(samples, packed, self.ranks):
                yield [chosen[i] for i in group], new

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
        chosen = [e.sample for e in minibatch if e.sample.returns is not None]
        tokens, total = sum(sum(s.trained_weights) for s in chosen) or 1, Sums()
        packed = self._packs(self.policy)
        for group, real in self.ranks.share(self._micro_batches(chosen, packed, self.ranks)):
            samples = [chosen[i] for i in group]
            with mode(critic.body, packed):
                loss = self._value_loss(critic, samples, packed) / tokens
                (loss if real else loss * 0).backward()
            total.add({"value/loss": (loss if real else torch.zeros_like(loss), 1.0)})
        return self.ranks.sums({"value/loss": 0.0, **total.totals()})["value/loss"]

    def _value_loss(self, critic: ValueNetwork, samples: Sequence[TrainingSample], packed: bool) -> torch.Tensor:
        """Return the value loss of a micro-batch, summed over its trained tokens."""
        device = self.policy.device
        values, returns = (
            torch.tensor([x for s in samples for x in trained_part(getattr(s, name), s)], device=device)
            for name in ("values", "returns")
        )
        predicted = critic.of_sequences(sequences_of(samples, packed, device))  # (N,)
        return clipped_value_loss(
            predicted, values, returns, self.critic_settings.value_clip, weights_of(samples, device)
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
