"""Whether the sampler agrees with the trainer, with itself, and with the sampler on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from dev.gpu.part import Cells, Part
from dev.gpu.policies import (
    BOTH,
    EMBEDDED,
    LLAMA_11B,
    QWEN_05B,
    SHARP,
    Dtype,
    chain_prompts,
    random_policy,
    random_prompts,
    trained_policy,
)

from vineppo.config.schema import LearnerConfig
from vineppo.credit.sample import training_sample
from vineppo.learning.learner import TorchLearner
from vineppo.model.policy import Policy
from vineppo.sampling.torch.sampler import TorchSampler
from vineppo.types import Completion, Rollout, SampleRequest


def check_equal(part: Part) -> None:
    """Compare the sampler with the trainer, with itself, and with the sampler on the CPU."""
    models: dict[str, Callable[[Dtype], Policy]] = {
        EMBEDDED: lambda dtype: trained_policy(EMBEDDED, part, dtype),
        "random Qwen2, 4 layers": lambda dtype: random_policy(part, {**QWEN_05B, **SHARP}, dtype),
        "random Llama, 4 layers": lambda dtype: random_policy(part, {**LLAMA_11B, **SHARP, "hidden_size": 1024}, dtype),
    }
    if part.model:
        models[Path(part.model).name] = lambda dtype: trained_policy(part.model, part, dtype)
    for dtype in reversed(BOTH):
        for name, build in models.items():
            part.check(3)
            policy = build(dtype)
            prompts = chain_prompts(policy, 8) if name == EMBEDDED else random_prompts(policy, 2, 20)
            _compare_samples(part, {"model": name, "dtype": dtype}, policy, prompts)
            del policy
            part.clear()


def _compare_samples(part: Part, head: Cells, policy: Policy, prompts: Sequence[tuple[int, ...]]) -> None:
    """Sample the prompts' responses and continuations of their states twice; add a row for each temperature.

    The CPU samples the same in float32 after all measurements of the GPU, because the model moves to it.
    """
    found = {}
    for temperature in (1.0, 0.6):
        sampler = TorchSampler(policy)
        requests = _vines(part, sampler, prompts, temperature)
        first, second = sampler.sample(requests), sampler.sample(requests)
        gaps = _gaps(policy, requests, first, temperature)
        found[temperature] = requests, first
        cells = {
            **head,
            "temperature": temperature,
            "completions": sum(map(len, first)),
            "tokens": len(gaps),
            "largest difference": float(gaps.max()),
            "mean difference": float(gaps.mean()),
            "mean log-probability": float(np.mean([x for group in first for c in group for x in c.logprobs])),
            "twice the same": first == second,
            "tree attention": sampler.tree_attention,
        }
        part.row("sampler and trainer, log-probabilities in nats", cells)
    if head["dtype"] == "float32":
        policy.model.to("cpu")
        for temperature, (requests, completions) in found.items():
            part.check(2)
            row = {**head, "temperature": temperature, **agreement(completions, TorchSampler(policy).sample(requests))}
            part.row("the same seeds on the GPU and on the CPU", row)


def _vines(
    part: Part, sampler: TorchSampler, prompts: Sequence[tuple[int, ...]], temperature: float
) -> list[SampleRequest]:
    """Return requests for two responses to each prompt, and for three continuations of each of their states."""
    length, every = (12, 4) if part.small else (24, 8)
    first = [SampleRequest(ids, 2, length, seed=i, temperature=temperature) for i, ids in enumerate(prompts)]
    requests = list(first)
    for request, completions in zip(first, sampler.sample(first), strict=True):
        for completion in completions:
            for start in range(every, len(completion.token_ids), every):
                prefix = request.prompt_ids + completion.token_ids[:start]
                seed = 1000 + len(requests)
                requests.append(SampleRequest(prefix, 3, length - start, seed, start, temperature=temperature))
    return requests


def _gaps(
    policy: Policy, requests: Sequence[SampleRequest], results: list[list[Completion]], temperature: float
) -> np.ndarray:
    """Return the differences between the log-probabilities of the sampler and of the trainer, one per token."""
    learner = TorchLearner(policy, None, None, LearnerConfig(), None, temperature=temperature, total_updates=1, seed=0)
    pairs = [(r, c) for r, completions in zip(requests, results, strict=True) for c in completions]
    samples = [
        training_sample(
            Rollout(r.prompt_ids, c.token_ids, c.logprobs, c.finish_reason, "", 0.0), [1.0] * len(c.token_ids)
        )
        for r, c in pairs
    ]
    rows = learner.logprobs(policy, samples).logprobs
    return np.abs(np.concatenate([np.subtract(row, c.logprobs) for row, (_, c) in zip(rows, pairs, strict=True)]))


def agreement(one: list[list[Completion]], other: list[list[Completion]]) -> Cells:
    """Return the share of equal completions, and the largest difference of the log-probabilities of these."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    equal = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
    gaps = [float(np.abs(np.subtract(a.logprobs, b.logprobs)).max()) for a, b in equal]
    return {
        "completions": len(pairs),
        "share equal": len(equal) / len(pairs),
        "largest difference if equal": max(gaps, default=0.0),
    }
