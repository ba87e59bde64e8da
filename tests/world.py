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
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vineppo.learning.losses import clipped_policy_loss
from vineppo.model.batch import collate, pad
from vineppo.model.codec import Codec
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.seeds import derive_seed
from vineppo.types import FinishReason, Problem, Rollout, RolloutGroup, Split, Tally, TrainingSample
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

    def grade(self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()) -> list[float]:
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
    def outcomes(self) -> list[Outcome]:
        """All N responses with their rewards and probabilities. The probabilities sum to 1."""
        with torch.no_grad():
            logprobs = self.token_logprobs()
        graded = self.task.grade([self.problem] * len(self.responses), [self._text(r) for r in self.responses])
        outcomes = []
        for response, row, grade in zip(self.responses, logprobs, graded, strict=True):
            finish: FinishReason = "stop" if response[-1] == EOS else "length"
            rollout = Rollout(
                prompt_ids=self.prompt_ids,
                response_ids=response,
                sampler_logprobs=tuple(row[: len(response)].tolist()),
                finish_reason=finish,
                text=self._text(response),
                reward=grade if finish == "stop" else 0.0,
            )
            outcomes.append(Outcome(rollout, row.sum().exp().item()))
        return outcomes

    @cached_property
    def moments(self) -> dict[tuple[int, ...], tuple[float, float]]:
        """State -> (exact mean, exact variance) of the reward of the responses that start with the state."""
        # For each state, the sums of P, P * reward and P * reward^2 over these responses with probability P.
        sums: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for outcome in self.outcomes:
            response, reward = outcome.rollout.response_ids, outcome.rollout.reward
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

    def monte_carlo(self, num_mc_rollouts: int) -> MonteCarlo:
        """Return an estimator that values states with `num_mc_rollouts` continuations by the policy of this world."""
        return MonteCarlo(
            sampler=self.sampler(),
            task=self.task,
            decode=self.policy.codec.decode,
            num_mc_rollouts=num_mc_rollouts,
            max_new_tokens=self.max_new_tokens,
            run_seed=0,
            temperature=self.temperature,
        )

    def sampler(self) -> TorchSampler:
        return TorchSampler(self.policy, max_rows=1 << 14)

    def _text(self, response_ids: Sequence[int]) -> str:
        return self.policy.codec.decode(response_ids)


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
