"""Explain the credit of a response: the subtraction behind a step, and the sum that leads to the reward."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vineppo.statistics import Interval
from vineppo.types import printable
from vineppo.view.response import Response, Step

TOLERANCE = 1e-6
"""Largest difference, in reward units, that passes as a rounding error of the saved numbers."""
_LISTED = 6
"""Largest number of tokens or steps that one line lists."""


@dataclass(frozen=True)
class Estimate:
    """The value of a state, and what is known about its error."""

    value: float
    num_mc_rollouts: int | None = None
    """K; None for a prediction, and for the reward of the response."""
    interval: Interval | None = None
    """95% interval of the value; None if it is unknown."""
    is_reward: bool = False
    """Whether the state is the whole response, so that its value is the reward."""

    @property
    def text(self) -> str:
        """The estimate as text, such as `0.56 (K = 9, 95% interval 0.27 to 0.81)`."""
        if self.is_reward:
            return f"{self.value:.2f} (the reward)"
        known = [] if self.num_mc_rollouts is None else [f"K = {self.num_mc_rollouts}"]
        if self.num_mc_rollouts == 0:
            known = ["known without sampling"]
        elif self.interval is not None:
            known.append(f"95% interval {self.interval.low:.2f} to {self.interval.high:.2f}")
        return f"{self.value:.2f}" + (f" ({', '.join(known)})" if known else "")


@dataclass(frozen=True)
class Subtraction:
    """The subtraction behind the advantage of a step: the value after the step minus the value before it."""

    step: Step
    before: Estimate
    after: Estimate

    @property
    def difference(self) -> float:
        """Value after the step minus value before it."""
        return self.after.value - self.before.value

    @property
    def is_advantage(self) -> bool:
        """Whether the difference is the recorded advantage of the step, except for rounding."""
        return self.step.advantage is not None and abs(self.difference - self.step.advantage) <= TOLERANCE

    @property
    def text(self) -> str:
        """The subtraction as text."""
        return (
            f"step {self.step.number}: V after - V before = {self.after.text} - {self.before.text} "
            f"= {signed(self.difference)}"
        )


@dataclass(frozen=True)
class Telescoping:
    """The sum of the value of the prompt and all step advantages, which is the reward."""

    start: float
    """Value of the state before the first step."""
    advantages: tuple[float, ...]
    """Advantage of each step, shape (S,)."""
    reward: float

    @property
    def total(self) -> float:
        """Value of the prompt plus the sum of the step advantages."""
        return math.fsum((self.start, *self.advantages))

    @property
    def holds(self) -> bool:
        """Whether the sum is the reward, except for rounding."""
        return abs(self.total - self.reward) <= TOLERANCE

    @property
    def text(self) -> str:
        """The sum as text. Of many steps, only the first and the last are listed."""
        terms = [f"{signed(advantage, ' ')}" for advantage in self.advantages]
        if len(terms) > 2 * _LISTED:
            terms = [*terms[:_LISTED], f"... ({len(terms) - 2 * _LISTED} more steps)", *terms[-_LISTED:]]
        end = f"= {self.total:.2f}" + (", the reward" if self.holds else f", but the reward is {self.reward:.2f}")
        return " ".join([f"V(prompt) {self.start:.2f}", *terms, end])


def subtraction(response: Response, step: Step) -> Subtraction | None:
    """Return the subtraction behind a step, or None if one of the two values is unknown."""
    after, is_last = response.value_after(step), step.number == len(response.steps)
    if step.value is None or after is None:
        return None
    before = Estimate(step.value, step.num_mc_rollouts, step.interval)
    if is_last:
        return Subtraction(step, before, Estimate(after, is_reward=True))
    following = response.steps[step.number]
    return Subtraction(step, before, Estimate(after, following.num_mc_rollouts, following.interval))


def telescoping(response: Response) -> Telescoping | None:
    """Return the sum that leads to the reward; None if the algorithm computes no step advantages from values."""
    advantages = [step.advantage for step in response.steps if step.advantage is not None]
    start = response.steps[0].value if response.steps else None
    if response.credit != "values" or start is None or response.reward is None:
        return None
    return Telescoping(start, tuple(advantages), response.reward)


def why(response: Response, step: Step) -> list[str]:
    """Return lines that explain the advantage of a step, and where the step advantages of the response lead."""
    if response.credit == "none":
        return ["this response has no credit, because it was not trained on or has no reward"]
    found, total = subtraction(response, step), telescoping(response)
    lines = [] if found is None else [found.text]
    if response.credit == "response":
        lines.append(
            f"{signed(step.advantage or 0.0)} is the advantage of the whole response, repeated for every step; it does "
            "not say which step earned it"
        )
    elif response.credit == "tokens":
        lines += [_token_line(response, step), *_alternative_lines(response, step)]
    elif found is not None and not found.is_advantage:
        lines.append(f"the recorded advantage is {signed(step.advantage or 0.0)}, which is not this difference")
    return lines + ([] if total is None else [total.text])


def _token_line(response: Response, step: Step) -> str:
    """Return a line about a step whose advantage is the sum of the advantages of its tokens."""
    tokens = [token for token in response.tokens[step.start : step.end] if token.advantage]
    total = signed(step.advantage or 0.0)
    line = f"step {step.number}: {total} is the sum of the advantages of its tokens, not a change of value"
    if not tokens:
        return f"{line}; all are 0"
    if len({round(token.advantage or 0.0, 6) for token in tokens}) == 1 and len(tokens) > 1:
        return f"{line}; {len(tokens)} tokens have {signed(tokens[0].advantage or 0.0)} each"
    largest = sorted(tokens, key=lambda token: -abs(token.advantage or 0.0))[:_LISTED]
    parts = [f"{quoted(token.text, token.id)} {signed(token.advantage or 0.0)}" for token in largest]
    return f"{line}: {', '.join(parts)}" + (" and others" if len(tokens) > _LISTED else "")


def _alternative_lines(response: Response, step: Step) -> list[str]:
    """Return a line about the tokens that were trained in place of tokens of a step; none if there are no such tokens.

    If the continuation with the token is saved (counterfactual credit), the line has its reward.
    """
    rewards = {c.state: c.reward for c in response.continuations if c.accepted is not None}
    found = [a for a in response.alternatives if step.start <= a.position < step.end]
    parts = []
    for other in sorted(found, key=lambda a: -abs(a.advantage))[:_LISTED]:
        token, reward = response.tokens[other.position], rewards.get(other.position)
        result = "" if reward is None else f" (reward {reward:g})"
        text = f"{quoted(other.text, other.id)} instead of {quoted(token.text, token.id)}"
        parts.append(f"{text} {signed(other.advantage)}{result}")
    return [f"trained, too: {', '.join(parts)}" + (" and others" if len(found) > _LISTED else "")] if found else []


def quoted(text: str | None, token_id: int) -> str:
    """Return the text of a token in quotation marks without control characters, or its id if the text is unknown."""
    return f"token {token_id}" if text is None else f"'{one_line(text)}'"


def one_line(text: str) -> str:
    r"""Return a text without control characters. Line breaks and tabs are escaped too, as `\n` and `\t`."""
    return printable(text).replace("\n", r"\n").replace("\t", r"\t")


def signed(number: float, space: str = "") -> str:
    """Return a number with two digits and its sign; 0 has the sign +. `space` stands between the sign and the number.

    A number that rounds to 0 but is not 0 is written with one significant digit.
    """
    text = f"{abs(number):.2f}" if abs(number) >= 0.005 or number == 0 else f"{abs(number):.0e}"
    return f"{'-' if number < 0 else '+'}{space}{text}"
