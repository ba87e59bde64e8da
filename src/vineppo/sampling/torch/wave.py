"""Decode one wave of the PyTorch sampler: rows that are sampled in one batch.

Terms used in this module:

- *Rows* and *trunks* are described in sampling/trunks.py.
- The *branch* of a row holds the keys and values of the tokens that were sampled for the row.
- A *wave* is a set of trunks whose rows are decoded in one batch. Waves are decoded one after another.
- The *tree* (class `KVTree` in tree.py) holds the keys and values of the trunks and branches of one wave.
- The *position* of a sampled token is its index in the completion, counted from 0.

Letters in shapes: M trunks, L tokens of the longest trunk, N rows of a wave, B' unfinished rows, B rows of a tensor, V
tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vineppo.model.batch import pad
from vineppo.model.logits import selected_logits
from vineppo.sampling.torch.attention import tree_mode
from vineppo.sampling.torch.decoder import TreeDecoder
from vineppo.sampling.torch.draw import draw
from vineppo.sampling.torch.tree import KVTree
from vineppo.sampling.trunks import Row, Trunk, has_stop, response_tail, stop_window
from vineppo.seeds import stream_keys, uniforms
from vineppo.types import Completion, OnFinished, SampleRequest

if TYPE_CHECKING:
    from vineppo.sampling.torch.sampler import TorchSampler


class Wave:
    """Decodes the N rows of one wave, which must have the same temperature and stop strings.

    The rows are in the order of their M trunks. Arrays with one entry per row have the shape (N,). At each position, B'
    of the N rows are unfinished.

    Args:
        sampler: the sampler whose policy is used.
        requests: all requests of the call of `sample`. A row refers to its request by its index in this list.
        trunks: the trunks of the wave, with their rows.
        on_finished: function that is called with the completions that end at a position; None: no function.
    """

    def __init__(
        self,
        sampler: TorchSampler,
        requests: Sequence[SampleRequest],
        trunks: Sequence[Trunk],
        on_finished: OnFinished | None,
    ):
        self.on_finished = on_finished
        self.sampler, self.model = sampler, sampler.policy.model
        self.device = sampler.policy.device
        self.trunks = trunks
        self.rows: list[Row] = [row for trunk in trunks for row in trunk.rows]
        # Index of the trunk of each row.
        self.trunk_of = np.repeat(np.arange(len(trunks)), [len(trunk.rows) for trunk in trunks])
        self.prefix_lengths = np.array([row.prefix_length for row in self.rows])
        self.budgets = np.array([row.budget for row in self.rows])
        self.first_positions = np.array([row.first_position for row in self.rows])
        # The random number for position t of a row depends only on t and on this key of the row, which is computed from
        # the seed of the request and the index of the sample.
        self.keys = stream_keys(
            np.array([requests[row.request].seed for row in self.rows], dtype=np.uint64),
            np.array([requests[row.request].first_sample + row.sample for row in self.rows]),
        )
        first = requests[self.rows[0].request]
        self.temperature, self.stop = first.temperature, first.stop
        # A stop string may begin in the part of the response that the prefix already contains. Therefore the last
        # tokens of this part are needed for finding stop strings.
        window = stop_window(self.stop)
        self.tails = [response_tail(requests[row.request], window) for row in self.rows]
        # Whether the part of the response in the prefix contains a stop string already. Every token is then checked.
        decode = sampler.policy.codec.decode
        self.stop_in_tail = np.array([any(text in decode(tail) for text in self.stop) for tail in self.tails])
        # Index of a row -> token ids that must not be drawn at position 0.
        self.excluded = {i: ids for i, row in enumerate(self.rows) if (ids := requests[row.request].excluded_first)}
        steps = int(self.budgets.max())
        # The sampled tokens and their log-probabilities, shape (N, largest budget).
        self.token_ids = np.zeros((len(self.rows), steps), dtype=np.int64)
        self.logprobs = np.zeros((len(self.rows), steps), dtype=np.float32)
        # For each row: number of sampled tokens, whether the row is finished, and whether a token ended it (an
        # end-of-sequence token, or one that completed a stop string) and not its budget.
        self.counts = np.zeros(len(self.rows), dtype=np.int64)
        self.finished = np.zeros(len(self.rows), dtype=bool)
        self.stopped = np.zeros(len(self.rows), dtype=bool)

    def run(self) -> list[tuple[Row, Completion]]:
        """Decode until all rows are finished. Return a pair (row, completion) for each row."""
        if self.sampler.tree_attention:
            self._decode_tree()
        else:
            self._decode_plain()
        return [(row, self._completion(i)) for i, row in enumerate(self.rows)]

    def _decode_tree(self) -> None:
        """Decode with tree attention, several tokens per row between two checks of which rows are finished.

        Finished rows are not removed from the tree at every check, because each removal copies the other branches. A
        finished row that is still in the tree is computed, too, and `_store` drops its tokens.
        """
        pace, steps, position = self.sampler.pace, self.sampler.steps, 0
        rows = np.arange(len(self.rows))  # the rows in the tree, including finished ones
        steps.forget()
        try:
            with tree_mode(self.model):
                tree, logits = self._prefill()
                budgets = self._on_device(self.budgets)
                decoder = TreeDecoder(self.model, tree, budgets, self.temperature, pace.check_every, steps)
                known: torch.Tensor | None = self._without_excluded(logits, rows) if self.excluded else logits
                del logits
                while not self.finished.all():
                    left = int(self.budgets[rows[~self.finished[rows]]].max()) - position
                    numbers = self._numbers(rows, range(position, position + min(pace.check_every, left)))
                    drawn, logprobs = decoder.tokens(numbers, known)
                    known = None
                    self._store(rows, drawn, logprobs, position)
                    position += numbers.shape[1]
                    active = ~self.finished[rows]
                    due = position % pace.remove_every == 0 and len(rows) > pace.few_rows
                    if due and active.any() and active.mean() <= pace.keep_share:
                        decoder.keep(self._on_device(np.flatnonzero(active)))
                        rows = rows[active]
        finally:
            steps.forget()

    def _numbers(self, rows: np.ndarray, positions: range) -> np.ndarray:
        """Return the random numbers of some rows at n positions, float64, shape (rows, n)."""
        return uniforms(self.keys[rows][:, None], self.first_positions[rows][:, None] + np.array(positions))

    def _prefill(self) -> tuple[KVTree, torch.Tensor]:
        """Compute the keys and values of the trunks, and the logits of the first token of each row.

        Returns:
            (tree with the keys and values of the trunks, logits of shape (N, V)).
        """
        token_ids = pad([trunk.token_ids for trunk in self.trunks], torch.int64, self.device)  # (M, L)
        tree = KVTree(
            self._on_device(self.trunk_of),
            self._on_device(self.prefix_lengths),
            token_ids.shape[1],
            int(self.budgets.max()),
            self.sampler.pace.fixed,
        )
        # Several rows can have the same prefix. The logits after each different prefix are computed once.
        select = np.zeros(token_ids.shape, dtype=bool)
        last_tokens = self.trunk_of, self.prefix_lengths - 1
        select[last_tokens] = True
        # (M, L): for each selected token, the row in `logits` below.
        indices = (select.reshape(-1).cumsum() - 1).reshape(select.shape)
        logits = selected_logits(self.model, token_ids, self._on_device(select), tree=tree)  # (different prefixes, V)
        return tree, logits[self._on_device(indices[last_tokens])]

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        """Convert a NumPy array to a tensor on the device of the policy."""
        return torch.from_numpy(array).to(self.device)

    def _decode_plain(self) -> None:
        """Decode a model that does not support tree attention.

        The whole sequence of every unfinished row is computed again for each token, without stored keys and values.
        """
        prefixes = [trunk.token_ids[: row.prefix_length] for trunk in self.trunks for row in trunk.rows]
        for position in range(int(self.budgets.max())):
            alive = np.flatnonzero(~self.finished)
            if not len(alive):
                return
            rows = [(*prefixes[i], *self.token_ids[i, : self.counts[i]].tolist()) for i in alive]
            token_ids = pad(rows, torch.int64, self.device)
            select = torch.zeros(token_ids.shape, dtype=torch.bool, device=self.device)
            select[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])] = True
            logits = selected_logits(self.model, token_ids, select)  # (B', V)
            if position == 0 and self.excluded:
                logits = self._without_excluded(logits, alive)
            numbers = self._numbers(alive, range(position, position + 1))
            drawn, logprobs = draw(logits, self.temperature, self._on_device(numbers[:, 0]))
            self._store(alive, drawn[:, None].cpu().numpy(), logprobs[:, None].cpu().numpy(), position)

    def _store(self, rows: np.ndarray, drawn: np.ndarray, logprobs: np.ndarray, first: int) -> None:
        """Store the tokens that rows have drawn, and find out which rows end. What a row drew after its end is dropped.

        Args:
            rows: indices of the rows, shape (B,).
            drawn, logprobs: the tokens and their log-probabilities at n consecutive positions, shape (B, n).
            first: position of the first of them.
        """
        for column in range(drawn.shape[1]):
            alive = ~self.finished[rows]
            if alive.any():
                self._store_tokens(rows[alive], drawn[alive, column], logprobs[alive, column], first + column)

    def _store_tokens(self, alive: np.ndarray, drawn: np.ndarray, logprobs: np.ndarray, position: int) -> None:
        """Store one token for each unfinished row, and mark the rows that this token finishes.

        Args:
            alive: indices of the unfinished rows, shape (B',).
            drawn, logprobs: the tokens and their log-probabilities, shape (B',).
            position: index of the new token among those that the row samples.
        """
        self.token_ids[alive, position] = drawn
        self.logprobs[alive, position] = logprobs
        self.counts[alive] = position + 1
        stopped = np.isin(drawn, self.sampler.policy.codec.eos_ids)
        for index in np.flatnonzero(self._may_stop(alive, drawn) & ~stopped):
            stopped[index] = self._ends_with_stop(alive[index])
        self.stopped[alive] = stopped
        self.finished[alive] = stopped | (position + 1 >= self.budgets[alive])
        if self.on_finished:
            ended = alive[self.finished[alive]]
            self.on_finished([(self.rows[i].request, self._completion(i)) for i in ended])

    def _without_excluded(self, logits: torch.Tensor, alive: np.ndarray) -> torch.Tensor:
        """Return a copy of the logits (B', V) of position 0, with -inf for the excluded tokens of each row."""
        pairs = [(index, token) for index, row in enumerate(alive) for token in self.excluded.get(row, ())]
        batch_indices, tokens = torch.tensor(pairs, device=logits.device).T
        logits = logits.clone()
        logits[batch_indices, tokens] = float("-inf")
        return logits

    def _may_stop(self, rows: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """Return for each row whether its last token may have completed a stop string, shape (B',), bool."""
        if not self.stop:
            return np.zeros(len(rows), dtype=bool)
        return self.stop_in_tail[rows] | self.sampler.stops.table(self.stop)[drawn].astype(bool)

    def _ends_with_stop(self, row: int) -> bool:
        """Return whether the last token of a row completed a stop string."""
        sampled = self.token_ids[row, : self.counts[row]].tolist()
        return has_stop(self.sampler.policy.codec.decode, self.tails[row], sampled, self.stop)

    def _completion(self, row: int) -> Completion:
        """Return the completion of a finished row."""
        n = self.counts[row]
        return Completion(
            token_ids=tuple(self.token_ids[row, :n].tolist()),
            logprobs=tuple(self.logprobs[row, :n].tolist()),
            finish_reason="stop" if self.stopped[row] else "length",
            version=self.sampler.version,
        )
