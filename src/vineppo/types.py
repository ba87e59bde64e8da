"""Data types and protocols that all parts of the package share. This module imports no other module of the package.

Dimension letters used in all modules: P problems, G rollouts per group, S steps, K MC rollouts per state, T tokens of
one sequence, B sequences in a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
Split = Literal["train", "validation", "test"]
Metrics = dict[str, float]


class UserError(ValueError):
    """An error that the user can correct. The message is one line: what is wrong, where, what is allowed, and how to
    correct it.
    """


@dataclass(frozen=True)
class Problem:
    """One item of a task: a prompt and its reference answer."""

    id: str
    """Unique within the task, for example "train/17". Random seeds are derived from it."""
    prompt: str
    """Prompt text, already formatted."""
    answer: str = ""
    """The reference answer as text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Other columns of the data set; reward functions receive them as keyword arguments."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation from which `prompt` was formatted. If it is not empty, reward functions receive conversations
    instead of texts."""
    reference: Any = None
    """The reference answer as stored in the data set, if it is not text. Reward functions receive it as `answer`."""


@dataclass(frozen=True)
class SampleRequest:
    """Request for `num_samples` completions of one token prefix."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    seed: int
    """63-bit seed. The random number for token t of sample j depends only on (seed, j, t)."""
    response_tokens: int = 0
    """Number of ids at the end of `prompt_ids` that belong to the response being continued. A stop string may begin in
    them."""
    excluded_first: tuple[int, ...] = ()
    """Token ids with probability 0 at the first position; the probabilities of the other tokens are renormalized. The
    completion is then a sample from the policy under the condition that its first token is none of these. Needs
    `Capabilities.excluded_first`."""
    first_sample: int = 0
    """Index of the first sample: the completions are the samples first_sample, first_sample + 1, ... of the seed."""
    temperature: float = 1.0
    """Sampling temperature; 0 is greedy decoding, with log-probabilities of 0."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, in addition to the end-of-sequence tokens. The completion includes the string."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prefix."""

    token_ids: tuple[int, ...]
    """Sampled ids; the end-of-sequence id is included if and only if it was sampled."""
    logprobs: tuple[float, ...]
    """Log-probability of each id under the distribution it was sampled from (temperature included), in nats."""
    finish_reason: FinishReason
    version: int = 0
    """`Sampler.version` of the weights that sampled it."""


OnFinished = Callable[[Sequence[tuple[int, Completion]]], None]
"""Callback for samples that have just ended: called with (index of the request, completion) pairs, once per sample."""


Weights = Callable[[], Iterable[tuple[str, Any]]]
"""Function that returns the (name, tensor) pairs of a policy; the tensors may be created one at a time."""


@dataclass(frozen=True)
class Capabilities:
    """Optional features of a sampler."""

    excluded_first: bool
    """Whether the sampler supports `SampleRequest.excluded_first`."""
    reproducible: bool
    """Whether the results are bit-identical for any number of workers."""


class Sampler(Protocol):
    """Samples completions of token prefixes from the current policy; input and output are token ids.

    A completion depends only on its request: prefix, seed, sample index, temperature, stop strings and excluded tokens.
    The other requests, their order and the number of workers can affect it only through rounding of the logits, because
    the rounding of a matrix product depends on the batch size. `capabilities.reproducible` is

    - true (the native engines) if the results are bit-identical for any number of workers. Requests are divided into
      units, each sampled as one batch, and the division does not depend on the number of workers.
    - false if only the random numbers are the same. Log-probabilities may then differ by rounding, and a token may
      differ if the rounding changes which token a random number selects.
    """

    @property
    def version(self) -> int:
        """Number of policy updates that the sampler's weights include; 0 for the initial weights."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """The sampler's optional features."""
        ...

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """One list of `num_samples` completions per request, in the order of the requests.

        Args:
            on_finished: called with completions as soon as they end, if the sampler supports it.
        """
        ...

    def update_weights(self, version: int, weights: Weights) -> None:
        """Use new weights for all later calls of `sample`, and clear everything cached for the old weights.

        Args:
            version: number of policy updates that these weights include.
            weights: returns the policy's tensors by name. A sampler that shares the policy's memory does not call it.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """A prompt, a sampled response and its reward: the data that the policy is trained on."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    """Log-probability of each response token, computed by the sampler, shape (T,)."""
    finish_reason: FinishReason
    text: str
    """The response as text, without special tokens."""
    reward: float


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class StepCredit:
    """Steps, values and advantages of one rollout. They are written to records and tables and not used in training."""

    boundaries: tuple[int, ...]
    """End of each step as a number of response tokens, strictly increasing, the last one is T; shape (S,)."""
    values: tuple[float, ...] = ()
    """V of the state before each step, in reward units, shape (S,); empty if the algorithm has no step values."""
    num_mc_rollouts: tuple[int, ...] = ()
    """Number of MC rollouts used for each value, shape (S,); 0 if the value was known without sampling."""
    step_advantages: tuple[float, ...] = ()
    """Advantage of each step, in reward units, shape (S,); empty if the algorithm has no step advantages."""


@dataclass(frozen=True)
class Alternative:
    """A token that another continuation sampled at a position of a response, and its advantage there."""

    position: int
    """Index of the response token that it replaces, from 0."""
    token_id: int
    advantage: float
    """In reward units, already multiplied by the alternative's share of the credit at this position."""


@dataclass(frozen=True)
class TrainingSample:
    """One token sequence with its credit: the only input of the learner from an algorithm.

    The per-token lists have shape (T,), with T the length of prompt + response. Entries of tokens that are not trained
    are 0.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """1 for tokens that are trained, 0 for the prompt and for tokens that are trained in another sample."""
    sampler_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]
    returns: tuple[float, ...] | None = None
    """Targets of the value network for the *state before* each token; None without a value network."""
    values: tuple[float, ...] | None = None
    """Predictions of the value network at the time the credit was computed, for value clipping; None without one."""
    credit: StepCredit | None = None
    alternatives: tuple[Alternative, ...] = ()
    """Tokens trained in addition to the response's tokens. An alternative is conditioned on the response's tokens
    before its position and has the weight of the token that it replaces. Its position is an index into the trained
    tokens of the sample."""
    weights: tuple[float, ...] | None = None
    """Weight of each token in the loss and in means over tokens, at least 0, aligned with `advantages`: the number of
    tokens that it represents, such as n for a token of a prefix that n rollouts share. None: 1 for every trained
    token."""
    rollout: Rollout | None = None
    """The rollout of the sample, the same object as in its group; used in records. None if the sequence is not a
    rollout, such as a shared prefix or an MC rollout."""

    @property
    def trained_weights(self) -> tuple[float, ...]:
        """Weights of the trained tokens, in the order of the sequence."""
        if self.weights is None:
            return (1.0,) * sum(self.loss_mask)
        return tuple(weight for weight, trained in zip(self.weights, self.loss_mask, strict=True) if trained)


CreditFn = Callable[[list[RolloutGroup], int], tuple[list[TrainingSample], Metrics]]
"""(groups, iteration) -> (training samples, metrics): the interface between an algorithm and the trainer.

The function may return any number of samples in any order: one per rollout, fewer (only the rollouts with a high
reward, or none), or more (prefixes that rollouts share, MC rollouts)."""

RewardFn = Callable[..., Any]
"""fn(prompts, completions, completion_ids, **columns) -> one reward or None per completion, or an awaitable of such a
list. The columns always include `answer`."""


@dataclass(frozen=True)
class Failure:
    """Why a response could not be graded."""

    text: str
    timed_out: bool = False


Verdict = tuple[float | None, ...] | Failure
"""Result of grading a response: one reward per reward function (None: not applicable), or a `Failure`."""


@dataclass
class Tally:
    """Statistics of the responses that a task has graded."""

    graded: int = 0
    """Number of graded responses."""
    errors: int = 0
    """Number of responses that could not be graded, including time-outs."""
    timeouts: int = 0
    """Number of responses whose grading timed out."""
    not_applicable: int = 0
    """Number of responses for which every reward function returned None."""
    first_error: str = ""
    """Message of the first error."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sum of the rewards of each reward function."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of rewards of each reward function."""

    def add(self, names: Sequence[str], verdict: Verdict) -> None:
        """Count one response; `names` are the names of the reward functions."""
        self.graded += 1
        if isinstance(verdict, Failure):
            self.errors += 1
            self.timeouts += verdict.timed_out
            self.first_error = self.first_error or verdict.text
            return
        self.not_applicable += all(reward is None for reward in verdict)
        for name, reward in zip(names, verdict, strict=True):
            if reward is not None:
                self.sums[name] = self.sums.get(name, 0.0) + reward
                self.counts[name] = self.counts.get(name, 0) + 1

    def shares(self) -> Metrics:
        """The metrics `grader/*`; empty if nothing was graded."""
        if not self.graded:
            return {}
        return {
            "grader/graded": float(self.graded),
            "grader/error_share": self.errors / self.graded,
            "grader/timeout_share": self.timeouts / self.graded,
            "grader/not_applicable_share": self.not_applicable / self.graded,
        }

    def means(self) -> Metrics:
        """The metrics `rewards/<function>/mean`: mean over the responses for which the function returned a reward."""
        return {f"rewards/{name}/mean": total / self.counts[name] for name, total in self.sums.items()}


class ProblemSource(Protocol):
    """Problems addressed by split and index."""

    def size(self, split: Split) -> int | None:
        """Number of problems in a split, or None if it is infinite."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` of a split; the same arguments always return the same problem."""
        ...

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, response) pair for supervised fine-tuning.

        Raises:
            UserError: if the task has no demonstrations.
        """
        ...


class Task(ProblemSource, Protocol):
    """A source of problems that also grades responses."""

    @property
    def grades_early(self) -> bool:
        """Whether `expect` has an effect; if not, callers may skip it."""
        ...

    @property
    def grade_truncated(self) -> bool:
        """Whether responses that were truncated by the length limit are graded. If not, their reward is 0."""
        ...

    @property
    def total(self) -> Tally:
        """Statistics of all responses graded since the task was created."""
        ...

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[float]:
        """Reward of each response.

        Args:
            problems: problem of each response.
            texts: response texts.
            completion_ids: token ids of each response; optional.
        Raises:
            UserError: if too many responses cannot be graded, or the grader does not accept the problems.
        """
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> None:
        """Start to grade responses that will soon be passed to `grade`. A task may ignore the call."""
        ...

    def count_anew(self) -> Tally:
        """Create and return a new tally, to which the task adds all graded responses until the next call."""
        ...


class Learner(Protocol):
    """Trains the policy on samples with credit, and the value network if the algorithm has one."""

    updates: int
    """Number of optimizer steps so far."""

    def update(self, samples: Sequence[TrainingSample], iteration: int, num_rollouts: int) -> Metrics:
        """Train on the samples of one iteration, for all its epochs.

        Args:
            num_rollouts: number of rollouts of the iteration. It determines the number of updates, which does not
                depend on the number of samples.
        Returns:
            Metrics: means over the updates of the iteration, and `updates`.
        """
        ...

    def predict_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Predict the value of the state before each response token: one list of shape (T,) per rollout.

        Raises:
            UserError: if there is no value network.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each current weight of the policy, with adapters merged. The names are those of the
        model's `state_dict` without adapters.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the state that is needed to resume training to files in a folder."""
        ...

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote.

        Raises:
            UserError: if a file is missing or cannot be read.
        """
        ...
