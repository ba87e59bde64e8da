"""Provide a task and a policy so small that tests can enumerate all responses, with their probabilities and rewards.

The exact value of every state and the exact gradient of the expected reward follow from the enumeration. Tests compare
them with the values and gradients that the package computes. The policy is a small Llama with a vocabulary of five
tokens. Sampling, grading, credit and losses are those of the package. Only the exact values and gradients are computed
here, by enumeration and by autograd through the model.

A state is represented by its response tokens, because all responses have the same prompt. In shapes, N is the number of
possible responses and T the maximum number of tokens of a response.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vineppo.credit.sample import reward_of
from vineppo.learning.losses import clipped_policy_loss
from vineppo.model.batch import collate, pad
from vineppo.model.codec import Codec
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.seeds import derive_seed
from vineppo.types import (
    Capabilities,
    Completion,
    FinishReason,
    Problem,
    Rollout,
    RolloutGroup,
    SampleRequest,
    Split,
    Tally,
    TrainingSample,
    Weights,
)
from vineppo.values import MonteCarlo

EOS = 0
LETTERS = "abcd"


class RandomRewards:
    """A task whose reward is a pseudo-random number in [0, 1) that depends on the problem and the response text.

    Implements `types.Task`. `grade` gives truncated responses a reward too, although the package must give them 0
    without grading them. Therefore tests fail if code grades a truncated response by mistake.
    """

    grades_early = False
    grade_truncated = False

    def __init__(self) -> None:
        self.total, self.tally = Tally(), Tally()

    def size(self, split: Split) -> int | None:
        return None

    def problem(self, split: Split, index: int) -> Problem:
        return Problem(id=f"{split}/{index}", prompt=LETTERS[index % 4] + LETTERS[(index + 1) % 4])

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        raise NotImplementedError

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()
    ) -> Sequence[float | None]:
        rewards = [derive_seed("reward", p.id, text) / 2**63 for p, text in zip(problems, texts, strict=True)]
        for tally in (self.total, self.tally):
            for reward in rewards:
                tally.add(("random",), (reward,))
        return rewards

    def expect(self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()) -> None:
        raise AssertionError("expect was called although grades_early is False")

    def count_anew(self) -> Tally:
        self.tally = Tally()
        return self.tally


class PartlyApplicable(RandomRewards):
    """Random rewards that do not apply to about 70% of the texts. Truncated texts are graded, too."""

    grade_truncated = True

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()
    ) -> Sequence[float | None]:
        rewards = super().grade(problems, texts)
        applies = [derive_seed("applies", p.id, text) / 2**63 > 0.7 for p, text in zip(problems, texts, strict=True)]
        return [reward if applicable else None for reward, applicable in zip(rewards, applies, strict=True)]


@dataclass(frozen=True)
class Outcome:
    """A possible response to a problem, as a rollout, and its probability."""

    rollout: Rollout
    probability: float
    """Probability that the policy samples this response."""


@dataclass(frozen=True)
class World:
    """All responses of at most `max_new_tokens` tokens to one problem, with probabilities at `temperature`."""

    policy: Policy
    problem: Problem
    max_new_tokens: int
    temperature: float
    task: RandomRewards

    @cached_property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.policy.codec.encode_prompt(self.problem.prompt)

    @cached_property
    def responses(self) -> list[tuple[int, ...]]:
        """Token ids of the N possible responses. They end with EOS, or have `max_new_tokens` tokens without EOS."""
        letters = range(1, 1 + len(LETTERS))
        ended = [
            (*body, EOS) for length in range(self.max_new_tokens) for body in itertools.product(letters, repeat=length)
        ]
        return ended + list(itertools.product(letters, repeat=self.max_new_tokens))

    @cached_property
    def states(self) -> list[tuple[int, ...]]:
        """The response tokens of all states: every prefix of a response that is shorter than the response."""
        return sorted({response[:end] for response in self.responses for end in range(len(response))})

    def token_logprobs(self) -> torch.Tensor:
        """Return the log-probability of every token of every response, shape (N, T); 0 after the end of a response."""
        rows = pad([self.prompt_ids + response for response in self.responses], torch.int64)
        logits = self.policy.model(input_ids=rows, use_cache=False).logits.double() / self.temperature
        logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1)
        mask = pad([[1] * len(response) for response in self.responses], torch.float64)
        return logprobs[:, len(self.prompt_ids) - 1 :] * mask

    @cached_property
    def table(self) -> dict[tuple[int, ...], np.ndarray]:
        """The policy as a table: the probability of each next token in each state, shape (5,), float64."""
        rows = pad([self.prompt_ids + state for state in self.states], torch.int64)
        with torch.no_grad():
            logits = self.policy.model(input_ids=rows, use_cache=False).logits.double() / self.temperature
        last = [len(self.prompt_ids) + len(state) - 1 for state in self.states]
        return dict(zip(self.states, logits.softmax(-1)[range(len(last)), last].numpy(), strict=True))

    @cached_property
    def outcomes(self) -> list[Outcome]:
        """All N responses with their rewards and probabilities. The probabilities sum to 1."""
        probabilities = [[self.table[r[:t]][token] for t, token in enumerate(r)] for r in self.responses]
        always = self.task.grade_truncated
        graded = self.task.grade([self.problem] * len(self.responses), [self._text(r) for r in self.responses])
        outcomes = []
        for response, row, grade in zip(self.responses, probabilities, graded, strict=True):
            finish: FinishReason = "stop" if response[-1] == EOS else "length"
            rollout = Rollout(
                prompt_ids=self.prompt_ids,
                response_ids=response,
                sampler_logprobs=tuple(map(math.log, row)),
                finish_reason=finish,
                text=self._text(response),
                reward=grade if finish == "stop" or always else 0.0,
            )
            outcomes.append(Outcome(rollout, math.prod(row)))
        return outcomes

    @cached_property
    def moments(self) -> dict[tuple[int, ...], tuple[float, float]]:
        """State -> (exact mean, exact variance) of the reward of the responses that start with the state."""
        # For each state, the sums of P, P * reward and P * reward^2 over these responses with probability P.
        sums: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for outcome in self.outcomes:
            response, reward = outcome.rollout.response_ids, reward_of(outcome.rollout)
            for end in range(len(response)):
                for power in range(3):
                    sums[response[:end]][power] += outcome.probability * reward**power
        return {state: (r / p, rr / p - (r / p) ** 2) for state, (p, r, rr) in sums.items()}

    def value(self, response_ids: tuple[int, ...]) -> float:
        """Return the exact value of the state with these response tokens.

        The value is 0 at the length limit, where the response is truncated.
        """
        return self.moments[response_ids][0] if len(response_ids) < self.max_new_tokens else 0.0

    def exact_gradient(self) -> torch.Tensor:
        """Return the exact gradient of the expected reward with respect to all weights, shape (parameters,), float64.

        The expected reward is the sum of P(y) R(y) over all responses y with probability P(y) and reward R(y).
        """
        rewards = torch.tensor([outcome.rollout.reward for outcome in self.outcomes], dtype=torch.float64)
        expected = (self.token_logprobs().sum(1).exp() * rewards).sum()
        return flat_gradient(expected, self.policy)

    @cached_property
    def table_gradient(self) -> np.ndarray:
        """Gradient of the expected reward with respect to the logits of each state, P(s) p(a|s) (Q(s, a) - V(s)).

        Shape (states, 5), float64. The model is not part of it, so it has no rounding errors of float32.
        """
        rewards = {outcome.rollout.response_ids: outcome.rollout.reward for outcome in self.outcomes}
        rows = []
        for state in self.states:
            reached = math.prod(self.table[state[:t]][token] for t, token in enumerate(state))
            nexts = [(*state, token) for token in range(1 + len(LETTERS))]
            action_values = np.array([rewards[s] if s in rewards else self.value(s) for s in nexts])
            rows.append(reached * self.table[state] * (action_values - self.value(state)))
        return np.array(rows)

    def table_gradient_of(self, weighted: Iterable[tuple[float, TrainingSample]]) -> np.ndarray:
        """The same gradient from credit: sum of weight * A_t * (one-hot(a_t) - p(.|s_t)), shape (states, 5).

        Alternatives contribute terms of the same form for their tokens.
        """
        credit = np.zeros((len(self.states), 1 + len(LETTERS)))  # summed by state and token
        prompt = len(self.prompt_ids)
        for weight, sample in weighted:
            response = sample.token_ids[prompt:]
            rows = [self._row_of_state[response[:t]] for t in range(len(response))]
            for row, token, advantage in zip(rows, response, sample.advantages[prompt:], strict=True):
                credit[row, token] += weight * advantage
            for alternative in sample.alternatives:
                credit[rows[alternative.position], alternative.token_id] += weight * alternative.advantage
        return credit - credit.sum(1, keepdims=True) * np.array([self.table[state] for state in self.states])

    @cached_property
    def _limits(self) -> np.ndarray:
        return np.cumsum(self.probabilities)[:-1]

    @cached_property
    def _row_of_state(self) -> dict[tuple[int, ...], int]:
        return {state: row for row, state in enumerate(self.states)}

    def sampled_group(self, group_size: int, iteration: int) -> RolloutGroup:
        """A group of responses that are drawn from the table."""
        uniforms = np.random.default_rng([iteration, 7]).random(group_size)
        drawn = np.searchsorted(self._limits, uniforms, side="right")
        return RolloutGroup(self.problem, tuple(self.outcomes[i].rollout for i in drawn.tolist()))

    def group(self) -> RolloutGroup:
        """Return a group that contains every response once.

        Responses sampled by the policy would occur in proportion to their probabilities. Tests must therefore weight
        the training samples of this group with `probabilities`.
        """
        return RolloutGroup(self.problem, tuple(outcome.rollout for outcome in self.outcomes))

    @property
    def probabilities(self) -> list[float]:
        """The probability of each response, in the order of `responses`."""
        return [outcome.probability for outcome in self.outcomes]

    def monte_carlo(self, num_mc_rollouts: int, *, by_table: bool = False) -> MonteCarlo:
        """Return an estimator that values states with `num_mc_rollouts` continuations by the policy of this world.

        Args:
            by_table: sample from the table instead of the model.
        """
        return MonteCarlo(
            sampler=TableSampler(self) if by_table else self.sampler(),
            task=self.task,
            decode=text_of if by_table else self.policy.codec.decode,
            num_mc_rollouts=num_mc_rollouts,
            max_new_tokens=self.max_new_tokens,
            run_seed=0,
            temperature=self.temperature,
        )

    def sampler(self) -> TorchSampler:
        return TorchSampler(self.policy, max_rows=1 << 14)

    def _text(self, response_ids: Sequence[int]) -> str:
        return self.policy.codec.decode(response_ids)


@dataclass
class TableSampler:
    """A sampler (types.Sampler) that draws responses from the table of a world, without the model.

    It is about 20 times faster than the model, so that tests of estimators can have a standard error of 2%.
    """

    world: World
    version: int = 0
    capabilities: ClassVar[Capabilities] = Capabilities(excluded_first=True, reproducible=True)
    _known: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[list[Completion], np.ndarray]] = field(
        default_factory=dict
    )

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        return [self._draw(request) for request in requests]

    def update_weights(self, version: int, weights: Weights) -> None:
        self.version = version

    def _draw(self, request: SampleRequest) -> list[Completion]:
        state = request.prompt_ids[len(self.world.prompt_ids) :]
        assert request.prompt_ids[: len(self.world.prompt_ids)] == self.world.prompt_ids
        assert request.max_new_tokens == self.world.max_new_tokens - len(state)
        assert request.temperature == self.world.temperature and not request.first_sample and not request.stop
        key = (state, request.excluded_first)
        if key not in self._known:
            self._known[key] = self._completions(*key)
        completions, limits = self._known[key]
        uniforms = np.random.default_rng(request.seed).random(request.num_samples)
        return [completions[i] for i in np.searchsorted(limits, uniforms, side="right").tolist()]

    def _completions(self, state: tuple[int, ...], excluded: tuple[int, ...]) -> tuple[list[Completion], np.ndarray]:
        """All completions of a state, and the upper limits of their parts of [0, 1) except the last one."""
        start, table = len(state), self.world.table
        allowed = 1 - sum(table[state][token] for token in excluded)
        completions, probabilities = [], []
        for rollout in (outcome.rollout for outcome in self.world.outcomes):
            response = rollout.response_ids
            if len(response) > start and response[:start] == state and response[start] not in excluded:
                logprobs = list(rollout.sampler_logprobs[start:])
                logprobs[0] -= math.log(allowed)
                completions.append(Completion(response[start:], tuple(logprobs), rollout.finish_reason))
                probabilities.append(math.exp(math.fsum(logprobs)))
        assert abs(math.fsum(probabilities) - 1) < 1e-12
        return completions, np.cumsum(probabilities)[:-1]


def text_of(token_ids: Sequence[int]) -> str:
    """The text of token ids, as the codec decodes it."""
    return "".join(LETTERS[token - 1] for token in token_ids if token != EOS)


def cut_after_a(tokens: Sequence[str]) -> list[int]:
    """Return the ends of steps, as a user-defined splitter: a step ends after every letter a and at the end."""
    return [*(i for i in range(1, len(tokens)) if tokens[i - 1] == "a"), len(tokens)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with five tokens: end of sequence, a, b, c and d."""
    vocabulary = {"</s>": EOS, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def build_policy(seed: int = 8) -> Policy:
    """Build a policy: a Llama with one layer, float64 and random weights.

    The weights are large enough that the next-token distribution depends strongly on the previous tokens.
    """
    config = LlamaConfig(
        vocab_size=1 + len(LETTERS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.25,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double()
    return Policy(model, Codec.for_model(model, build_tokenizer()))


def build_world(max_new_tokens: int, *, problem: int = 0, policy: Policy | None = None) -> World:
    """Build a world with temperature 0.7, so that tests fail if code ignores the temperature.

    Args:
        problem: index of the problem.
        policy: the policy; None builds a new one.
    """
    task = RandomRewards()
    return World(policy or build_policy(), task.problem("train", problem), max_new_tokens, 0.7, task)


def flat_gradient(scalar: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Return the gradient of a scalar with respect to all weights of the policy, shape (parameters,), float64."""
    gradients = torch.autograd.grad(scalar, list(policy.model.parameters()))
    return torch.cat([gradient.reshape(-1).double() for gradient in gradients])


def policy_gradient(
    policy: Policy, temperature: float, weighted: Iterable[tuple[float, TrainingSample]]
) -> torch.Tensor:
    """Return the policy gradient that a credit function estimates with its training samples.

    It is the negative gradient of the policy loss before the first update, that is, the sum of
    weight * A_t * grad log pi(a_t) over all tokens a_t with advantage A_t. Alternatives (`TrainingSample.alternatives`)
    contribute terms of the same form.

    Args:
        temperature: sampling temperature.
        weighted: pairs (weight, training sample). Samples with equal tokens are combined into one sample.
    Returns:
        The gradient with respect to all weights of the policy, shape (parameters,), float64.
    """
    samples: dict[tuple[int, ...], TrainingSample] = {}
    credit: dict[tuple[int, ...], torch.Tensor] = {}
    for weight, sample in weighted:
        scaled = tuple(replace(a, advantage=weight * a.advantage) for a in sample.alternatives)
        previous = samples[sample.token_ids].alternatives if sample.token_ids in samples else ()
        samples[sample.token_ids] = replace(sample, alternatives=previous + scaled)
        term = weight * torch.tensor(sample.advantages, dtype=torch.float64)
        credit[sample.token_ids] = credit.get(sample.token_ids, 0) + term
    batch = collate(list(samples.values()))
    advantages = pad([row.tolist() for row in credit.values()], torch.float32)
    alternatives = (batch.alternative_places, batch.alternative_ids)
    logprobs, _ = token_logprobs(policy.model, batch.token_ids, batch.loss_mask, temperature, False, alternatives)
    all_advantages = torch.cat([advantages[batch.loss_mask], batch.alternative_advantages])
    loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), all_advantages, 0.2, 0.2)
    return flat_gradient(-loss, policy)
