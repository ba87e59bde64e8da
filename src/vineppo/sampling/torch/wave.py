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

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from vineppo.model.batch import pad
from vineppo.model.logits import selected_logits
from vineppo.sampling.torch.attention import tree_mode
from vineppo.sampling.torch.draw import draw
from vineppo.sampling.torch.tree import KVTree
from vineppo.sampling.trunks import Row, Trunk, has_stop, response_tail, stop_window
from vineppo.seeds import stream_keys, uniforms
from vineppo.types import Completion, OnFinished, SampleRequest

if TYPE_CHECKING:
    from vineppo.sampling.torch.sampler import TorchSampler

_KEEP_SHARE = 0.85
"""Finished rows are removed from the tree when at most this share of the rows in the tree is unfinished."""


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
        decode = self._decode_tree if self.sampler.tree_attention else self._decode_plain
        for position, (logits, alive) in enumerate(decode()):
            self._sample_tokens(logits, alive, position)
        return [(row, self._completion(i)) for i, row in enumerate(self.rows)]

    def _decode_tree(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """For each position, yield the logits (B', V) of the unfinished rows and the indices (B',) of these rows.

        The caller must draw a token for each of these rows (`_sample_tokens`) before it asks for the next position.
        Finished rows are not removed from the tree at every position, because each removal copies the other branches.
        """
        with tree_mode(self.model):
            tree, logits = self._prefill()
            rows = np.arange(len(self.rows))  # the rows in the tree, including finished ones
            while True:
                active = ~self.finished[rows]
                yield logits if active.all() else logits[self._on_device(np.flatnonzero(active))], rows[active]
                active = ~self.finished[rows]
                if not active.any():
                    return
                if active.mean() <= _KEEP_SHARE:
                    tree.keep(self._on_device(np.flatnonzero(active)))
                    rows = rows[active]
                # A finished row that is still in the tree is computed, too, and its logits are ignored. Its last token
                # is computed again at the same place in the sequence, because the next place may exceed the maximum
                # length of the model.
                ids = self.token_ids[rows, self.counts[rows] - 1]
                positions = self.prefix_lengths[rows] + self.counts[rows] - 1
                logits = self.model(
                    input_ids=self._on_device(ids)[:, None],
                    position_ids=self._on_device(positions)[:, None],
                    use_cache=False,
                    tree=tree,
                ).logits[:, -1]
                tree.length += 1

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

    def _decode_plain(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield the same as `_decode_tree`, for a model that does not support tree attention.

        The whole sequence of every unfinished row is computed again for each token, without stored keys and values.
        """
        prefixes = [trunk.token_ids[: row.prefix_length] for trunk in self.trunks for row in trunk.rows]
        while not self.finished.all():
            alive = np.flatnonzero(~self.finished)
            rows = [(*prefixes[i], *self.token_ids[i, : self.counts[i]].tolist()) for i in alive]
            token_ids = pad(rows, torch.int64, self.device)
            select = torch.zeros(token_ids.shape, dtype=torch.bool, device=self.device)
            select[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])] = True
            yield selected_logits(self.model, token_ids, select), alive

    def _sample_tokens(self, logits: torch.Tensor, alive: np.ndarray, position: int) -> None:
        """Draw and store one token for each unfinished row, and mark the rows that this token finishes.

        Args:
            logits: logits of the unfinished rows, shape (B', V).
            alive: indices of the unfinished rows, shape (B',).
            position: index of the new token among those that the row samples.
        """
        if position == 0 and self.excluded:
            logits = self._without_excluded(logits, alive)
        numbers = uniforms(self.keys[alive], self.first_positions[alive] + position)
        drawn, logprobs = draw(logits, self.temperature, numbers)
        self.token_ids[alive, position] = drawn
        self.logprobs[alive, position] = logprobs
        self.counts[alive] = position + 1
        stopped = np.isin(drawn, self.sampler.policy.codec.eos_ids)
        if self.stop:
            stopped |= np.array([self._ends_with_stop(row) for row in alive])
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
