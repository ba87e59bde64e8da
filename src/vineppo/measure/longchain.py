"""Provide responses of 10 to 500 steps and more, written by a model with random weights, to measure the cost of credit.

The model has a vocabulary of five tokens. Like those of trained models, its continuations stay near the response: all
have the same length, and one token has a probability of about 0.96 in every state, so the entropy is about 0.2 nats per
token. The reward depends only on two steps, at one third and two thirds of the response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vineppo.conformance.world import EOS, LETTERS
from vineppo.credit.vineppo import VinePPOSettings, build_vine_credit
from vineppo.model.codec import Codec
from vineppo.model.location import resolve_model_path
from vineppo.model.policy import Policy
from vineppo.sampling.build import build_sampler
from vineppo.sampling.wrapped import WrappedSampler
from vineppo.tasks.grading.graded import Graded
from vineppo.tasks.grading.judge import InProcess
from vineppo.training.rollouts import sample_groups
from vineppo.types import (
    Completion,
    CreditFn,
    Problem,
    RolloutGroup,
    SampleRequest,
    Split,
    Task,
)
from vineppo.values import MonteCarlo

WIDTH = 288
"""Hidden size of the model outside the sweep over widths."""
USUAL = 1
"""Id of the token that is likely in every state; the letter "a"."""
CANDIDATES = 2
"""Number of responses that are sampled for each response whose cost is measured."""
LIKELY = 0.96
"""Probability of the token USUAL, up to the noise of the random weights."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with five tokens: end of sequence, a, b, c and d."""
    vocabulary = {"</s>": EOS, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


class EndlessCodec(Codec):
    """A codec without end-of-sequence tokens; every token is decoded to one letter."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the tokens, with one letter per token."""
        return "".join(("x" + LETTERS)[token] for token in token_ids)


class FullLengthSampler(WrappedSampler):
    """A sampler that forwards all calls to another sampler and reports all completions as finished ("stop").

    No token ends a sequence here, so every completion has the maximum length. With the finish reason "length", its
    reward would be 0.
    """

    def sample(self, requests: Sequence[SampleRequest], on_finished: Any = None) -> list[list[Completion]]:
        """Return one list of completions per request, as described in `vineppo.types.Sampler.sample`."""
        return [[replace(c, finish_reason="stop") for c in group] for group in self.sampler.sample(requests)]


@dataclass(frozen=True)
class TwoDecisions:
    """Problems whose reward depends on two steps, at one third and two thirds of the response.

    The reward is 1 if both steps consist of the likely token only, else 0. Implements `types.ProblemSource`.
    """

    num_steps: int
    """Number of steps of a response."""
    step_tokens: int
    """Number of tokens of a step."""

    def size(self, split: Split) -> int | None:
        """Return None, because the number of problems is unlimited."""
        return None

    def problem(self, split: Split, index: int) -> Problem:
        """Return the problem with this index in a split. All problems have the same prompt."""
        return Problem(id=f"{split}/{index}", prompt="ab")

    def demonstration(self, split: Split, index: int) -> tuple[str, str]:
        """Raise NotImplementedError, because no demonstrations are needed."""
        raise NotImplementedError

    def reward(self, completions: Sequence[str], **_: Any) -> list[float]:
        """Return 1 for each completion whose two steps consist of the letter of the likely token, else 0."""
        n = self.step_tokens
        starts = [self.num_steps * third // 3 * n for third in (1, 2)]
        right = ("x" + LETTERS)[USUAL] * n
        return [float(all(text[start : start + n] == right for start in starts)) for text in completions]

    def task(self) -> Task:
        """Return a task with these problems, graded by `reward`."""
        return Graded(self, InProcess((self.reward,)), ("reward",), (1.0,))


def build_policy(max_tokens: int, width: int = WIDTH) -> Policy:
    """Build a Llama with random weights, a vocabulary of five tokens, and one likely token.

    With two layers of width 288, intermediate size 1152, and 2 heads and 1 key-value head of size 24, attention over
    11,000 positions takes as many products as the matrices of a layer. In TinyLlama-1.1B, the shape of the smaller
    model of the paper, this number is 10,800, in SmolLM2-135M 3,100. In the embedded models it is 600, so their costs
    grow faster with the length than those of models that are used.

    Args:
        max_tokens: maximum number of tokens of a response.
        width: hidden size, a multiple of 144. The intermediate size and the number of heads are proportional to it.
    """
    config = AutoConfig.from_pretrained(resolve_model_path("embedded:judgement"))
    config.vocab_size, config.max_position_embeddings, config.eos_token_id = 1 + len(LETTERS), max_tokens + 16, None
    config.bos_token_id = config.pad_token_id = None
    config.hidden_size, config.intermediate_size, config.tie_word_embeddings = width, 4 * width, False
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 24, max(1, width // 144), 1
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    prefer_one_token(model)
    return Policy(model, EndlessCodec(build_tokenizer(), eos_ids=(), max_length=max_tokens + 16))


@torch.no_grad()
def prefer_one_token(model: LlamaForCausalLM) -> None:
    """Change a model so that the token USUAL has a probability of about LIKELY in every state.

    The first number of all embeddings becomes large, so the first number of every hidden state is nearly the same. The
    first column of the output matrix multiplies this number, and so acts like a bias of the logits. Its size follows
    from the mean of this number over 256 random tokens. The other columns keep their random weights: the probabilities
    still depend on the whole prefix, a little.
    """
    embeddings, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings[:, 0] = 8 * embeddings.shape[1] ** 0.5 * embeddings[:, 1:].std()
    hidden = model.model(torch.randint(len(output), (1, 256))).last_hidden_state  # (1, 256, hidden)
    output[:, 0] = 0
    output[USUAL, 0] = math.log(LIKELY / (1 - LIKELY) * (len(output) - 1)) / hidden[..., 0].mean()


@dataclass(frozen=True)
class Scene:
    """Responses with one number of steps, and everything that is needed to estimate the values of their states."""

    policy: Policy
    problems: TwoDecisions
    sampler: FullLengthSampler
    groups: list[RolloutGroup]
    """The responses as rollouts, one group per problem."""
    k: int
    """K, the number of continuations per state."""

    @property
    def budget(self) -> int:
        """Number of tokens of a response."""
        return self.problems.num_steps * self.problems.step_tokens

    @property
    def entropy(self) -> float:
        """Estimate of the entropy per token in nats: the negative mean log-probability of the response tokens."""
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        return -float(np.mean([rollout.sampler_logprobs for rollout in rollouts]))

    @property
    def mean_reward(self) -> float:
        """Mean reward of the responses."""
        return float(np.mean([rollout.reward or 0.0 for group in self.groups for rollout in group.rollouts]))

    def credit(self, method: str) -> CreditFn:
        """Return the credit function of `fixed_k`, `reuse` or `bisection`."""
        estimator = MonteCarlo(
            self.sampler, self.problems.task(), self.policy.codec.decode, self.k, self.budget, run_seed=0, temperature=1
        )
        settings = VinePPOSettings(
            num_mc_rollouts=self.k,
            splitter=f"tokens:{self.problems.step_tokens}",
            max_states=0,
            reuse=method in ("reuse", "bisection"),
            bisection=method == "bisection",
        )
        return build_vine_credit(settings, estimator, self.policy.codec)


def fixed_tokens(num_steps: int, step_tokens: int, k: int) -> int:
    """Return the number of tokens in K new continuations of every state of one response."""
    return k * step_tokens * num_steps * (num_steps + 1) // 2


def build_scene(policy: Policy, num_steps: int, shape: tuple[int, int, int], step_tokens: int) -> Scene:
    """Sample responses with this number of steps.

    If there is one response per problem, a quarter of the responses have the reward 0 (see `quarter_wrong`).

    Args:
        policy: the model that writes the responses.
        num_steps: number of steps of each response.
        shape: (number of problems, responses per problem, K).
        step_tokens: number of tokens of a step.
    """
    num_problems, group_size, k = shape
    problems = TwoDecisions(num_steps, step_tokens)
    sampler = FullLengthSampler(build_sampler(policy, "auto"))
    groups = sample_groups(
        [problems.problem("train", index) for index in range(num_problems * (1 if group_size > 1 else CANDIDATES))],
        policy.codec,
        sampler,
        problems.task(),
        group_size=group_size,
        max_new_tokens=num_steps * step_tokens,
        temperature=1.0,
        address=(0, "length"),
    )
    return Scene(policy, problems, sampler, quarter_wrong(groups, num_problems), k)


def quarter_wrong(groups: Sequence[RolloutGroup], count: int) -> list[RolloutGroup]:
    """Return the first `count` groups of which, if possible, a quarter has a first response with the reward 0.

    Bisection evaluates more states of wrong responses than of right ones. With the same share at every length, its cost
    does not depend on how many responses happen to be wrong.
    """
    wrong = [group for group in groups if not group.rollouts[0].reward]
    right = [group for group in groups if group.rollouts[0].reward]
    num_wrong = max(min(count // 4, len(wrong)), count - len(right))
    return wrong[:num_wrong] + right[: count - num_wrong]
