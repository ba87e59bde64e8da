"""Define the data types and protocols that all parts of the package share.

This module imports no other module of the package. It uses these terms:

- rollout: a prompt, a response that was sampled for it, and the reward of the response. The rollouts of one problem
  form a group.
- step: a reasoning step, that is, a range of tokens of a response. It is never a step of the optimizer.
- state: a prompt, followed by the first tokens of a response. The value of a state is the expected reward of responses
  that start with these tokens.
- MC rollout (Monte-Carlo rollout): a continuation that is sampled from a state to estimate the value of the state.
- credit: the advantages of the response tokens, which an algorithm computes from the rollouts.

These letters stand for the dimensions of lists and tensors in the whole package:

- P: number of problems
- G: number of rollouts in a group
- S: number of steps in a response
- K: number of MC rollouts per state
- T: number of tokens in one sequence, such as a response
- B: number of sequences in a batch
- V: number of tokens in the vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]
"""Why a completion ended. "stop": an end-of-sequence token or a stop string was sampled. "length": the completion was
truncated at the maximum number of tokens."""
Split = Literal["train", "validation", "test"]
Metrics = dict[str, float]
"""Dictionary from the name of each metric to its value."""


def printable(text: str) -> str:
    r"""Return a text in which characters that can control a terminal are escaped, for example ESC as `\x1b`.

    Newlines and tabs are kept. All other characters for which `str.isprintable` is false are escaped, such as control
    characters, marks that change the direction of the text, spaces other than U+0020, and unpaired surrogates, which
    many streams cannot encode.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """An error that the user can correct.

    The message is one line. It says what is wrong and where, and what is allowed or how to correct the error.

    `str` of the error is printable, because the message may contain what a model wrote.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class TrainingWarning(UserWarning):
    """A sign in the metrics of a run that training does not work."""


@dataclass(frozen=True)
class Chat:
    """A conversation that the tokenizer's chat template formats as the prompt of a problem."""

    messages: tuple[Mapping[str, Any], ...]
    """The messages, at least one. If the last message is the assistant's, the response continues it. Otherwise the
    response is a new message of the assistant."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the tools that the template describes in the prompt."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template and their values, such as `{"enable_thinking": False}`."""

    @classmethod
    def of_user(cls, text: str, template_kwargs: Mapping[str, Any] | None = None) -> Chat:
        """Return the conversation that consists of one message of the user."""
        return cls(({"role": "user", "content": text},), template_kwargs=template_kwargs or {})


@dataclass(frozen=True)
class Problem:
    """One item of a task: a prompt and its reference answer."""

    id: str
    """Identifier that is unique within the task, for example "train/17". Random seeds are derived from it."""
    prompt: str
    """Text of the prompt. The prompt template and the chat template, if any, have been applied."""
    answer: str = ""
    """The reference answer as text."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Dictionary from the names of the other columns of the data set to their values for this problem. Reward functions
    receive them as keyword arguments."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The conversation in the data set from which `prompt` was formatted; empty if the data set has a text. With a
    conversation, reward functions receive prompts and completions as lists of messages instead of texts."""
    reference: Any = None
    """The reference answer as stored in the data set; None if the stored answer is text. If it is not None, reward
    functions receive this object as `answer`."""
    chat: Chat | None = None
    """The conversation that the chat template formatted as `prompt`; None if `prompt` was written without a chat
    template. `Codec.prompt_ids` needs it, because the ids of a prompt cannot always be computed from its text."""


_LOGPROB_ROUNDING = 1e-4
"""Largest positive log-probability of a draft's token that passes as a rounding error, in nats."""


@dataclass(frozen=True)
class Draft:
    """Tokens that were sampled in another context, from which a completion takes as many as possible.

    The n tokens were sampled with the same weights and temperature, without excluded tokens, and with the random
    numbers of another request. A completion takes the next token d of the draft with probability min(1, p(d) / q(d)): p
    is the probability of d in the completion, q in the draft's own context. The first token that it does not take is
    replaced by one that is drawn from max(p - q, 0), divided by its sum. The tokens after it are drawn without the
    draft. (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318)

    Over the randomness of the draft and of the completion, the completion has exactly the distribution of the policy,
    and each token equals that of the draft with the largest possible probability. This holds only if the draft was not
    selected by its tokens. Given the draft, the distribution is another one: completions with the same draft depend on
    each other and on the draft.

    Raises:
        ValueError: if the fields do not fit together.
    """

    context: tuple[int, ...]
    """Token ids before the draft in its own context, at least one."""
    token_ids: tuple[int, ...]
    """Ids of the n tokens. The last one may be an end-of-sequence token."""
    logprobs: tuple[float, ...]
    """Log-probability of each token in the draft's own context in nats, with the temperature applied, shape (n,). They
    are not used at temperature 0."""
    start: int = 0
    """Index of the draft's first token in the completion. The tokens before it are drawn without the draft."""

    def __post_init__(self) -> None:
        if not self.context:
            raise ValueError("Draft.context is empty; it must have the token ids before the draft, at least one")
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"Draft.token_ids has {len(self.token_ids)} tokens and Draft.logprobs has {len(self.logprobs)} "
                "numbers; every token needs its log-probability"
            )
        if self.start < 0:
            raise ValueError(f"Draft.start is {self.start}; it must be 0 or more")
        for i, logprob in enumerate(self.logprobs):
            if not -math.inf < logprob <= _LOGPROB_ROUNDING:
                raise ValueError(f"Draft.logprobs[{i}] is {logprob}; a log-probability must be finite and at most 0")


@dataclass(frozen=True)
class SampleRequest:
    """Request to sample `num_samples` completions of one token prefix."""

    prompt_ids: tuple[int, ...]
    """Token ids of the prefix: a prompt, which may be followed by the first tokens of a response."""
    num_samples: int
    max_new_tokens: int
    """Maximum number of tokens of a completion."""
    seed: int
    """63-bit seed. Every token is selected by a random number, which depends only on the seed, the index of the sample
    and the position of the token."""
    response_tokens: int = 0
    """Number of ids at the end of `prompt_ids` that are already part of the response. A stop string may begin in these
    ids and end in the completion."""
    excluded_first: tuple[int, ...] = ()
    """Token ids that a completion must not start with. At the first position these tokens have probability 0, and the
    probabilities of the other tokens are renormalized. The sampler must have `Capabilities.excluded_first`."""
    first_sample: int = 0
    """Index of the first sample. The samples of the request have the indices first_sample, first_sample + 1, ...,
    first_sample + num_samples - 1."""
    temperature: float = 1.0
    """Sampling temperature. 0 means greedy decoding; all log-probabilities of the completions are then 0."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion, in addition to the end-of-sequence tokens. The completion includes the stop
    string."""
    draft: Draft | None = None
    """Tokens that were sampled in another context, from which each completion takes as many as possible. Tokens beyond
    `max_new_tokens` are ignored. The sampler must have `Capabilities.drafts`."""


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prefix."""

    token_ids: tuple[int, ...]
    """Ids of the sampled tokens. The end-of-sequence id is included if and only if it was sampled."""
    logprobs: tuple[float, ...]
    """Log-probability of each token in nats, under the distribution from which the token was sampled (with the
    temperature applied)."""
    finish_reason: FinishReason
    version: int = 0
    """`Sampler.version` when the completion was sampled."""
    accepted: int = 0
    """Number of tokens that were taken from the request's draft. They are the tokens from index `Draft.start` on."""


OnFinished = Callable[[Sequence[tuple[int, Completion]]], None]
"""Function that a sampler calls with completions that have just ended. The argument is a sequence of pairs
(index of the request, completion). Each completion is passed once."""


Weights = Callable[[], Iterable[tuple[str, Any]]]
"""Function that returns the weights of a policy as (name, tensor) pairs. It may create the tensors one at a time while
the caller iterates over the pairs."""


@dataclass(frozen=True)
class Capabilities:
    """Optional features of a sampler."""

    excluded_first: bool
    """Whether the sampler supports `SampleRequest.excluded_first`."""
    reproducible: bool
    """Whether the completions are bit-identical for any number of worker processes (details under `Sampler`)."""
    drafts: bool = False
    """Whether the sampler supports `SampleRequest.draft`."""


class Sampler(Protocol):
    """Samples completions of token prefixes from the current policy. The input and the output are token ids.

    A completion depends only on its request and on the index of the sample, with one exception. The rounding of a
    matrix product depends on the batch size. Therefore the other requests, their order and the number of worker
    processes can change the logits by rounding errors. `capabilities.reproducible` says whether the number of workers
    can change completions in this way:

    - True: it cannot. The completions are bit-identical for any number of workers. This is the case for the compiled
      engine and the PyTorch sampler, also in a Ray pool. They divide the requests into units, independently of the
      number of workers, and sample each unit as one batch.
    - False: it can, as with vLLM. Only the random numbers are the same for any number of workers. Log-probabilities can
      differ by rounding. A token can differ if the rounding changes which token a random number selects.
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

        A request with `max_new_tokens` 0 gets empty completions with finish reason "length", which are not passed to
        `on_finished`.

        Args:
            on_finished: function to call with completions as soon as they end; each completion is passed once. A
                sampler may ignore this argument.
        """
        ...

    def update_weights(self, version: int, weights: Weights) -> None:
        """Use new weights for all later calls of `sample`, and clear all caches that depend on the old weights.

        Args:
            version: number of policy updates that the new weights include.
            weights: function that returns the new weights. A sampler that uses the same tensors as the policy does not
                call this function.
        """
        ...


@dataclass(frozen=True)
class Rollout:
    """A prompt, a sampled response and its reward: the data that the policy is trained on."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampler_logprobs: tuple[float, ...]
    """Log-probability of each of the T response tokens in nats, computed by the sampler, shape (T,)."""
    finish_reason: FinishReason
    text: str
    """The response as text, without special tokens."""
    reward: float | None
    """Reward of the whole response. None means that no reward function applies to the response (each returned None).
    Such a rollout has advantages of 0, and its reward is left out of all mean rewards and baselines."""


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one problem."""

    problem: Problem
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class StepCredit:
    """The steps of one response with their values and advantages.

    They are written to the records and tables of the run. Training does not use them.
    """

    boundaries: tuple[int, ...]
    """End of each of the S steps, as the number of response tokens up to the end, shape (S,). The numbers are strictly
    increasing, and the last one is the length of the response."""
    values: tuple[float, ...] = ()
    """Value of the state before each step, in reward units, shape (S,); empty if the algorithm has no step values."""
    num_mc_rollouts: tuple[int, ...] = ()
    """Number of MC rollouts from which each value was estimated, shape (S,). MC rollouts without a reward do not count.
    The number is 0 for a value that was known without sampling."""
    step_advantages: tuple[float, ...] = ()
    """Advantage of each step, in reward units, shape (S,); empty if the algorithm has no step advantages."""


@dataclass(frozen=True)
class Alternative:
    """A token that an MC rollout has in place of a token of the response, and the advantage of this token."""

    position: int
    """Index of the response token that the alternative replaces, counted from 0."""
    token_id: int
    advantage: float
    """Advantage in reward units, as computed by `node_advantages` in `vineppo.credit.advantages`. It is already divided
    by the number of tokens that were sampled at this position."""


@dataclass(frozen=True)
class MCRollout:
    """A continuation that was sampled from a state of a response to compute credit, for the records of the run."""

    state: int
    """Number of response tokens before the continuation."""
    token_ids: tuple[int, ...]
    """Ids of all tokens of the continuation. The first ones may be those of the response."""
    reward: float | None
    """Reward of the response that ends with the continuation; None if no reward function applies to it."""
    finish_reason: FinishReason
    accepted: int | None = None
    """Number of tokens that were taken from a draft, which is the rest of the response; None without a draft."""


@dataclass(frozen=True)
class TrainingSample:
    """One token sequence with an advantage for each token. Credit functions return samples; the learner trains on them.

    The sequence consists of a prompt and a response, T tokens in total. The lists with one entry per token have shape
    (T,). Their entries are 0 for tokens with `loss_mask` 0.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    """1 for tokens that enter the loss (trained tokens). 0 for the prompt, and for tokens that are trained in another
    sample."""
    sampler_logprobs: tuple[float, ...]
    """Log-probability of each token in nats, computed by the sampler."""
    advantages: tuple[float, ...]
    returns: tuple[float, ...] | None = None
    """Target of the value network for the state *before* each token. None if there is no value network, or if the
    rollout has no reward; the value network is not trained on such a sample."""
    values: tuple[float, ...] | None = None
    """Prediction of the value network for the state before each token, made when the credit was computed. The clipped
    loss of the value network uses it. None if `returns` is None."""
    credit: StepCredit | None = None
    """Steps, values and step advantages for the records of the run; None if the algorithm computes none."""
    alternatives: tuple[Alternative, ...] = ()
    """Other tokens that are trained in addition to the tokens of the sequence. `Alternative.position` is an index into
    the trained tokens of the sample. The probability of an alternative is computed given the tokens before this
    position. Its weight is the weight of the trained token at this position."""
    weights: tuple[float, ...] | None = None
    """Weight of each token in the loss and in means over tokens, at least 0, shape (T,). The weight is the number of
    tokens that the token represents: for example, n for a token of a prefix that n rollouts share. None means a weight
    of 1 for every trained token."""
    rollout: Rollout | None = None
    """The rollout from which the sample was built (the same object as in the rollout's group). It is written to the
    records of the run. None if the sequence is not a rollout but, for example, a shared prefix or an MC rollout."""

    mc_rollouts: tuple[MCRollout, ...] = ()
    """Continuations from which the credit was computed, for the records of the run. Algorithms return them only for the
    first rollouts of an iteration (`run.save_continuations`)."""

    @property
    def without_reward(self) -> bool:
        """Whether the sample was built from a rollout that has no reward, because no reward function applies to it."""
        return self.rollout is not None and self.rollout.reward is None

    @property
    def trained_weights(self) -> tuple[float, ...]:
        """Weights of the tokens with `loss_mask` 1, in the order of the sequence."""
        if self.weights is None:
            return (1.0,) * sum(self.loss_mask)
        return tuple(weight for weight, trained in zip(self.weights, self.loss_mask, strict=True) if trained)


CreditFn = Callable[[list[RolloutGroup], int], tuple[list[TrainingSample], Metrics]]
"""Credit function of an algorithm: (groups of rollouts, number of the iteration) -> (training samples, metrics).

Iterations are counted from 1. The function may return any number of samples in any order: one per rollout; fewer, for
example only the rollouts with a high reward; or more, for example also prefixes that rollouts share, or MC rollouts."""

RewardFn = Callable[..., Any]
"""Reward function: fn(prompts, completions, completion_ids, **columns) -> list of rewards. All arguments and the result
are lists with one entry per completion. A reward is a number, or None if the function does not apply to the completion.
If all functions return None for a completion, the completion has no reward (`Rollout.reward` is None). The function may
also return an awaitable of the list. The columns are those of the data set; they always include `answer`."""


@dataclass(frozen=True)
class Failure:
    """Why a response could not be graded."""

    text: str
    """Error message."""
    timed_out: bool = False
    """Whether grading the response exceeded the time limit."""


Verdict = tuple[float | None, ...] | Failure
"""Result of grading one response: one reward per reward function, or a `Failure`. A reward of None means that the
reward function does not apply to the response."""


@dataclass
class Tally:
    """Statistics of the responses that a task has graded."""

    graded: int = 0
    """Number of all responses, including those that could not be graded."""
    errors: int = 0
    """Number of responses that could not be graded, including those whose grading timed out."""
    timeouts: int = 0
    """Number of responses whose grading timed out."""
    not_applicable: int = 0
    """Number of responses for which every reward function returned None."""
    first_error: str = ""
    """Message of the first error; empty if there was none."""
    sums: dict[str, float] = field(default_factory=dict)
    """Dictionary from the name of each reward function to the sum of its rewards."""
    counts: dict[str, int] = field(default_factory=dict)
    """Dictionary from the name of each reward function to the number of its rewards that are not None."""

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
        """Return the metrics `grader/*`, a dictionary that is empty if there are no responses.

        They are the number of responses, and the shares of responses that could not be graded, whose grading timed out,
        and to which no reward function applies.
        """
        if not self.graded:
            return {}
        return {
            "grader/graded": float(self.graded),
            "grader/error_share": self.errors / self.graded,
            "grader/timeout_share": self.timeouts / self.graded,
            "grader/not_applicable_share": self.not_applicable / self.graded,
        }

    def means(self) -> Metrics:
        """Return the metrics `rewards/<function>/mean`: the mean of the rewards of each function that are not None."""
        return {f"rewards/{name}/mean": total / self.counts[name] for name, total in self.sums.items()}


class ProblemSource(Protocol):
    """A source of problems. Each problem is identified by a split and an index."""

    def size(self, split: Split) -> int | None:
        """Return the number of problems in a split, or None if the number is unlimited."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with an index in a split. The same arguments always give the same problem."""
        ...

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Return (prompt, response): the texts of a problem and of a response to imitate in supervised fine-tuning.

        Raises:
            UserError: if the task has no demonstrations.
        """
        ...


class Task(ProblemSource, Protocol):
    """A source of problems that also grades responses."""

    @property
    def grades_early(self) -> bool:
        """Whether the method `expect` starts grading. If it does not, callers need not call it."""
        ...

    @property
    def grade_truncated(self) -> bool:
        """Whether responses that were truncated by the length limit are graded. If false, their reward is 0."""
        ...

    @property
    def total(self) -> Tally:
        """Statistics of all responses that were graded since the task was created."""
        ...

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> Sequence[float | None]:
        """Return the reward of each response, or None if no reward function applies to the response.

        Args:
            problems: problem of each response.
            texts: text of each response.
            completion_ids: token ids of each response; empty if they are unknown.
        Raises:
            UserError: if too many responses cannot be graded, or a reward function does not accept the problems.
        """
        ...

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]] = ()
    ) -> None:
        """Start grading responses that will soon be passed to `grade`. A task may ignore this call.

        The arguments are those of `grade`.
        """
        ...

    def count_anew(self) -> Tally:
        """Create and return an empty tally. Until the next call, the task adds every graded response to this tally."""
        ...


class Learner(Protocol):
    """Trains the policy on training samples, and the value network if the algorithm has one."""

    updates: int
    """Number of optimizer steps so far."""

    def update(
        self,
        samples: Sequence[TrainingSample],
        iteration: int,
        num_rollouts: int,
        check: Callable[[Metrics], None] | None = None,
    ) -> Metrics:
        """Train on the samples of one iteration for one or more epochs.

        Args:
            iteration: number of the iteration, counted from 1.
            num_rollouts: number of rollouts of the iteration. It determines the number of updates, which does not
                depend on the number of samples.
            check: called before the first optimizer step with the metrics of the samples; it may raise an error.
        Returns:
            The metric `updates`, which is the number of updates since the start of the run, and other metrics.
        """
        ...

    def predict_values(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Predict the value of the state before each response token, in reward units.

        Returns:
            One list per rollout with one value for each of its T response tokens, shape (T,).
        Raises:
            UserError: if there is no value network.
        """
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the policy's current weights as (name, tensor) pairs.

        LoRA adapters are merged into the weights. The names are those of the model's `state_dict` without adapters.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write files to a folder from which `load` can resume training."""
        ...

    def load(self, folder: Path) -> None:
        """Resume training from the files that `save` wrote to a folder.

        Raises:
            UserError: if a file is missing or cannot be read.
        """
        ...
