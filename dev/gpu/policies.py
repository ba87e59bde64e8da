"""The policies of the check, with random or trained weights, and their prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from dev.gpu.part import Cells, Part
from transformers import AutoConfig, AutoModelForCausalLM

from vineppo.config.schema import ModelConfig, TaskConfig
from vineppo.model.codec import Codec
from vineppo.model.policy import Policy
from vineppo.model.tiny import build_tokenizer
from vineppo.tasks import build_task
from vineppo.training.rollouts import problem_range

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Dtype = Literal["float32", "bfloat16"]
BOTH: tuple[Dtype, ...] = ("float32", "bfloat16")

QWEN_05B: Cells = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
LLAMA_11B: Cells = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
    "tie_word_embeddings": False,
}
SHARP: Cells = {"num_hidden_layers": 4, "vocab_size": 151_936, "initializer_range": 0.15}
"""Changes for `equal`: few layers, and weights that are large enough for next-token distributions far from uniform."""
TINY: Cells = {
    "hidden_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 700,
}
"""Changes with `--small`."""

EMBEDDED = "embedded:judgement"


def random_policy(part: Part, shape: Mapping[str, Any], dtype: Dtype) -> Policy:
    """Build a policy with random weights that never samples an end-of-sequence token."""
    options = {**shape, **(TINY if part.small else {})}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 2048}
    config = AutoConfig.for_model(**{**options, **ends})
    torch.manual_seed(0)
    with torch.device(part.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return Policy(model, Codec(build_tokenizer(), ()))


def trained_policy(path: str, part: Part, dtype: Dtype) -> Policy:
    """Load a model with trained weights."""
    return Policy.load(ModelConfig(path=path, dtype=dtype, device=part.device))


def chain_prompts(policy: Policy, number: int) -> list[tuple[int, ...]]:
    """Return prompts of the chain task, which the embedded models have learned."""
    task = build_task(TaskConfig())
    return [policy.codec.prompt_ids(problem) for problem in problem_range(task, "train", number)]


def random_prompts(policy: Policy, number: int, length: int) -> list[tuple[int, ...]]:
    """Return prompts of random tokens."""
    vocabulary = policy.model.config.get_text_config().vocab_size
    return [tuple(row) for row in np.random.default_rng(0).integers(3, vocabulary, (number, length)).tolist()]
