"""Find the responses that are worth reading first. Each function returns a list of entries, the most telling first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vineppo.types import UserError
from vineppo.view.explain import signed
from vineppo.view.response import Response, Step

LOW = 0.25
"""`lucky`: a value is low if it is at most this share of the way from the lowest to the highest reward."""
FALL = 0.25
"""`lucky`: the value must have fallen by at least this share of the range of the rewards."""


@dataclass(frozen=True)
class Entry:
    """A response in a queue, the step to look at, and why it is there."""

    response: Response
    step: Step | None
    reason: str


def drops(responses: Sequence[Response]) -> list[Entry]:
    """Return the responses by their most negative step, the most negative first.

    Each response has one entry: its step with the lowest advantage, if that is below 0. If the algorithm computes step
    advantages from values, this is the step with the largest fall of the value; otherwise the step whose token
    advantages have the lowest sum. If only the whole response has an advantage, the entry has no step.
    """
    found = []
    for response in responses:
        worst = lowest_step(response)
        if worst is not None and worst.advantage is not None and worst.advantage < 0:
            found.append((worst.advantage, response, worst))
    found.sort(key=lambda entry: (entry[0], entry[1].iteration, entry[1].number))
    return [
        Entry(response, None if response.credit == "response" else step, _fall(response, step))
        for _, response, step in found
    ]


def lowest_step(response: Response) -> Step | None:
    """Return the step with the lowest advantage, the first one if several have it; None without credit."""
    known = [step for step in response.steps if step.advantage is not None]
    return min(known, key=lambda step: (step.advantage or 0.0, step.number), default=None)


def _fall(response: Response, step: Step) -> str:
    """Return the reason of an entry of `drops`."""
    after, advantage = response.value_after(step), step.advantage or 0.0
    if response.credit == "values" and step.value is not None and after is not None:
        return f"value {step.value:.2f} to {after:.2f} ({signed(advantage)})"
    if response.credit == "response":
        return f"advantage of the response {signed(advantage)}"
    return f"token advantages {signed(advantage)}"


def lucky(responses: Sequence[Response]) -> list[Entry]:
    """Return right responses with a wrong step: the reward is the highest, but a value on the way was low.

    The rule: the reward is the highest of all rollouts given. Some state behind the first step has a value of at most
    `LOW` of the way from the lowest reward to the highest one, and an earlier state of the response has a value that is
    higher by at least `FALL` of this range. The lowest reward counts as 0 if it is above 0. The state with the lowest
    value comes first; of equal values, the one from more MC rollouts. The entry names the step that ends in this state.

    Raises:
        UserError: if there are responses, and none has values.
    """
    if responses and not has_values(responses):
        raise UserError(
            "no response has values of its states, so a low value on the way cannot be found; the algorithms vineppo, "
            "spo_chain and ppo save such values"
        )
    rewards = [r.reward for r in responses if r.kind == "rollout" and r.reward is not None]
    if not rewards:
        return []
    high, low = max(rewards), min(0.0, *rewards)
    span, found = high - low, []
    for response in responses:
        place = _lowest_value(response)
        if response.reward != high or place is None or span <= 0:
            continue
        value, fall, step, count = place
        if value <= low + LOW * span and fall >= FALL * span:
            found.append(((value, -count, response.iteration, response.number), response, step, fall))
    found.sort(key=lambda entry: entry[0])
    return [
        Entry(response, step, f"right, but the value after this step was {key[0]:.2f} ({signed(-fall)} on the way)")
        for key, response, step, fall in found
    ]


def has_values(responses: Sequence[Response]) -> bool:
    """Return whether the value of any state of the responses is known."""
    return any(step.value is not None for response in responses for step in response.steps)


def _lowest_value(response: Response) -> tuple[float, float, Step, int] | None:
    """Return (lowest value behind the first step, fall from the highest value before it, the step before it, K)."""
    values = [(step.value, step) for step in response.steps if step.value is not None]
    if len(values) < 2:
        return None
    index = min(range(1, len(values)), key=lambda i: (values[i][0], i))
    value, step = values[index]
    highest = max(earlier for earlier, _ in values[:index])
    return value, highest - value, response.steps[step.number - 2], step.num_mc_rollouts or 0


def truncated(responses: Sequence[Response]) -> list[Entry]:
    """Return the responses that were cut off by the length limit, in the order given."""
    return [
        Entry(response, None, f"cut off after {len(response.tokens)} tokens")
        for response in responses
        if response.finish_reason == "length"
    ]


def disagree(responses: Sequence[Response]) -> list[Entry]:
    """Return the steps at which the credit that was trained and the Monte-Carlo values disagree.

    The trained credit of a step is the mean advantage of its tokens. The Monte-Carlo values give the change of the
    value over the step, which counts if it is beyond its noise (`beyond_noise`). The two disagree

    - in sign, if one is above 0 and the other below 0;
    - in rank, if the step has the largest fall of the value in its response, but another step has a lower trained
      credit.

    They can differ if the algorithm trains something else than the step advantages: `vineppo.alternatives`,
    `vineppo.transform`, or `spo_chain`. The largest change of value comes first; of equal changes, signs come first.

    Raises:
        UserError: if no response has both credit and Monte-Carlo values.
    """
    both = [r for r in responses if r.credit != "none" and any(s.num_mc_rollouts is not None for s in r.steps)]
    if not both:
        raise UserError(
            "no response has both credit and Monte-Carlo values of its states, so they cannot disagree; only the "
            "algorithms vineppo and spo_chain save such values"
        )
    found = [entry for response in both for entry in _disagreements(response)]
    found.sort(key=lambda entry: entry[0])
    return [entry for _, entry in found]


def _disagreements(response: Response) -> list[tuple[tuple[float, bool, int, int], Entry]]:
    """Return (sort key, entry) of the steps of a response at which credit and values disagree."""
    changes = {s.number: response.value_change(s) for s in response.steps if beyond_noise(response, s)}
    credits = {step.number: mean_credit(response, step) for step in response.steps}
    if not changes:
        return []
    fallen = min(changes, key=lambda number: (changes[number] or 0.0, number))
    lowest = min(credits, key=lambda number: (credits[number], number))
    entries = []
    for number, change in changes.items():
        assert change is not None
        step, credit = response.steps[number - 1], credits[number]
        by_sign = credit * change < 0
        by_rank = number == fallen and change < 0 and credits[lowest] < credit - 1e-6
        reason = f"value {signed(change)}, but trained with {signed(credit)} per token"
        if not by_sign and by_rank:
            reason += f"; step {lowest} got {signed(credits[lowest])}"
        if by_sign or by_rank:
            key = (-abs(change), not by_sign, response.iteration, response.number)
            entries.append((key, Entry(response, step, reason)))
    return entries


def mean_credit(response: Response, step: Step) -> float:
    """Return the mean advantage of the tokens of a step."""
    return (step.token_sum or 0.0) / max(1, step.end - step.start)


def beyond_noise(response: Response, step: Step) -> bool:
    """Return whether the value changes over a step by more than its noise.

    This is so if the 95% interval of the difference of the two values excludes 0 (Newcombe 1998, method 10, from the
    intervals of both values). If an interval is unknown, every change counts.
    """
    change = response.value_change(step)
    if not change or step.num_mc_rollouts is None:
        return False
    is_last = step.number == len(response.steps)
    first, second = step.interval, None if is_last else response.steps[step.number].interval
    if first is None or (second is None and not is_last):
        return True
    low, high = (first, second) if change > 0 else (second, first)
    margin_low = 0.0 if low is None else low.high - low.mean
    margin_high = 0.0 if high is None else high.mean - high.low
    return abs(change) > math.hypot(margin_low, margin_high)


def most_telling(responses: Sequence[Response]) -> Response:
    """Return the response to show first: the one with the most negative step (`drops`).

    If no step is negative, it is the response with the largest positive step; without any credit, the first response.
    Rollouts come before other training samples.

    Raises:
        ValueError: if there are no responses.
    """
    rollouts = [response for response in responses if response.kind == "rollout"] or list(responses)
    if fallen := drops(rollouts):
        return fallen[0].response
    return max(rollouts, key=lambda r: (max((s.advantage or 0.0 for s in r.steps), default=0.0), -r.number))


def step_to_explain(response: Response) -> Step | None:
    """Return the step to explain: the one with the lowest advantage, or the highest one if none is negative."""
    lowest = lowest_step(response)
    if lowest is None or (lowest.advantage or 0.0) < 0:
        return lowest
    return max(response.steps, key=lambda step: (step.advantage or 0.0, -step.number))


QUEUES = {"drops": drops, "lucky": lucky, "truncated": truncated, "disagree": disagree}
"""Name of each queue -> the function that returns it."""
