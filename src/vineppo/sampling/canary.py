"""A check that an engine with its own copy of the weights really uses the trainer's newest weights.

The engine and the trainer score the same tokens, the *probe*. The scores must agree within the rounding of the dtype.
An update often changes the scores by less than the bound of this comparison. Therefore the engine's scores are also
compared with those of the trainer before the update: they must be nearer to the new ones.

In shapes, N is the number of scored tokens: all tokens of the probe except the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vineppo.model.logits import selected_logits
from vineppo.types import UserError

MAX_GAP, MAX_GAP_16_BIT = 0.02, 0.5
"""Bounds of the root mean square of the differences between the engine's and the trainer's log-probabilities, in nats.
The first is for an engine and a trainer that both compute in float32."""
_CLEAR = 12.0
"""How many times larger than the noise the change by an update must be, both as norms, for a decision. Then 6 standard
deviations lie between the scores of old and of new weights and the middle between them."""
_MAX_TOKENS = 256
"""Maximum number of tokens of the probe."""


class OldWeights(UserError):
    """The engine does not have the weights that it was sent."""


class Canary:
    """Compares the scores of an engine and of the trainer after every update of the weights.

    Args:
        model: the trainer's model.
        max_gap: bound of the root mean square of the differences, in nats; None: the default for `float32`.
        float32: whether the model and the engine compute in float32.
    """

    def __init__(self, model: Any, max_gap: float | None, float32: bool):
        self.model = model
        self.max_gap = max_gap or (MAX_GAP if float32 else MAX_GAP_16_BIT)
        self.probe: tuple[int, ...] = ()
        """Token ids that are scored; empty until `choose` is called."""
        self.gap = 0.0
        """Root mean square of the differences in the last check, in nats."""
        self._last: torch.Tensor | None = None

    def choose(self, token_ids: Sequence[int]) -> None:
        """Use the first tokens of a sequence as the probe, for example of a prompt with its first response."""
        self.probe, self._last = tuple(token_ids[:_MAX_TOKENS]), None

    @torch.no_grad()
    def trainer_scores(self) -> torch.Tensor:
        """Return the trainer's log-probabilities of the probe at temperature 1, shape (N,), float64."""
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([self.probe], device=device)
        select = torch.ones_like(ids, dtype=torch.bool)
        select[0, -1] = False
        logprobs = selected_logits(self.model, ids, select).double().log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None]).squeeze(1).cpu()

    def check(self, engine: Sequence[float], version: int) -> None:
        """Compare the engine's log-probabilities of the probe with the trainer's.

        Args:
            engine: log-probabilities at temperature 1, shape (N,).
            version: number of updates that the engine's weights should include.
        Raises:
            OldWeights: if they differ by more than the bound, or are nearer to those before the update.
        """
        found, new, old = torch.tensor(engine, dtype=torch.float64), self.trainer_scores(), self._last
        self._last = new
        self.gap = float((found - new).square().mean().sqrt())
        if not self.gap <= self.max_gap:
            raise OldWeights(
                f"the sampler does not have the weights of update {version}: its log-probabilities of a fixed text "
                f"differ from the trainer's by {self.gap:.3g} nats (root mean square); allowed: {self.max_gap:g} "
                "(sampler.vllm.max_gap). Either the weights did not arrive, or vLLM computes this model differently"
            )
        if old is None:
            return
        to_new, to_old, change = (float(x.norm()) for x in (found - new, found - old, new - old))
        if to_old < to_new and change > _CLEAR * to_old:
            raise OldWeights(
                f"the sampler still has the weights before update {version}: its log-probabilities of a fixed text "
                f"differ from the trainer's by {to_new:.3g} nats in all after the update and by {to_old:.3g} before "
                "it. The engine ignored the update; set sampler.vllm.transfer to files, or sampler.engine to auto"
            )
