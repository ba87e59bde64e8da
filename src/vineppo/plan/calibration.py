"""Predict the tokens, seconds and memory of a run on this machine by a calibration.

A calibration runs the first iteration of the run with fewer problems. Its numbers of tokens and its seconds are then
scaled up to the number of problems of a whole iteration.
"""

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
from vineppo.plan.datasheet import separate_passes
from vineppo.plan.memory import available_memory, does_not_fit, gpu_memory_of, memory_by_kind
from vineppo.plan.shape import count, count_trainable, shape_from_config, shape_of
from vineppo.training.configure import algorithm_settings
from vineppo.training.parts import build_parts, updates_per_iteration
from vineppo.training.rollouts import draw_problems, generated_tokens
from vineppo.types import Metrics, RolloutGroup, Sampler, SampleRequest, UserError

_CALIBRATED_ROLLOUTS = 8
"""Minimum number of rollouts in a calibration, unless an iteration of the run has fewer. With fewer rollouts, the means
of the response length and of the MC tokens would be unreliable."""


def calibrated_safely(config: Config, problems: int | None) -> Plan:
    """Predict a run by a calibration, after a check that the run fits into memory.

    The check comes first because a calibration needs about as much memory as the run. The check counts only the kinds
    of memory whose size is known before the calibration.

    Args:
        config: configuration of the run.
        problems: number of problems in the calibration. None uses two problems, or more if the groups are small.
    Raises:
        UserError: if the memory is too small for the run.
    """
    shape, available = shape_from_config(config), available_memory(config.model.device)
    amounts = guessed_amounts(config, None)
    memory = memory_by_kind(config, shape, amounts, count_trainable(config, shape), gpu_memory_of(config.model.device))
    kinds = ("runtime", "weights", "optimizer", "gradients", "reference", "critic")
    if 0 < available < sum(memory[kind] for kind in kinds):
        raise UserError(does_not_fit(config, amounts, memory, available))
    try:
        return _calibrated(config, problems)
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(does_not_fit(config, amounts, memory, available)) from error


def _calibrated(config: Config, problems: int | None) -> Plan:
    """Predict a run by a calibration, without a check of the memory. See `calibrated_safely` for the arguments."""
    settings = config.rollouts
    num_problems = min(problems or max(2, -(-_CALIBRATED_ROLLOUTS // settings.group_size)), settings.num_problems)
    num_rollouts = num_problems * settings.group_size
    # With learning rate 0 and weight decay 0, the timed update does not change the weights of the policy.
    learner_settings = replace(config.learner, lr=0.0, epochs=1, minibatch_size=num_rollouts, weight_decay=0.0)
    parts = build_parts(
        replace(config, rollouts=replace(settings, num_problems=num_problems), learner=learner_settings)
    )
    policy, learner = parts.policy, parts.learner
    drawn = draw_problems(parts.task, config.run.seed, 1, num_problems)
    (groups, _), sample_seconds = _timed(lambda: parts.sample(drawn, 1))
    (samples, metrics), credit_seconds = _timed(lambda: parts.credit(groups, 1))
    step = _step_seconds(learner)  # seconds of one optimizer step
    _, update_seconds = _timed(lambda: learner.update(samples, 1, num_rollouts))
    # `before`: seconds of the forward passes before the update, with all samples in one minibatch. The reference model
    # takes as long as the policy.
    forward = _seconds(lambda: learner.logprobs(policy, samples))
    before = forward * separate_passes(replace(config, learner=learner_settings), num_rollouts)
    scale = settings.num_problems / num_problems
    amounts = _amounts(config, groups, metrics, scale)
    parts.update_sampler()
    # The whole iteration has `scale` times as many rows in each decoding step. A batch with more rows takes little more
    # time, so only `per_row` seconds are added for each additional token.
    per_row = _seconds_per_row(parts.sampler, groups, settings)
    tokens = generated_tokens(groups)
    extra = (scale - 1) * per_row
    # Seconds of the forward and backward passes of one epoch.
    passes = max(0.0, update_seconds - before - step)
    prepare = forward * separate_passes(config, num_rollouts * scale)
    # Without MC rollouts, the time of the credit function is proportional to the number of problems.
    seconds = {
        "sample": sample_seconds + extra * tokens,
        "credit": credit_seconds + extra * metrics["tokens/mc"] if metrics.get("tokens/mc") else credit_seconds * scale,
        "update": scale * (prepare + config.learner.epochs * passes) + amounts.updates * step,
    }
    memory = memory_by_kind(
        config,
        shape_of(policy.model),
        amounts,
        count(policy.model, trainable=True),
        gpu_memory_of(config.model.device),
    )
    source = f"calibrated on {num_problems} of {settings.num_problems} problems: {tokens:,} tokens and their credit"
    return Plan(
        source, amounts, seconds, iterations(config, amounts, seconds), memory, available_memory(config.model.device),
        _variants(config, parts.codec, groups, amounts, seconds),
    )  # fmt: skip


def _step_seconds(learner: TorchLearner) -> float:
    """Measure the seconds of one optimizer step of the policy, plus one of the value network if there is one.

    The learning rate is 0, so the weights do not change. Each optimizer makes two steps. Only the second step is timed,
    because the first step also allocates memory.
    """
    seconds = 0.0
    for optimizer in filter(None, (learner.optimizer, learner.critic_optimizer)):
        for timed in (False, True):
            for parameter in optimizer.parameters:
                parameter.grad = torch.zeros_like(parameter)
            seconds += timed * _seconds(lambda optimizer=optimizer: optimizer.step(0.0, 1.0))
    return seconds


def _seconds_per_row(sampler: Sampler, groups: Sequence[RolloutGroup], settings: RolloutConfig) -> float:
    """Measure how many seconds longer a decoding step takes if the batch has one more row (sequence).

    A decoding step samples one token for each row. Batches of about 16 and about 96 rows are sampled. The result is the
    difference between their seconds, divided by the difference between their numbers of tokens.

    Args:
        sampler: the sampler to measure.
        groups: rollouts whose prompts are used.
        settings: temperature and stop strings.
    """
    prompts = [group.rollouts[0].prompt_ids for group in groups]
    few, many, positions = 16, 96, 12
    times = []
    for rows in (few, many):
        requests = [
            SampleRequest(
                ids, rows // len(prompts), positions, seed=i, temperature=settings.temperature, stop=settings.stop
            )
            for i, ids in enumerate(prompts)
        ]
        sampler.sample(requests)  # not timed, because the first call for a batch size can be slower
        found, seconds = _timed(lambda requests=requests: sampler.sample(requests))
        times.append((sum(len(c.token_ids) for group in found for c in group), seconds))
    (few_tokens, few_seconds), (many_tokens, many_seconds) = times
    return max(0.0, (many_seconds - few_seconds) / max(1, many_tokens - few_tokens))


def _amounts(config: Config, groups: Sequence[RolloutGroup], metrics: Metrics, scale: float) -> Amounts:
    """Return the amounts of a whole iteration, from the rollouts and metrics of a calibration.

    Args:
        config: configuration of the run.
        groups: rollouts of the calibration.
        metrics: metrics that the credit function returned in the calibration.
        scale: number of problems of a whole iteration, divided by the number of problems in the calibration.
    """
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
    """Estimate MC tokens and seconds per iteration for other settings of the algorithm and for a doubled group size.

    The estimates assume that the time is proportional to the number of tokens.

    Args:
        config: configuration of the run.
        codec: codec of the policy.
        groups: rollouts of the calibration.
        amounts: amounts of one iteration with the settings of `config`.
        seconds: phase -> seconds of one iteration with the settings of `config`.
    Returns:
        List of (changed setting, MC tokens, seconds), as in `Plan.variants`. It is empty if the algorithm samples no MC
        rollouts.
    """
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
    """Call the function `work` without arguments. Return its result and its duration in seconds."""
    began = time.perf_counter()
    done = work()
    return done, time.perf_counter() - began


def _seconds(work: Any) -> float:
    """Call the function `work` without arguments. Return its duration in seconds."""
    return _timed(work)[1]
