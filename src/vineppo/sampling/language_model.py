"""What a sampler needs to know about a policy in the same process."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from vineppo.model.codec import Codec


class LanguageModel(Protocol):
    """The parts of a policy that a sampler uses."""

    model: Any
    """A transformers causal language model."""
    codec: Codec
    """Decodes token ids, and knows the end-of-sequence tokens."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...
