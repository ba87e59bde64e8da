"""DPO-positive (Pal et al., arXiv 2402.13228): training on pairs of a right and a wrong response of the starting model.

Letters in shapes: N pairs.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from vineppo.config.offline import DPOPositiveConfig
from vineppo.learning.losses import ROUNDING, dpo_positive_loss
from vineppo.model.batch import micro_batches
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.seeds import derive_seed
from vineppo.training.offline import OfflineSession, end_iteration, sample_round, split_by_reward
from vineppo.training.supervised import Demonstration, padded
from vineppo.types import Metrics, Rollout, RolloutGroup, UserError


@dataclass(frozen=True)
class Pair:
    """A right and a wrong response to the same problem."""

    chosen: Demonstration
    """The right response."""
    rejected: Demonstration
    """The wrong response."""

    @property
    def trained_tokens(self) -> int:
        """Number of tokens of both responses."""
        return sum(len(ids) - prompt for ids, prompt in (self.chosen, self.rejected))


def train_on_pairs(session: OfflineSession) -> None:
    """Sample responses once, and train the policy of the session on pairs of them. Each epoch is an iteration.

    Raises:
        UserError: if no problem has both a right and a wrong response.
    """
    config = session.config
    groups, sampling = sample_round(session, 1)
    pairs = pairs_of(groups, config.reward_threshold, config.dpo_positive.max_pairs, (config.run.seed,))
    if not pairs:
        divided = split_by_reward(groups, config.reward_threshold).values()
        solved = sum(bool(right) for right, _ in divided)
        raise UserError(
            f"none of {len(divided)} problems has both a right response (reward at least {config.reward_threshold:g}) "
            f"and a wrong one ({solved} have a right one), so there are no pairs; raise rollouts.num_problems or "
            "rollouts.group_size, or change reward_threshold, the problems or the model"
        )
    temperature, max_tokens, totals = config.rollouts.temperature, config.micro_batch_tokens, list[Metrics]()
    with session.timer("update"):
        responses = [item for pair in pairs for item in (pair.chosen, pair.rejected)]
        refs = response_logprobs(session.policy, responses, max_tokens, temperature)
        passes = session.passes(len(pairs), 1)

    def gradient(indices: Sequence[int]) -> float:
        """Compute the gradient of some of the pairs, and return the mean loss of a pair."""
        batch = [pairs[i] for i in indices]
        sums = accumulate_pairs(session.policy, batch, refs, config.dpo_positive, temperature, max_tokens)
        totals.append(sums)
        return sums["loss"] / len(batch)

    for epoch in range(config.dpo_positive.epochs):
        totals.clear()
        with session.timer("update"):
            losses, norms = passes.run(epoch, gradient)
            session.updates += len(losses)
            session.update_sampler()
        means = {f"dpo_positive/{name}": sum(t[name] for t in totals) / len(pairs) for name in totals[0]}
        metrics = {**means, "dpo_positive/pairs": len(pairs), "dpo_positive/grad_norm": sum(norms) / len(norms)}
        trained = sum(pair.trained_tokens for pair in pairs)
        text = f"{len(pairs):,} pairs  loss {means['dpo_positive/loss']:.4f}"
        end_iteration(session, [] if epoch else groups, trained, metrics | ({} if epoch else sampling), text)


def pairs_of(
    groups: Sequence[RolloutGroup], threshold: float, max_pairs: int, address: Sequence[int | str]
) -> list[Pair]:
    """Return pairs of a right and a wrong response, at most `max_pairs` of each problem.

    Every right response can be paired with every wrong response to its problem. If that gives more pairs than
    `max_pairs`, a random selection is returned. The token ids are those that were sampled.

    Args:
        threshold: smallest reward of a right response. Responses without a reward are in no pair.
        address: values from which the seeds of the selections are derived.
    """
    pairs = []
    for problem_id, (right, wrong) in split_by_reward(groups, threshold).items():
        numbers: Sequence[int] = range(len(right) * len(wrong))
        if len(numbers) > max_pairs:
            numbers = random.Random(derive_seed(*address, problem_id, "pairs")).sample(numbers, max_pairs)
        for number in numbers:
            first, second = divmod(number, len(wrong))
            pairs.append(Pair(_item(right[first]), _item(wrong[second])))
    return pairs


def _item(rollout: Rollout) -> Demonstration:
    return rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids)


@torch.no_grad()
def response_logprobs(
    policy: Policy, responses: Iterable[Demonstration], max_tokens: int, temperature: float
) -> dict[Demonstration, float]:
    """Return the log-probability of each whole response in nats. Equal responses are computed once.

    Args:
        max_tokens: maximum number of padded tokens of a forward pass.
        temperature: the logits are divided by this number.
    """
    distinct, result = list(dict.fromkeys(responses)), dict[Demonstration, float]()
    for group in micro_batches([len(ids) for ids, _ in distinct], max_tokens):
        items = [distinct[i] for i in group]
        result |= zip(items, _sums(policy, items, temperature).tolist(), strict=True)
    return result


def _sums(policy: Policy, items: Sequence[Demonstration], temperature: float) -> torch.Tensor:
    """Return the log-probability of each whole response in nats, with gradients, shape (len(items),)."""
    token_ids, mask = padded(items, policy.device)
    logprobs, _ = token_logprobs(policy.model, token_ids, mask, temperature)
    return torch.stack([part.sum() for part in logprobs.split([len(ids) - prompt for ids, prompt in items])])


def accumulate_pairs(
    policy: Policy,
    batch: Sequence[Pair],
    refs: Mapping[Demonstration, float],
    settings: DPOPositiveConfig,
    temperature: float,
    max_tokens: int,
) -> Metrics:
    """Compute the gradient of the mean DPO-positive loss of a batch by backpropagation, in micro-batches.

    The responses of a pair are in the same micro-batch.

    Args:
        refs: log-probability of each response under the starting model in nats.
        settings: parameters of the loss.
        temperature: the logits are divided by this number.
        max_tokens: maximum number of padded tokens of a micro-batch.
    Returns:
        Sums over the pairs: `loss`; `chosen_log_ratio` and `rejected_log_ratio` in nats; `ordered_share`, the number of
        pairs whose chosen log-ratio is the higher one; `penalised_share`, the number of pairs whose right response is
        less probable than under the starting model.
    """
    totals = dict.fromkeys(("loss", "chosen_log_ratio", "rejected_log_ratio", "ordered_share", "penalised_share"), 0.0)
    for group in micro_batches([2 * max(len(p.chosen[0]), len(p.rejected[0])) for p in batch], max_tokens):
        items = [batch[i].chosen for i in group] + [batch[i].rejected for i in group]
        sums = _sums(policy, items, temperature)  # (2N,)
        ref_sums = sums.new_tensor([refs[item] for item in items])  # (2N,)
        chosen, rejected = sums.chunk(2)  # (N,)
        ref_chosen, ref_rejected = ref_sums.chunk(2)  # (N,)
        loss, _ = dpo_positive_loss(chosen, rejected, ref_chosen, ref_rejected, settings.beta, settings.penalty)
        (loss / len(batch)).backward()
        right, wrong = (sums - ref_sums).detach().chunk(2)
        totals["loss"] += loss.item()
        totals["chosen_log_ratio"] += right.sum().item()
        totals["rejected_log_ratio"] += wrong.sum().item()
        totals["ordered_share"] += (right > wrong).sum().item()
        totals["penalised_share"] += (right < -ROUNDING).sum().item()
    return totals
