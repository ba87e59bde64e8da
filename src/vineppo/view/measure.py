"""Measure Monte-Carlo values of the states of any response, also for algorithms that compute none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vineppo.credit.vineppo import VinePPOSettings, build_vine_credit
from vineppo.model.codec import Codec
from vineppo.run.records import rollout_rows
from vineppo.sampling.graded import grade_finished
from vineppo.types import FinishReason, Problem, Rollout, RolloutGroup, Sampler, Task
from vineppo.values import MonteCarlo
from vineppo.view.records import responses_from_rows
from vineppo.view.response import Response


@dataclass(frozen=True)
class Measuring:
    """What the values of states are measured with. The values are those of the sampler's current policy."""

    sampler: Sampler
    task: Task
    codec: Codec
    num_mc_rollouts: int
    """K, the number of continuations of each state."""
    max_new_tokens: int
    """Maximum number of tokens of a response."""
    seed: int
    """Seed from which the seeds of all continuations are derived."""
    temperature: float = 1.0
    stop: tuple[str, ...] = ()
    splitter: str = "newline"
    """How a response is cut into steps, as `vineppo.splitter`."""
    reuse: bool = False
    """Let a continuation count for several states (`vineppo.reuse`). Changes of the value are then less noisy. The
    responses must have been sampled by this policy at this temperature, with their log-probabilities."""

    def graded(self, problem: Problem, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> Rollout:
        """Return a rollout with the given tokens, and with its reward. Its log-probabilities are unknown, written as 0.

        The response counts as cut off if it has `max_new_tokens` tokens and the last one is no end-of-sequence token.
        """
        ids = tuple(response_ids)
        cut = len(ids) >= self.max_new_tokens and ids[-1] not in self.codec.eos_ids
        reason: FinishReason = "length" if cut else "stop"
        text = self.codec.decode(ids)
        [reward] = grade_finished(self.task, [problem], [text], [not cut], [ids])
        return Rollout(tuple(prompt_ids), ids, (0.0,) * len(ids), reason, text, reward)


def measured_response(
    measuring: Measuring, problem: Problem, prompt_ids: Sequence[int], response_ids: Sequence[int]
) -> Response:
    """Return a response with Monte-Carlo values of the states before its steps.

    Every state gets K new continuations.

    Args:
        measuring: the sampler, the task and the other objects. `reuse` must be false.
        problem: the problem, which grades the response and its continuations.
        prompt_ids: token ids of the prompt.
        response_ids: token ids of the response, at least one.
    Raises:
        ValueError: if `reuse` is true.
    """
    if measuring.reuse:
        raise ValueError("reuse needs the log-probabilities of the response; call measured_responses")
    rollout = measuring.graded(problem, prompt_ids, response_ids)
    return measured_responses(measuring, [RolloutGroup(problem, (rollout,))])[0]


def measured_responses(measuring: Measuring, groups: Sequence[RolloutGroup]) -> list[Response]:
    """Return the responses of groups with Monte-Carlo values of their states, and with all continuations.

    The values do not depend on the order of the groups, nor on other groups. The advantages of the tokens are those
    of their steps, as in VinePPO. A rollout without a reward has no values.

    Args:
        measuring: the sampler, the task and the other objects.
        groups: the rollouts, one group per problem.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    monte_carlo = MonteCarlo(
        sampler=measuring.sampler,
        task=measuring.task,
        decode=measuring.codec.decode,
        num_mc_rollouts=measuring.num_mc_rollouts,
        max_new_tokens=measuring.max_new_tokens,
        run_seed=measuring.seed,
        temperature=measuring.temperature,
        stop=measuring.stop,
    )
    settings = VinePPOSettings(splitter=measuring.splitter, reuse=measuring.reuse)
    credit = build_vine_credit(settings, monte_carlo, measuring.codec, keep=len(rollouts))
    samples, _ = credit(list(groups), 0)
    return responses_from_rows(rollout_rows(0, groups, samples, measuring.codec.decode))
