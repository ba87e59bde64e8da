"""Data types and protocols that all parts of the package share. This module imports no other module of the package.

The modules use these letters for the dimensions of lists and tensors: P is the number of problems, G of rollouts per
group, S of reasoning steps of a response, K of Monte-Carlo (MC) rollouts per state, T of tokens of one sequence, B of
sequences in a batch, and V of tokens in the vocabulary.
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
    """Identifier that is unique within the task, for example "train/17". Random seeds are derived
    from the identifier."""
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
    """The reference answer as stored in the data set, if the stored answer is not text. Reward functions then receive
    this object as `answer`."""


@dataclass(frozen=True)
class SampleRequest:
    """Request for `num_samples` completions of one token prefix."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    seed: int
    """63-bit seed. The random number for token t of sample j depends only on (seed, j, t)."""
    response_tokens: int = 0
    """Number of ids at the end of `prompt_ids` that are already part of the response. A stop string may begin in these
    ids and end in the completion."""
    excluded_first: tuple[int, ...] = ()
    """Token ids that a completion must not start with. At the first position these tokens have probability 0, and the
    probabilities of the other tokens are renormalized. The sampler must have `Capabilities.excluded_first`."""
    first_sample: int = 0
    """Index of the first sample. The completions are the samples first_sample, first_sample + 1, ... that belong to the
    seed."""
    temperature: float = 1.0
    """Sampling temperature. 0 means greedy decoding; all log-probabilities are then 0."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, in addition to the end-of-sequence tokens. The completion includes the stop
    string."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prefix."""

    token_ids: tuple[int, ...]
    """Sampled ids; the end-of-sequence id is included if and only if it was sampled."""
    logprobs: tuple[float, ...]
    """Log-probability of each id in nats, under the distribution that it was sampled from (with the temperature
    applied)."""
    finish_reason: FinishReason
    version: int = 0
    """`Sampler.version` at the time of sampling."""


OnFinished = Callable[[Sequence[tuple[int, Completion]]], None]
"""Callback for samples that have just ended. Its argument is a sequence of pairs (index of the request, completion).
Each sample is passed once."""


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

    - true if the results are bit-identical for any number of workers, as for the samplers of this package. They divide
      the requests into units and sample each unit as one batch. The division does not depend on the number of workers.
    - false if only the random numbers are the same for any number of workers. Log-probabilities may then differ by
      rounding, and a token may differ if the rounding changes which token a random number selects.
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
        """Return one list of `num_samples` completions per request, in the order of the requests.

        Args:
            on_finished: called with completions as soon as they end. A sampler may ignore this argument.
        """
        ...

    def update_weights(self, version: int, weights: Weights) -> None:
        """Use new weights for all later calls of `sample`, and clear all caches that depend on the old weights.

        Args:
            version: number of policy updates that the new weights include.
            weights: function that returns the policy's tensors with their names. A sampler that shares the policy's
                memory does not call this function.
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
    """Steps, values and advantages of one rollout. They are written to records and tables, but
    training does not use them.
    """

    boundaries: tuple[int, ...]
    """End of each step, as the number of response tokens before it. The numbers are strictly increasing, and the last
    one is T; shape (S,)."""
    values: tuple[float, ...] = ()
    """Value of the state before each step, in reward units, shape (S,); empty if the algorithm has no step values."""
    num_mc_rollouts: tuple[int, ...] = ()
    """Number of MC rollouts used for each value, shape (S,); 0 if the value was known without sampling."""
    step_advantages: tuple[float, ...] = ()
    """Advantage of each step, in reward units, shape (S,); empty if the algorithm has no step advantages."""


@dataclass(frozen=True)
class Alternative:
    """A token that a Monte-Carlo continuation sampled in place of a token of the response, and its advantage."""

    position: int
    """Index of the response token in whose place the alternative was sampled, counted from 0."""
    token_id: int
    advantage: float
    """Advantage in reward units, already divided by the number of samples at this position (see `node_advantages`)."""


@dataclass(frozen=True)
class TrainingSample:
    """One token sequence with its credit. Credit functions return training samples, and the learner trains on them.

    The lists with one entry per token have shape (T,), where T is the length of prompt + response. Their entries are 0
    for tokens with `loss_mask` 0.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """1 for tokens that enter the loss (trained tokens); 0 for the prompt, and for tokens that enter the loss in
    another sample."""
    sampler_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]
    returns: tuple[float, ...] | None = None
    """Target of the value network for the state *before* each token; None if there is no value network."""
    values: tuple[float, ...] | None = None
    """Prediction of the value network for the state before each token at the time the credit was computed, used for
    value clipping; None if there is no value network."""
    credit: StepCredit | None = None
    alternatives: tuple[Alternative, ...] = ()
    """Tokens that are trained in addition to the tokens of the sequence. The probability of an alternative is computed
    given the tokens before its position, and its weight is that of the token at its position. The position is an index
    into the trained tokens of the sample."""
    weights: tuple[float, ...] | None = None
    """Weight of each token in the loss and in means over tokens, at least 0, shape (T,). The weight is the number of
    tokens that the token represents: for example, n for a token of a prefix that n rollouts share. None means a weight
    of 1 for every trained token."""
    rollout: Rollout | None = None
    """The rollout from which the sample was built (the same object as in the rollout's group). Records use it. None if
    the sequence is not a rollout, for example if it is a shared prefix or an MC rollout."""

    @property
    def trained_weights(self) -> tuple[float, ...]:
        """Weights of the trained tokens, in the order of the sequence."""
        if self.weights is None:
            return (1.0,) * sum(self.loss_mask)
        return tuple(weight for weight, trained in zip(self.weights, self.loss_mask, strict=True) if trained)


CreditFn = Callable[[list[RolloutGroup], int], tuple[list[TrainingSample], Metrics]]
"""Credit function of an algorithm: (groups, iteration) -> (training samples, metrics).

The function may return any number of samples in any order: one per rollout; fewer, for example only the rollouts with a
high reward; or more, for example also prefixes that rollouts share, or MC rollouts."""

RewardFn = Callable[..., Any]
"""Reward function: fn(prompts, completions, completion_ids, **columns) -> list with one reward or None per completion.
It may also return an awaitable of such a list. The columns always include `answer`."""


@dataclass(frozen=True)
class Failure:
    """Why a response could not be graded."""

    text: str
    timed_out: bool = False


Verdict = tuple[float | None, ...] | Failure
"""Result of grading one response: one reward per reward function, or a `Failure`. A reward of None means that the
function does not apply to the response."""


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
        """Add the verdict on one response.

        Args:
            names: names of the reward functions, in the order of the rewards in `verdict`.
        """
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
        """Return the metrics `grader/*`; empty if no response was graded."""
        if not self.graded:
            return {}
        return {
            "grader/graded": float(self.graded),
            "grader/error_share": self.errors / self.graded,
            "grader/timeout_share": self.timeouts / self.graded,
            "grader/not_applicable_share": self.not_applicable / self.graded,
        }

    def means(self) -> Metrics:
        """Return the metrics `rewards/<function>/mean`: means over the responses that the function rewarded."""
        return {f"rewards/{name}/mean": total / self.counts[name] for name, total in self.sums.items()}


class ProblemSource(Protocol):
    """A source of problems. A split and an index identify a problem."""

    def size(self, split: Split) -> int | None:
        """Return the number of problems in a split, or None if the number is unlimited."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """Return problem number `index` of a split. The same arguments always return the same problem."""
        ...

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Return a pair (prompt, response) for supervised fine-tuning.

        Raises:
            UserError: if the task has no demonstrations.
        """
        ...


class Task(ProblemSource, Protocol):
    """A source of problems that also grades responses."""

    @property
    def grades_early(self) -> bool:
        """Whether `expect` starts grading. If it does not, callers may omit the call of `expect`."""
        ...

    @property
    def grade_truncated(self) -> bool:
        """Whether responses that were truncated by the length limit are graded. Otherwise their reward is 0."""
        ...

    @property
    def total(self) -> Tally:
        """Statistics of all responses graded since the task was created."""
        ...

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[float]:
        """Return the reward of each response.

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
        """Start grading responses that will soon be passed to `grade`. A task may ignore the call."""
        ...

    def count_anew(self) -> Tally:
        """Create and return a new tally. The task adds every response to this tally until the next call."""
        ...


class Learner(Protocol):
    """Trains the policy on samples with credit, and the value network if the algorithm has one."""

    updates: int
    """Number of optimizer steps so far."""

    def update(
        self,
        samples: Sequence[TrainingSample],
        iteration: int,
        num_rollouts: int,
        check: Callable[[Metrics], None] | None = None,
    ) -> Metrics:
        """Train on the samples of one iteration, with all epochs of the iteration.

        Args:
            num_rollouts: number of rollouts of the iteration. The number of updates depends on this number, not on the
                number of samples.
            check: called before the first optimizer step with the metrics of the samples; it may raise an error.
        Returns:
            Metrics, each as the mean over the updates of the iteration, and the number of updates as `updates`.
        """
        ...

    def predict_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Predict the value of the state before each response token: one list of shape (T,) per rollout.

        Raises:
            UserError: if there is no value network.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the names and tensors of the policy's current weights, with adapters merged into the weights. The
        names are those of the model's `state_dict` without adapters.
        """
        ...

    def save(self, folder: Path) -> None:
        """Save to a folder the state that is needed to resume training."""
        ...

    def load(self, folder: Path) -> None:
        """Restore the state that `save` wrote.

        Raises:
            UserError: if a file is missing or cannot be read.
        """
        ...
