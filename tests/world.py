"""A world in which everything is known: each response that a policy can give, its probability, its reward, and so the
exact value of every state and the exact gradient of the expected reward.

The policy is a real, tiny Llama over five tokens; sampling, grading, credit and losses are the package's own. Only the
truth they are compared with is computed here, by enumeration and by autograd through the plain model.
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
    """A task (types.Task) whose reward is a fixed pseudo-random number in [0, 1) of the problem and the text.

    A text that was cut off has a reward as well, so code that grades one by mistake is seen.
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
        raise AssertionError("a task that does not grade early was made to")

    def count_anew(self) -> Tally:
        self.tally = Tally()
        return self.tally


@dataclass(frozen=True)
class Outcome:
    """One response that the policy can give to a problem."""

    rollout: Rollout
    probability: float


@dataclass(frozen=True)
class World:
    """Every response of at most `max_new_tokens` tokens to one problem, at the temperature of sampling."""

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
        """All token sequences that sampling can end with: an EOS within the budget, or the whole budget without one."""
        letters = range(1, 1 + len(LETTERS))
        ended = [
            (*body, EOS) for length in range(self.max_new_tokens) for body in itertools.product(letters, repeat=length)
        ]
        return ended + list(itertools.product(letters, repeat=self.max_new_tokens))

    @cached_property
    def states(self) -> list[tuple[int, ...]]:
        """Response prefixes from which the policy goes on."""
        return sorted({response[:end] for response in self.responses for end in range(len(response))})

    def token_logprobs(self) -> torch.Tensor:
        """Of every token of every response, by the model's plain forward pass; 0 behind the end; shape (N, T)."""
        rows = pad([self.prompt_ids + response for response in self.responses], torch.int64)
        logits = self.policy.model(input_ids=rows, use_cache=False).logits.double() / self.temperature
        logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1)
        mask = pad([[1] * len(response) for response in self.responses], torch.float64)
        return logprobs[:, len(self.prompt_ids) - 1 :] * mask

    @cached_property
    def outcomes(self) -> list[Outcome]:
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
        """Exact mean and variance of the reward from each state."""
        sums: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        for outcome in self.outcomes:
            response, reward = outcome.rollout.response_ids, outcome.rollout.reward
            for end in range(len(response)):
                for power in range(3):
                    sums[response[:end]][power] += outcome.probability * reward**power
        return {state: (r / p, rr / p - (r / p) ** 2) for state, (p, r, rr) in sums.items()}

    def value(self, response_ids: tuple[int, ...]) -> float:
        """V of the state behind these response tokens; 0 at the limit, where the response is cut off."""
        return self.moments[response_ids][0] if len(response_ids) < self.max_new_tokens else 0.0

    def exact_gradient(self) -> torch.Tensor:
        """Gradient of the expected reward, sum over y of P(y) R(y), shape (parameters,)."""
        rewards = torch.tensor([outcome.rollout.reward for outcome in self.outcomes], dtype=torch.float64)
        expected = (self.token_logprobs().sum(1).exp() * rewards).sum()
        return flat_gradient(expected, self.policy)

    def group(self) -> RolloutGroup:
        """Every outcome once, as if one group had been so lucky; weigh the samples with `probabilities`."""
        return RolloutGroup(self.problem, tuple(outcome.rollout for outcome in self.outcomes))

    @property
    def probabilities(self) -> list[float]:
        return [outcome.probability for outcome in self.outcomes]

    def monte_carlo(self, num_mc_rollouts: int) -> MonteCarlo:
        """The package's estimator on the package's sampler."""
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


def cut_behind_a(tokens: Sequence[str]) -> list[int]:
    """A splitter of a user's (`tests.world:cut_behind_a`): a step ends behind every letter a."""
    return [*(i for i in range(1, len(tokens)) if tokens[i - 1] == "a"), len(tokens)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Five tokens: the end of sequence and a, b, c, d."""
    vocabulary = {"</s>": EOS, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def build_policy(seed: int = 8) -> Policy:
    """A random one-layer Llama in float64 whose next-token distribution depends visibly on what came before."""
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
    """A world at temperature 0.7, so that a forgotten temperature is seen."""
    task = RandomRewards()
    return World(policy or build_policy(), task.problem("train", problem), max_new_tokens, 0.7, task)


def flat_gradient(scalar: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Gradient with respect to all weights, shape (parameters,), float64."""
    gradients = torch.autograd.grad(scalar, list(policy.model.parameters()))
    return torch.cat([gradient.reshape(-1).double() for gradient in gradients])


def policy_gradient(
    policy: Policy, temperature: float, weighted: Iterable[tuple[float, TrainingSample]]
) -> torch.Tensor:
    """Ascent direction of the package's loss before the first update: sum of weight * A_t * grad log pi(a_t).

    Alternatives have terms of the same form, for their token in the place of the response's.

    Args:
        weighted: (probability, sample) pairs; samples of the same tokens are added up.
    Returns:
        Shape (parameters,).
    """
    samples: dict[tuple[int, ...], TrainingSample] = {}
    credit: dict[tuple[int, ...], torch.Tensor] = {}
    for weight, sample in weighted:
        scaled = tuple(replace(a, advantage=weight * a.advantage) for a in sample.alternatives)
        known = samples[sample.token_ids].alternatives if sample.token_ids in samples else ()
        samples[sample.token_ids] = replace(sample, alternatives=known + scaled)
        term = weight * torch.tensor(sample.advantages, dtype=torch.float64)
        credit[sample.token_ids] = credit.get(sample.token_ids, 0) + term
    batch = collate(list(samples.values()))
    advantages = pad([row.tolist() for row in credit.values()], torch.float32)
    alternatives = (batch.alternative_places, batch.alternative_ids)
    logprobs, _ = token_logprobs(policy.model, batch.token_ids, batch.loss_mask, temperature, False, alternatives)
    every = torch.cat([advantages[batch.loss_mask], batch.alternative_advantages])
    loss, _ = clipped_policy_loss(logprobs, logprobs.detach(), every, 0.2, 0.2)
    return flat_gradient(-loss, policy)
