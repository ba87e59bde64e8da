"""Draw tokens for the rows of a tree on the device, several per row without waiting for it.

Letters in shapes: B rows in the tree, n tokens per row, V tokens in the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vineppo.sampling.torch.draw import draw
from vineppo.sampling.torch.graph import Steps
from vineppo.sampling.torch.tree import KVTree


class TreeDecoder:
    """The state of the rows of a tree that are being decoded. All of it is on the device.

    A step feeds the last token of each row to the model and draws the next one. It reads and writes only tensors whose
    addresses do not change until rows are removed, so that it can be captured (`Steps`). The state does not contain
    which rows are finished; the caller drops the tokens that a row draws after its end.

    Args:
        model: the model, a transformers causal language model in `tree_mode`.
        tree: the keys and values of the prefixes of the rows, which are computed already.
        budgets: number of tokens that each row may draw, shape (B,).
        temperature: sampling temperature.
        width: maximum number of tokens of one call of `tokens`.
        steps: runs the steps.
    """

    def __init__(self, model: Any, tree: KVTree, budgets: torch.Tensor, temperature: float, width: int, steps: Steps):
        self.model, self.tree, self.temperature, self.width, self.steps = model, tree, temperature, width, steps
        # The last position of each row. A row that goes on after its budget stays there, because the next position may
        # exceed the maximum length of the model.
        self.limits = tree.prefix_lengths + budgets - 1  # (B,)
        self.positions = tree.prefix_lengths - 1  # (B,): position of the last token
        self.last = torch.zeros_like(self.positions)  # (B,): the last token
        self._make_room()

    def _make_room(self) -> None:
        """Create the tensors for the random numbers, tokens and log-probabilities of one call of `tokens`."""
        B, device = len(self.last), self.last.device
        self.numbers = torch.zeros(B, self.width, dtype=torch.float64, device=device)
        self.drawn = torch.zeros(B, self.width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(B, self.width, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)  # index of the next token among those of a call

    def tokens(self, numbers: np.ndarray, logits: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Draw the next n tokens of each row, and wait for them.

        Args:
            numbers: random numbers in [0, 1), float64, shape (B, n).
            logits: the logits of the first of the tokens, if they are known already, shape (B, V).
        Returns:
            (token ids, log-probabilities in nats), each of shape (B, n).
        """
        n = numbers.shape[1]
        self.numbers[:, :n] = torch.from_numpy(numbers)
        self.column.zero_()
        if logits is not None:
            self._draw(logits)
        for _ in range(n - (logits is not None)):
            self.steps.run(self._step, self.tree.capacity)
            self.tree.length += 1
        return self.drawn[:, :n].cpu().numpy(), self.logprobs[:, :n].cpu().numpy()

    def _step(self) -> None:
        """Compute the logits after the last token of each row, and draw the next token."""
        self.tree.begin_step()
        logits = self.model(
            input_ids=self.last[:, None], position_ids=self.positions[:, None], use_cache=False, tree=self.tree
        ).logits[:, -1]  # (B, V)
        self.tree.end_step()
        self._draw(logits)

    def _draw(self, logits: torch.Tensor) -> None:
        """Draw and store one token for each row."""
        numbers = self.numbers.index_select(1, self.column).squeeze(1)  # (B,)
        drawn, logprobs = draw(logits, self.temperature, numbers)
        self.last.copy_(drawn)
        self.drawn.index_copy_(1, self.column, drawn[:, None])
        self.logprobs.index_copy_(1, self.column, logprobs[:, None])
        self.column.add_(1)
        self.positions.add_(1).clamp_(max=self.limits)

    def keep(self, rows: torch.Tensor) -> None:
        """Remove all rows except the given ones.

        Args:
            rows: indices of the rows to keep, ascending, shape (B',).
        """
        self.steps.forget()
        self.tree.keep(rows)
        self.limits, self.positions, self.last = self.limits[rows], self.positions[rows], self.last[rows]
        self._make_room()
