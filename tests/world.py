"""Add a policy to the world of `vineppo.conformance`, whose responses tests can enumerate.

The exact value of every state and the exact gradient of the expected reward follow from the enumeration. Tests compare
them with the values and gradients that the package computes. The policy is a small Llama with a vocabulary of five
tokens, and the table of the world has its probabilities. Sampling, grading, credit and losses are those of the package.
Only the exact values and gradients are computed by enumeration and by autograd through the model.

A state is represented by its response tokens, because all responses have the same prompt. In shapes, N is the number of
possible responses and T the maximum number of tokens of a response.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vineppo.conformance.world import EOS, LETTERS, RandomRewards, TableSampler, text_of
from vineppo.conformance.world import World as TableWorld
from vineppo.learning.losses import clipped_policy_loss
from vineppo.measure.longchain import build_tokenizer
from vineppo.model.batch import collate, pad
from vineppo.model.codec import Codec
from vineppo.model.logits import token_logprobs
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.seeds import derive_seed
from vineppo.types import Problem, Task, TrainingSample
from vineppo.values import MonteCarlo

__all__ = ["EOS", "LETTERS", "RandomRewards", "TableSampler", "World", "build_tokenizer", "build_world", "text_of"]


class PartlyApplicable(RandomRewards):
    """Random rewards that do not apply to about 70% of the texts. Truncated texts are graded, too."""

    grade_truncated = True

    def grade(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Any = ()
    ) -> Sequence[float | None]:
        rewards = super().grade(problems, texts)
        applies = [derive_seed("applies", p.id, text) / 2**63 > 0.7 for p, text in zip(problems, texts, strict=True)]
        return [reward if applicable else None for reward, applicable in zip(rewards, applies, strict=True)]


@dataclass(frozen=True, eq=False)
class World(TableWorld):
    """All responses of at most `max_new_tokens` tokens to one problem, with probabilities at `temperature`.

    The table contains the probabilities of `policy` when the world was built.
    """

    policy: Policy

    def token_logprobs(self) -> torch.Tensor:
        """Return the log-probability of every token of every response, shape (N, T); 0 after the end of a response."""
        rows = pad([self.prompt_ids + response for response in self.responses], torch.int64)
        logits = self.policy.model(input_ids=rows, use_cache=False).logits.double() / self.temperature
        logprobs = logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None]).squeeze(-1)
        mask = pad([[1] * len(response) for response in self.responses], torch.float64)
        return logprobs[:, len(self.prompt_ids) - 1 :] * mask

    def exact_gradient(self) -> torch.Tensor:
        """Return the exact gradient of the expected reward with respect to all weights, shape (parameters,), float64.

        The expected reward is the sum of P(y) R(y) over all responses y with probability P(y) and reward R(y).
        """
        rewards = torch.tensor([outcome.rollout.reward for outcome in self.outcomes], dtype=torch.float64)
        expected = (self.token_logprobs().sum(1).exp() * rewards).sum()
        return flat_gradient(expected, self.policy)

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


def cut_after_a(tokens: Sequence[str]) -> list[int]:
    """Return the ends of steps, as a user-defined splitter: a step ends after every letter a and at the end."""
    return [*(i for i in range(1, len(tokens)) if tokens[i - 1] == "a"), len(tokens)]


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
    return world_of(policy or build_policy(), task, task.problem("train", problem), max_new_tokens)


def world_of(policy: Policy, task: Task, problem: Problem, max_new_tokens: int, temperature: float = 0.7) -> World:
    """Build the world of a policy, a task and one of its problems."""
    prompt_ids = policy.codec.encode_prompt(problem.prompt)
    letters = range(1, 1 + len(LETTERS))
    states = [state for length in range(max_new_tokens) for state in itertools.product(letters, repeat=length)]
    rows = pad([prompt_ids + state for state in states], torch.int64)
    with torch.no_grad():
        logits = policy.model(input_ids=rows, use_cache=False).logits.double() / temperature
    last = [len(prompt_ids) + len(state) - 1 for state in states]
    table = dict(zip(states, logits.softmax(-1)[range(len(last)), last].numpy(), strict=True))
    return World(problem, prompt_ids, max_new_tokens, temperature, task, table, policy)


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
