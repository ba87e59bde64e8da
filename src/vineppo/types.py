"""The vocabulary: frozen facts that pass between the floors, and the protocols they meet at. Imports nothing of ours.

Dimension letters used everywhere: P problems, G rollouts per group, S steps, K MC rollouts per state, T tokens of one
sequence, B sequences in a batch, V vocabulary.
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
    """A mistake of the user's. The message is one line: what was wrong, where, what is allowed, how to mend it."""


@dataclass(frozen=True)
class Problem:
    """One task item: what the policy is asked and what the grader compares with."""

    id: str
    """Unique within the task, for example "train/17"; randomness is addressed by it."""
    prompt: str
    """The text the policy is given, already formatted."""
    answer: str = ""
    """The reference answer, as text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data set, handed to reward functions by keyword."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The conversation that `prompt` was written from; reward functions then get conversations."""
    reference: Any = None
    """The answer as the table has it, where that is no text; handed to reward functions in its place."""


@dataclass(frozen=True)
class SampleRequest:
    """Ask a sampler for `num_samples` completions of one token prefix."""

    prompt_ids: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    seed: int
    """63-bit address of the randomness: sample j of a seed draws its t-th token with (seed, j, t) and nothing else."""
    response_tokens: int = 0
    """How many ids at the end of `prompt_ids` are the start of the response that is continued: a stop string may begin
    in them."""
    excluded_first: tuple[int, ...] = ()
    """Ids that the first sampled token must not be; the other tokens keep their proportions. What is sampled is then
    the policy's continuation on condition that it leaves a known one here. Needs `Capabilities.excluded_first`."""
    first_sample: int = 0
    """Number of the first sample: the request asks for samples first_sample, first_sample + 1, ... of its seed."""
    temperature: float = 1.0
    """Of sampling; 0 is greedy, with log-probabilities of 0."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, beside the end-of-sequence tokens; the string stays in the completion."""


@dataclass(frozen=True)
class Completion:
    """What a sampler returns for one prefix."""

    token_ids: tuple[int, ...]
    """Sampled ids; the end-of-sequence id is included if and only if it was sampled."""
    logprobs: tuple[float, ...]
    """Log-probability of each id under the distribution that was really sampled (temperature included), in nats."""
    finish_reason: FinishReason
    version: int = 0
    """Of the weights that it was sampled with (`Sampler.version`)."""


OnFinished = Callable[[Sequence[tuple[int, Completion]]], None]
"""Takes (index of the request, completion) of some samples that have just ended, each once."""


Weights = Callable[[], Iterable[tuple[str, Any]]]
"""Named tensors of a policy, made one after another when they are asked for."""


@dataclass(frozen=True)
class Capabilities:
    """What a sampler can do beyond the minimum."""

    excluded_first: bool
    """It supports `SampleRequest.excluded_first`."""
    reproducible: bool
    """It returns the same bits for any number of workers."""


class Sampler(Protocol):
    """Token ids in, token ids out.

    Every sampler draws a sample from the request alone: its prefix, seed, sample number, temperature, stop strings and
    excluded tokens. Other requests, their order and the number of workers can change it only through the rounding of
    the logits, because the rounding of a matrix product depends on the size of its batch. `capabilities.reproducible`
    says which of two promises a sampler makes:

    - true (the native engines): the same bits for any number of workers. Requests are cut into units, each sampled as
      one batch, by rules that do not depend on the number of workers.
    - false: the same seeds, not the same bits. Log-probabilities may differ by rounding, and a token may differ where
      rounding decides between two.
    """

    @property
    def version(self) -> int:
        """Number of weight updates behind the sampler's weights; 0 for those that it started with."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond the minimum."""
        ...

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """One list of `num_samples` completions per request, in the order of the requests.

        Args:
            on_finished: told of completions as they end, if the sampler can; what it returns does not matter.
        """
        ...

    def update_weights(self, version: int, weights: Weights) -> None:
        """Sample with other weights from now on, and drop whatever was cached for the old ones.

        Args:
            version: number of updates that made them.
            weights: the policy's tensors by name. A sampler that shares the policy's memory does not call it.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """Prompt, response and reward: what we train on."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    """Of each response token, shape (T,)."""
    finish_reason: FinishReason
    text: str
    """The response as text, special tokens removed."""
    reward: float


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class StepCredit:
    """What a credit function found out about one rollout, for the record (Parquet, tables); not used in training."""

    boundaries: tuple[int, ...]
    """End of each step in response tokens, strictly increasing, the last one is T; shape (S,)."""
    values: tuple[float, ...] = ()
    """V of the state before each step, in reward units, shape (S,); empty where the algorithm has no step values."""
    num_mc_rollouts: tuple[int, ...] = ()
    """MC rollouts behind each value, shape (S,); 0 where the value was known without sampling."""
    step_advantages: tuple[float, ...] = ()
    """Shape (S,); empty where the algorithm has no step advantages."""


@dataclass(frozen=True)
class Alternative:
    """A token that the policy chose elsewhere in the place of one of a response's tokens, with the credit it earned."""

    position: int
    """Of the response's token whose place it takes, counted from 0 over the response."""
    token_id: int
    advantage: float
    """In reward units, its share of the place's credit included."""


@dataclass(frozen=True)
class TrainingSample:
    """One sequence with its credit, as equal-length per-token lists of shape (T,) over prompt + response.

    The learner gets nothing else from an algorithm. Entries of tokens that are not trained are 0.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """1 for tokens that are trained, 0 for the prompt and for tokens that another sample trains."""
    sampler_logprobs: tuple[float, ...]
    advantages: tuple[float, ...]
    returns: tuple[float, ...] | None = None
    """Targets of the value network, aligned with the *state before* each token; None without one."""
    values: tuple[float, ...] | None = None
    """The value network's predictions when the credit was made (for value clipping); None without one."""
    credit: StepCredit | None = None
    alternatives: tuple[Alternative, ...] = ()
    """Tokens that are trained beside the response's own, each behind the response's tokens before its position. Their
    positions count the trained tokens of the sample, and they have the weight of the token whose place they take."""
    weights: tuple[float, ...] | None = None
    """Weight of each token in the loss and in means over tokens, at least 0, aligned like `advantages`: how many tokens
    it stands for, such as n for a token of a prefix that n rollouts share. None: 1 for every trained token."""
    rollout: Rollout | None = None
    """The rollout that the sample was made from, the same object as in its group, for the record. None for a sequence
    that is no rollout, such as a shared prefix or an MC rollout."""

    @property
    def trained_weights(self) -> tuple[float, ...]:
        """Weight of each trained token, in the order of the sequence."""
        if self.weights is None:
            return (1.0,) * sum(self.loss_mask)
        return tuple(weight for weight, trained in zip(self.weights, self.loss_mask, strict=True) if trained)


CreditFn = Callable[[list[RolloutGroup], int], tuple[list[TrainingSample], Metrics]]
"""(groups, iteration) -> (training samples, metrics): the one seam between algorithms and trainer.

It may return any number of samples in any order, none included: one per rollout, fewer (only the good ones), or more
(prefixes that rollouts share, MC rollouts). What a token counts is its weight."""

RewardFn = Callable[..., Any]
"""fn(prompts, completions, completion_ids, **columns) -> one reward or None per completion, or an awaitable of that;
`answer` is always among the columns."""


@dataclass(frozen=True)
class Failure:
    """Why a response could not be graded."""

    text: str
    timed_out: bool = False


Verdict = tuple[float | None, ...] | Failure
"""What grading says about a response: a reward, or None for "not applicable", from every reward function; or why there
is none."""


@dataclass
class Tally:
    """Counts of the responses that a task graded; the task adds to it."""

    graded: int = 0
    errors: int = 0
    """Time-outs included."""
    timeouts: int = 0
    not_applicable: int = 0
    """Responses on which no function gave a reward."""
    first_error: str = ""
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Sum and number of the rewards of each function."""

    def add(self, names: Sequence[str], verdict: Verdict) -> None:
        """Count one response; `names` are those of the reward functions."""
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
        """`grader/*`; empty where nothing was graded."""
        if not self.graded:
            return {}
        return {
            "grader/graded": float(self.graded),
            "grader/error_share": self.errors / self.graded,
            "grader/timeout_share": self.timeouts / self.graded,
            "grader/not_applicable_share": self.not_applicable / self.graded,
        }

    def means(self) -> Metrics:
        """`rewards/<function>/mean`, over the responses that it applied to."""
        return {f"rewards/{name}/mean": total / self.counts[name] for name, total in self.sums.items()}


class ProblemSource(Protocol):
    """Problems by address."""

    def size(self, split: Split) -> int | None:
        """Number of problems in a split; None when endless."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """The problem at an address; the same address gives the same problem for ever."""
        ...

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """(prompt, response) for supervised fine-tuning. Raises UserError where the task has none."""
        ...


class Task(ProblemSource, Protocol):
    """Problems and the grading of responses to them."""

    @property
    def grades_early(self) -> bool:
        """Whether `expect` does anything; where it does not, it need not be called."""
        ...

    @property
    def grade_truncated(self) -> bool:
        """Whether responses that were cut off by the length limit are graded like others; their reward is 0 if not."""
        ...

    @property
    def total(self) -> Tally:
        """Counts of everything that was graded since the task was made."""
        ...

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> list[float]:
        """Reward of each response text to the problem beside it; the responses' token ids may be left out.

        Raises:
            UserError: where too many responses cannot be graded, or the grader refuses the problems.
        """
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> None:
        """Begin to grade what `grade` will be asked for soon; a task may do nothing here."""
        ...

    def count_anew(self) -> Tally:
        """A new tally, to which the task adds from here on until the next call."""
        ...


class Learner(Protocol):
    """From credit to weights: owns the policy's optimizer and, where an algorithm has one, the value network."""

    updates: int
    """Optimizer steps so far."""

    def update(self, samples: Sequence[TrainingSample], iteration: int, num_rollouts: int) -> Metrics:
        """Train on the samples of an iteration, all epochs of it.

        Args:
            num_rollouts: rollouts of the iteration, which decide the number of updates whatever the number of samples.
        Returns:
            Means over the iteration's updates, and `updates`.
        """
        ...

    def predict_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """The value network's value of the state before each response token: one list of shape (T,) per rollout.

        Raises:
            UserError: where there is no value network.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of each of the policy's current weights, adapters merged; the names are those of
        the model's `state_dict` without adapters.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write all that an interrupted training needs into files of this folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote.

        Raises:
            UserError: where the files are missing or cannot be read.
        """
        ...
