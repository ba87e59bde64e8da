"""Define the language model that is trained (the policy), and its frozen copy for the KL penalty (the reference)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vineppo.config.schema import ModelConfig
from vineppo.model.clone import clone_model
from vineppo.model.codec import Codec
from vineppo.model.loading import load_pretrained
from vineppo.model.lora import merged_weights, with_adapters
from vineppo.model.modes import without_dropout


class Policy:
    """A causal language model with its codec. Dropout is only active in a `with policy.dropout(seed)` block.

    If the model has adapters, `adapters` is the peft model, and `model` is the transformers model that the peft model
    contains. Otherwise `adapters` is None.
    """

    def __init__(self, model: Any, codec: Codec, adapters: Any = None):
        self.model = without_dropout(model)
        self.codec = codec
        self.adapters = adapters

    @classmethod
    def load(cls, config: ModelConfig) -> Policy:
        """Load the model at `config.path`, and add new adapters if `config.lora.r` is above 0."""
        model, tokenizer = load_pretrained(config)
        codec = Codec.for_model(model, tokenizer)
        return cls(model, codec, with_adapters(model, config.lora) if config.lora.r else None)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def frozen_copy(self) -> Policy:
        """Return a copy of the policy with frozen weights."""
        model = clone_model(self.model)
        model.requires_grad_(False)
        return Policy(model, self.codec)

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Activate the dropout of the adapters inside the block, with random numbers from `seed`."""
        if self.adapters is None:
            yield
            return
        layers = [module for name, module in self.model.named_modules() if "lora_dropout" in name]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for layer in layers:
                layer.train()
            try:
                yield
            finally:
                for layer in layers:
                    layer.eval()

    def save(self, path: Path | str) -> None:
        """Save weights, configuration and tokenizer in the format of `AutoModelForCausalLM.from_pretrained`.

        With adapters, the merged weights are saved, and the adapters alone are saved in the folder `adapter` for peft.
        """
        if self.adapters is None:
            self.model.save_pretrained(path)
        else:
            self.adapters.save_pretrained(Path(path) / "adapter")
            self.model.save_pretrained(path, state_dict=dict(merged_weights(self.model)))
        self.codec.save(path)


class Reference:
    """The frozen starting policy: a copy of the policy, or the policy with its adapters disabled."""

    def __init__(self, policy: Policy):
        self._policy = policy if policy.adapters is not None else policy.frozen_copy()

    @contextlib.contextmanager
    def active(self) -> Iterator[Policy]:
        """Yield the starting policy. If the policy has adapters, they are disabled inside the block."""
        with self._policy.adapters.disable_adapter() if self._policy.adapters is not None else contextlib.nullcontext():
            yield self._policy
