"""A response with its credit: its tokens, steps, alternatives and continuations, as everything in `view/` takes it.

Iterations, responses and steps are counted from 1. Letters: T response tokens, S steps, K MC rollouts of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vineppo.statistics import Interval
from vineppo.types import UserError

Credit = Literal["values", "tokens", "response", "none"]
"""What `Step.advantage` is. "values": the step advantage that the algorithm computed from the values of states; with
the value of the prompt, the step advantages add up to the reward (docs/algorithms.md). "tokens": the sum of the
advantages of the step's tokens, because the algorithm computes no credit for steps; it is no change of value.
"response": the advantage of the whole response, which is repeated for every step and says nothing about a single one
(files of other trainers, `foreign.py`). "none": the response has no credit."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a response. In a file without tokens, one line of the response stands for a token."""

    id: int
    """Id in the vocabulary. For a line of a file without tokens, a negative number that follows from the line."""
    text: str | None
    """Text of the token; the texts of all tokens of a response, joined, are the response. "" for a special token. None
    in files of earlier versions."""
    logprob: float | None
    """Log-probability with which the token was sampled, in nats."""
    entropy: float | None
    """Entropy of the policy's distribution for this token at the start of the iteration, in nats; None if unknown."""
    advantage: float | None
    """Credit of the token, before `learner.advantage_scaling`; None for a response without credit."""
    weight: float
    """Weight of the token in the loss; 0 if it was not trained in this row."""
    value: float | None = None
    """Value of the state before the token as predicted by a value network; None without one."""


@dataclass(frozen=True, slots=True)
class Step:
    """One reasoning step of a response, and the state before it."""

    number: int
    text: str
    start: int
    """Number of response tokens before the step."""
    end: int
    """Number of response tokens up to the end of the step."""
    value: float | None
    """Value of the state before the step, in reward units; None if the algorithm estimates no values. It is a mean over
    K MC rollouts, or a prediction of the value network."""
    num_mc_rollouts: int | None
    """K. 0 if the value was known without sampling. None if the value was not estimated from MC rollouts."""
    interval: Interval | None
    """95% interval of the value; None if it is unknown, which is so for predictions and for rewards outside 0 to 1."""
    advantage: float | None
    """Credit of the step; `Response.credit` says what it is. None for a response without credit."""
    token_sum: float | None
    """Sum of the advantages of the step's tokens, which are what was trained. None for a response without credit."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that was trained in place of a token of the response."""

    position: int
    """Index of the response token that it replaces, from 0."""
    id: int
    text: str
    advantage: float


@dataclass(frozen=True, slots=True)
class Continuation:
    """A continuation that was sampled from a state of the response to compute its credit."""

    state: int
    """Number of response tokens before the continuation."""
    shared: int
    """Number of first tokens that the continuation has in common with the response: it leaves the response after
    `state + shared` response tokens."""
    num_tokens: int
    text: str
    """Text of the whole continuation, with the shared tokens."""
    reward: float | None
    finish_reason: str
    accepted: int | None = None
    """Number of tokens behind the first one that were taken from the response as a draft (counterfactual credit); None
    without a draft."""


@dataclass(frozen=True, slots=True)
class Response:
    """One response with its credit: a row of the file of an iteration."""

    iteration: int
    number: int
    """Number of the row in the file."""
    kind: str
    """"rollout", or "sample" for another training sample, such as a prefix that rollouts share."""
    problem_id: str
    prompt: str
    answer: str
    text: str
    reward: float | None
    """None if no reward function applies, and for a sample without a rollout."""
    finish_reason: str | None
    tokens: tuple[Token, ...]
    steps: tuple[Step, ...]
    credit: Credit
    alternatives: tuple[Alternative, ...] = ()
    continuations: tuple[Continuation, ...] = ()

    @property
    def num_tokens(self) -> int | None:
        """T, or None if the response comes from a file without tokens."""
        return None if any(token.id < 0 for token in self.tokens) else len(self.tokens)

    def step(self, number: int) -> Step:
        """Return a step by its number, from 1.

        Raises:
            UserError: if there is no such step.
        """
        if not 1 <= number <= len(self.steps):
            known = f"it has the steps 1 to {len(self.steps)}" if self.steps else "it has no steps"
            raise UserError(f"response {self.number} of iteration {self.iteration} has no step {number}; {known}")
        return self.steps[number - 1]

    def value_after(self, step: Step) -> float | None:
        """Return the value of the state after a step: that before the next step, or the reward after the last step."""
        return self.reward if step.number == len(self.steps) else self.steps[step.number].value

    def value_change(self, step: Step) -> float | None:
        """Return the value after a step minus the value before it, or None if one of the two is unknown."""
        after = self.value_after(step)
        return None if after is None or step.value is None else after - step.value

    def character(self, tokens: int) -> int | None:
        """Return the number of characters of `text` before the end of the first `tokens` tokens; None if unknown."""
        texts = [token.text for token in self.tokens[:tokens]]
        return None if None in texts else sum(len(text) for text in texts if text)
