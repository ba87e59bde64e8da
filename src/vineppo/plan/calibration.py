"""Plans for this machine: run a small part of the first iteration and scale its counts and times up."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vineppo.config.schema import Config, RolloutConfig
from vineppo.config.settings import replace
from vineppo.credit import find_algorithm
from vineppo.learning.learner import TorchLearner
from vineppo.model.codec import Codec
from vineppo.plan.amounts import Amounts, Plan, guessed_amounts, iterations
from vineppo.plan.memory import available_memory, does_not_fit, memory_by_kind
from vineppo.plan.shape import count, shape_by_name, shape_of, trainable
from vineppo.training.configure import algorithm_settings
from vineppo.training.parts import build_parts, updates_per_iteration
from vineppo.training.rollouts import draw_problems, generated_tokens
from vineppo.types import Metrics, RolloutGroup, Sampler, SampleRequest, UserError

_CALIBRATED_ROLLOUTS = 8
"""Minimum number of responses in a calibration: fewer give unreliable response lengths and MC tokens."""


def calibrated_safely(config: Config, problems: int | None) -> Plan:
    """Calibrate, or raise UserError if the memory is too small.

    A calibration needs as much memory as a run, so the parts with a known size are checked before the model is loaded.
    """
    shape, available = shape_by_name(config), available_memory(config.model.device)
    amounts = guessed_amounts(config, None)
    memory = memory_by_kind(config, shape, amounts, trainable=trainable(config, shape))
    kinds = ("runtime", "weights", "optimizer", "gradients", "reference", "critic")
    if 0 < available < sum(memory[kind] for kind in kinds):
        raise UserError(does_not_fit(config, amounts, memory, available))
    try:
        return _calibrated(config, problems)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(does_not_fit(config, amounts, memory, available)) from error


def _calibrated(config: Config, problems: int | None) -> Plan:
    own = config.rollouts
    few = min(problems or max(2, -(-_CALIBRATED_ROLLOUTS // own.group_size)), own.num_problems)
    quiet = replace(config.learner, lr=0.0, epochs=1, minibatch_size=few * own.group_size, weight_decay=0.0)
    parts = build_parts(replace(config, rollouts=replace(own, num_problems=few), learner=quiet))
    policy, learner = parts.policy, parts.learner
    drawn = draw_problems(parts.task, config.run.seed, 1, few)
    (groups, _), sample_seconds = _timed(lambda: parts.sample(drawn, 1))
    (samples, metrics), credit_seconds = _timed(lambda: parts.credit(groups, 1))
    step = _step_seconds(learner)
    _, update_seconds = _timed(lambda: learner.update(samples, 1, few * own.group_size))
    prepare = _seconds(lambda: learner.logprobs(policy, samples)) * (2 if learner.reference else 1)
    scale = own.num_problems / few
    amounts = _amounts(config, groups, metrics, scale)
    parts.update_sampler()
    per_row = _seconds_per_row(parts.sampler, groups, own)
    tokens = generated_tokens(groups)
    extra = (scale - 1) * per_row
    passes = max(0.0, update_seconds - prepare - step)
    seconds = {
        "sample": sample_seconds + extra * tokens,
        "credit": credit_seconds + extra * metrics["tokens/mc"] if metrics.get("tokens/mc") else credit_seconds * scale,
        "update": scale * (prepare + config.learner.epochs * passes) + amounts.updates * step,
    }
    memory = memory_by_kind(config, shape_of(policy.model), amounts, trainable=count(policy.model, trainable=True))
    what = f"calibrated on {few} of {own.num_problems} problems: {tokens:,} tokens and their credit"
    return Plan(
        what, amounts, seconds, iterations(config, amounts, seconds), memory, available_memory(config.model.device),
        _variants(config, parts.codec, groups, amounts, seconds),
    )  # fmt: skip


def _step_seconds(learner: TorchLearner) -> float:
    """Seconds of one optimizer step with learning rate 0, which leaves the weights unchanged.

    Each optimizer steps twice; the first step allocates memory and is not timed.
    """
    seconds = 0.0
    for optimizer in filter(None, (learner.optimizer, learner.critic_optimizer)):
        for timed in (False, True):
            for parameter in optimizer.parameters:
                parameter.grad = torch.zeros_like(parameter)
            seconds += timed * _seconds(lambda optimizer=optimizer: optimizer.step(0.0, 1.0))
    return seconds


def _seconds_per_row(sampler: Sampler, groups: Sequence[RolloutGroup], own: RolloutConfig) -> float:
    """Seconds per additional row of a decoding step, measured as the slope between 16 and 96 rows."""
    prompts = [group.rollouts[0].prompt_ids for group in groups]
    few, many, positions = 16, 96, 12
    times = []
    for rows in (few, many):
        requests = [
            SampleRequest(ids, rows // len(prompts), positions, seed=i, temperature=own.temperature, stop=own.stop)
            for i, ids in enumerate(prompts)
        ]
        sampler.sample(requests)
        found, seconds = _timed(lambda requests=requests: sampler.sample(requests))
        times.append((sum(len(c.token_ids) for group in found for c in group), seconds))
    (n, a), (m, b) = times
    return max(0.0, (b - a) / max(1, m - n))


def _amounts(config: Config, groups: Sequence[RolloutGroup], metrics: Metrics, scale: float) -> Amounts:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    count = config.rollouts.num_problems * config.rollouts.group_size
    return Amounts(
        rollouts=count,
        rollout_tokens=generated_tokens(groups) * scale,
        prompt_tokens=sum(len(r.prompt_ids) for r in rollouts) / len(rollouts),
        mc_tokens=metrics.get("tokens/mc", 0.0) * scale,
        steps_per_response=metrics.get("credit/steps_per_response", 1.0),
        updates=updates_per_iteration(config),
    )


def _variants(
    config: Config, codec: Codec, groups: Sequence[RolloutGroup], amounts: Amounts, seconds: Mapping[str, float]
) -> list[tuple[str, float, float]]:
    """Estimates for other K, splitters and group sizes, in proportion to the tokens that they need."""
    algorithm, total = find_algorithm(config.algorithm), sum(seconds.values())
    if algorithm.plan is None:
        return []
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    variants = algorithm.plan.variants(algorithm_settings(config, algorithm), codec, rollouts)
    rows = [(name, amounts.mc_tokens * share, total + (share - 1) * seconds["credit"]) for name, share in variants]
    return [
        *rows,
        (f"rollouts.group_size {2 * config.rollouts.group_size} (at most)", amounts.mc_tokens * 2, total * 2),
    ]


def _timed(work: Any) -> tuple[Any, float]:
    began = time.perf_counter()
    done = work()
    return done, time.perf_counter() - began


def _seconds(work: Any) -> float:
    return _timed(work)[1]
