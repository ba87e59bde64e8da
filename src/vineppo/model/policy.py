"""Define the policy (the language model that is trained) and the reference (its frozen initial state)."""

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
    """A causal language model with its codec. Dropout is active only in a `with policy.dropout(seed)` block.

    Args:
        model: a transformers model. If it has adapters: the transformers model inside the peft model.
        codec: the tokenizer, end-of-sequence tokens and maximum length of the model.
        adapters: the peft model that contains `model`, or None if the model has no adapters.
    """

    def __init__(self, model: Any, codec: Codec, adapters: Any = None):
        self.model = without_dropout(model)
        self.codec = codec
        self.adapters = adapters

    @classmethod
    def load(cls, config: ModelConfig) -> Policy:
        """Load the model at `config.path`, and add new adapters if their rank `config.lora.r` is above 0."""
        model, tokenizer = load_pretrained(config)
        codec = Codec.for_model(model, tokenizer)
        return cls(model, codec, with_adapters(model, config.lora) if config.lora.r else None)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    def frozen_copy(self) -> Policy:
        """Return a copy of the policy with separate weights, which are frozen."""
        model = clone_model(self.model)
        model.requires_grad_(False)
        return Policy(model, self.codec)

    @contextlib.contextmanager
    def dropout(self, seed: int) -> Iterator[None]:
        """Context manager in which the dropout of the adapters is active. Without adapters it has no effect.

        Args:
            seed: seed of the random numbers of dropout.
        """
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
        """Save the weights, the configuration and the tokenizer in a directory that `from_pretrained` can load.

        If the model has adapters, the saved weights include them. The adapters alone are also saved, in the format of
        peft in the subdirectory `adapter`.
        """
        if self.adapters is None:
            self.model.save_pretrained(path)
        else:
            self.adapters.save_pretrained(Path(path) / "adapter")
            self.model.save_pretrained(path, state_dict=dict(merged_weights(self.model)))
        self.codec.save(path)


class Reference:
    """The policy before training, from which the KL penalty is measured.

    If the policy has adapters, this is the policy with disabled adapters, which needs no additional memory. Otherwise
    it is a frozen copy of the policy.
    """

    def __init__(self, policy: Policy):
        self._policy = policy if policy.adapters is not None else policy.frozen_copy()

    @contextlib.contextmanager
    def active(self) -> Iterator[Policy]:
        """Context manager that yields the policy before training. Adapters are disabled within the context."""
        with self._policy.adapters.disable_adapter() if self._policy.adapters is not None else contextlib.nullcontext():
            yield self._policy
