"""Define the policy (the language model that is trained) and the reference (its frozen initial state)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vineppo.config.schema import ModelConfig
from vineppo.model.adapters import adapter_dropout, can_be_disabled, check_adapters, has_dropout
from vineppo.model.clone import clone_model
from vineppo.model.codec import Codec
from vineppo.model.loading import load_pretrained
from vineppo.model.lora import merged_weights, with_adapters
from vineppo.model.modes import without_dropout


class Policy:
    """A causal language model with its codec. Dropout is active only in a `with policy.dropout(...)` block.

    Args:
        model: a transformers model. If it has adapters: the transformers model inside the peft model.
        codec: the tokenizer, end-of-sequence tokens and maximum length of the model.
        adapters: the peft model that contains `model`, or None if the model has no adapters.
    Raises:
        UserError: if adapters of this kind are not supported.
    """

    def __init__(self, model: Any, codec: Codec, adapters: Any = None):
        self.model = without_dropout(model)
        self.codec = codec
        self.adapters = adapters
        if adapters is not None:
            check_adapters(adapters)
        self.restorable = adapters is not None and can_be_disabled(model, adapters)
        """Whether the policy with its adapters disabled is the policy as it is now, also after training."""

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

    @property
    def has_dropout(self) -> bool:
        """Whether the adapters have a dropout, which is active in a `with policy.dropout(...)` block."""
        return self.adapters is not None and has_dropout(self.model)

    def frozen_copy(self) -> Policy:
        """Return a copy of the policy with separate weights, which are frozen."""
        model = clone_model(self.model)
        model.requires_grad_(False)
        return Policy(model, self.codec)

    @contextlib.contextmanager
    def dropout(self, seeds: Sequence[int], loss_masks: Sequence[Sequence[int]]) -> Iterator[None]:
        """Context manager in which the dropout of the adapters is active. Without adapters it has no effect.

        The forward and the backward pass of one batch must be in the context. What is dropped in a sequence does not
        depend on the other sequences of the batch.

        Args:
            seeds: one seed of random numbers for each sequence of the batch.
            loss_masks: the loss mask of each sequence of the batch, without padding.
        """
        with contextlib.nullcontext() if self.adapters is None else adapter_dropout(self.model, seeds, loss_masks):
            yield

    def save(self, path: Path | str) -> None:
        """Save the weights, the configuration and the tokenizer in a directory that `from_pretrained` can load.

        If the model has adapters, the saved weights include them. Layers with adapters are then saved in float32, also
        if the model has 16 bits, because 16 bits would lose small adapters. The adapters alone are also saved, in the
        format of peft in the subdirectory `adapter`.
        """
        if self.adapters is None:
            self.model.save_pretrained(path)
        else:
            self.adapters.save_pretrained(Path(path) / "adapter")
            weights = dict(merged_weights(self.model, torch.float32))
            config = self._merged_config(weights)
            # save_pretrained adds the name of the class to the configuration, and empties the dictionary of weights.
            self.model.save_pretrained(path, state_dict=weights)
            config.architectures = self.model.config.architectures
            config.save_pretrained(path)
        self.codec.save(path)

    def _merged_config(self, weights: dict[str, torch.Tensor]) -> Any:
        """Return the configuration of the model with merged adapters.

        Its dtype is float32. An output layer and an embedding that were tied are not tied if their weights differ.

        Args:
            weights: the merged weights of the model.
        """
        config = copy.deepcopy(self.model.config)
        names = {id(module): name for name, module in self.model.named_modules()}
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        embedding, head = (weights.get(f"{names.get(id(module))}.weight") for module in ends)
        differ = embedding is not None and head is not None and not torch.equal(embedding.float(), head.float())
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.dtype = torch.float32
            part.tie_word_embeddings = bool(getattr(part, "tie_word_embeddings", False)) and not differ
        return config


class Reference:
    """The policy before training, from which the KL penalty is measured.

    If the policy has adapters, this is the policy with disabled adapters, which needs no additional memory. Otherwise
    it is a frozen copy of the policy. It is also a copy if the policy with disabled adapters is not the policy before
    training, for example because biases are trained or because the adapters replaced weights.
    """

    def __init__(self, policy: Policy):
        self._policy = policy if policy.restorable else policy.frozen_copy()

    @contextlib.contextmanager
    def active(self) -> Iterator[Policy]:
        """Context manager that yields the policy before training. Adapters are disabled within the context."""
        with self._policy.adapters.disable_adapter() if self._policy.adapters is not None else contextlib.nullcontext():
            yield self._policy
