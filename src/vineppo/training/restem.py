"""RestEM (Singh et al., arXiv 2312.06585): rounds of sampling and of supervised fine-tuning on the right responses."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vineppo.model.lora import load_trained_state, trained_state
from vineppo.seeds import derive_seed
from vineppo.training.offline import OfflineSession, end_iteration, sample_round, split_by_reward
from vineppo.training.supervised import Demonstration, accumulate
from vineppo.types import Rollout, RolloutGroup, UserError


def train_in_rounds(session: OfflineSession) -> None:
    """Train the policy of the session in rounds. The result is the policy of the last round.

    A round samples responses with the policy of the round before, and trains the starting model on the right ones.

    Raises:
        UserError: if no response of a round is right.
    """
    config, start = session.config, weights_of(session.policy.model)
    for iteration in range(1, config.restem.rounds + 1):
        groups, metrics = sample_round(session, iteration)
        seeds = (config.run.seed, iteration)
        kept = kept_responses(groups, config.reward_threshold, config.restem.max_kept, seeds)
        sampled = sum(len(group.rollouts) for group in groups)
        if not kept:
            raise UserError(
                f"round {iteration}: none of {sampled} responses is right (reward at least "
                f"{config.reward_threshold:g}), so there is nothing to train on; raise rollouts.num_problems or "
                "rollouts.group_size, lower reward_threshold, or use easier problems or a better model"
            )
        with session.timer("update"):
            load_trained_state(session.policy.model, start)
            tuned = fine_tune(session, kept, iteration)
            session.update_sampler()
        solved = sum(bool(right) for right, _ in split_by_reward(groups, config.reward_threshold).values())
        trained = config.restem.epochs * sum(len(ids) - prompt for ids, prompt in kept)
        metrics |= {"restem/kept": len(kept), "restem/solved_share": solved / len({g.problem.id for g in groups})}
        text = f"kept {len(kept):,} of {sampled:,} responses  loss {tuned['restem/loss']:.4f}"
        end_iteration(session, groups, trained, metrics | tuned, text)


def kept_responses(
    groups: Sequence[RolloutGroup], threshold: float, max_kept: int, address: Sequence[int | str]
) -> list[Demonstration]:
    """Return the right responses of a round, at most `max_kept` to each problem, as demonstrations.

    Of more right responses to a problem, a random selection is kept, in which different texts come before repeated
    ones. The token ids are those that were sampled, so a response ends with an end-of-sequence token if and only if the
    policy sampled it.

    Args:
        threshold: smallest reward of a right response.
        address: values from which the seeds of the selections are derived, for example (run seed, round).
    """
    kept = []
    for problem_id, (right, _) in split_by_reward(groups, threshold).items():
        shuffled = random.Random(derive_seed(*address, problem_id, "kept")).sample(right, len(right))
        seen, different, repeated = set[str](), list[Rollout](), list[Rollout]()
        for rollout in shuffled:
            (repeated if rollout.text in seen else different).append(rollout)
            seen.add(rollout.text)
        kept += [*different, *repeated][:max_kept]
    return [(rollout.prompt_ids + rollout.response_ids, len(rollout.prompt_ids)) for rollout in kept]


def fine_tune(session: OfflineSession, kept: Sequence[Demonstration], iteration: int) -> dict[str, Any]:
    """Train the policy of the session on demonstrations, and return the metrics of the updates.

    The log-probabilities are those at the sampling temperature, as in the code of the VinePPO paper.

    Args:
        iteration: number of the round, counted from 1.
    """
    config = session.config

    def gradient(indices: Sequence[int]) -> float:
        """Compute the gradient of some of the demonstrations, and return the loss in nats per token."""
        batch = [kept[i] for i in indices]
        temperature, reduction = config.rollouts.temperature, config.restem.reduction
        return accumulate(session.policy, batch, config.micro_batch_tokens, temperature, reduction)[0]

    passes, losses, norms = session.passes(len(kept), iteration), list[float](), list[float]()
    for epoch in range(config.restem.epochs):
        losses, new_norms = passes.run(epoch, gradient)
        norms += new_norms
        session.updates += len(losses)
    return {"restem/loss": sum(losses) / len(losses), "restem/grad_norm": sum(norms) / len(norms)}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the trained weights of a model, for `load_trained_state`."""
    return {name: tensor.detach().clone() for name, tensor in trained_state(model).items()}
