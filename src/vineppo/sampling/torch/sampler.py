"""The PyTorch sampler, which is fast at sampling many continuations of few prefixes.

The sampler uses the weights of a policy in the same process. The attention keys and values of a prefix are computed
once for all its samples. If a prefix begins with another prefix, as later states of a response begin with earlier ones,
only the longer one is computed. Finished sequences are removed from the batch. Token t of sample j is drawn with one
uniform random number that depends only on (request seed, j, t). A sample therefore does not depend on other sequences
in the batch, except for rounding of the logits.

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

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from vineppo.model.batch import pad
from vineppo.model.codec import Codec
from vineppo.model.logits import selected_logits
from vineppo.sampling.torch.drafts import DraftedSampling
from vineppo.sampling.torch.packed import packed_weights
from vineppo.sampling.torch.tree import KVTree, tree_mode, tree_supported
from vineppo.sampling.trunks import (
    Row,
    Trunk,
    draft_length,
    empty_results,
    has_stop,
    response_tail,
    stop_window,
    trunks_of,
)
from vineppo.sampling.units import equally_sampled, waves_of
from vineppo.seeds import stream_keys, uniforms
from vineppo.types import Capabilities, Completion, OnFinished, SampleRequest, Weights

_KEEP_SHARE = 0.85
"""Finished rows are removed from the tree when at most this share of the rows in the tree is unfinished."""
_BLOCK = 256
"""Block size of `invert`. If the vocabulary is larger, `invert` draws a token in two stages: first the block of this
many tokens that contains the token, then the token in the block."""
_LOGITS_AT_ONCE = {"cpu": 1 << 19}
"""Maximum number of logits that `draw` processes at once, by type of device. On a CPU they fit into its cache as
float32 numbers (2 MiB)."""
_LOGITS_AT_ONCE_ELSEWHERE = 1 << 28
"""The same for other devices, where a call takes longer than the work in it. The float32 numbers take 1 GiB."""


class LanguageModel(Protocol):
    """The parts of a policy that the sampler uses."""

    model: Any
    """A transformers causal language model."""
    codec: Codec
    """Decodes token ids, and knows the end-of-sequence tokens."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...


class TorchSampler:
    """Samples with the weights of a policy in the same process; implements `types.Sampler`.

    Args:
        policy: the policy. Its weights are shared and not copied, so every call of `sample` uses the current weights.
        max_rows: maximum number of rows of a wave.
        kv_memory: maximum number of bytes of the keys and values of a wave.
    """

    capabilities = Capabilities(excluded_first=True, reproducible=True, drafts=True)

    def __init__(self, policy: LanguageModel, *, max_rows: int = 2048, kv_memory: int = 4 << 30):
        self.policy = policy
        self.version = 0
        self.max_rows, self.kv_memory = max_rows, kv_memory
        self.tree_attention = tree_supported(policy.model)
        if not self.tree_attention:
            warnings.warn(
                f"{type(policy.model).__name__} has layers that do not use transformers' attention interface in a "
                "supported way: sampling recomputes the whole sequence for every token, which is slow",
                stacklevel=2,
            )

    def update_weights(self, version: int, weights: Weights) -> None:
        """Store `version`, the number of policy updates that the weights include.

        The function `weights`, which returns the new weights, is not called, because the sampler uses the tensors of
        the policy.
        """
        self.version = version

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the completions of requests, as `types.Sampler.sample` says.

        Requests with different temperatures or stop strings are never decoded in the same batch.

        Raises:
            UserError: if the keys and values of a single sequence do not fit into `kv_memory`.
        """
        if not any(map(draft_length, requests)):
            return self._sample(requests, (), on_finished)
        codec = self.policy.codec
        drafted = DraftedSampling(
            self.policy.model, codec.eos_ids, codec.decode, self.policy.device, self.version, self._sample
        )
        return drafted.sample(requests, on_finished)

    def _sample(
        self, requests: Sequence[SampleRequest], first_positions: Sequence[int], on_finished: OnFinished | None
    ) -> list[list[Completion]]:
        """Do the work of `sample` without drafts.

        Args:
            first_positions: for each request, the position of its first new token; empty: 0 for all.
        """
        results = empty_results(requests, self.version)
        waves = [
            wave
            for indices in equally_sampled(requests)
            for wave in waves_of(trunks_of(requests, indices, first_positions), self.max_rows, self._kv_tokens())
        ]
        with packed_weights(self.policy.model) if waves else contextlib.nullcontext():
            for wave in waves:
                for row, completion in _Wave(self, requests, wave, on_finished).run():
                    results[row.request][row.sample] = completion
        return [[c for c in completions if c is not None] for completions in results]

    def _kv_tokens(self) -> int:
        """Return the number of tokens whose keys and values fit into `kv_memory`.

        Without tree attention, no keys and values are stored. The result is then so large that it is no limit.
        """
        if not self.tree_attention:
            return 1 << 62
        return self.kv_memory // kv_bytes_per_token(self.policy.model)


class _Wave:
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


def draw(logits: torch.Tensor, temperature: float, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw one token per row by inverting the cumulative distribution, with one random number per row.

    Args:
        logits: next-token logits, shape (B, V).
        temperature: sampling temperature; 0 selects the most likely token.
        uniform: random numbers in [0, 1), shape (B,).
    Returns:
        (token ids, log-probabilities), each of shape (B,). The log-probabilities are in nats, under the distribution
        that the tokens were drawn from; they are 0 at temperature 0.
    """
    if temperature == 0:
        best = logits.argmax(-1).cpu().numpy()
        return best, np.zeros(len(best), dtype=np.float32)
    limit = _LOGITS_AT_ONCE.get(logits.device.type, _LOGITS_AT_ONCE_ELSEWHERE)
    size = max(1, min(len(logits), limit // logits.shape[1]))
    # The rows are divided into parts of `size` rows. All parts use the same memory, because allocating memory takes
    # longer than the computation in it.
    weights = torch.empty(size, logits.shape[1], device=logits.device)
    parts = [
        _draw(logits[start : start + size], temperature, uniform[start : start + size], weights)
        for start in range(0, len(logits), size)
    ]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([logprobs for _, logprobs in parts])


def _draw(
    logits: torch.Tensor, temperature: float, uniform: np.ndarray, memory: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Do the work of `draw` for some of the rows, at a temperature above 0.

    Args:
        memory: float32 tensor with at least as many rows as `logits`, and V columns. Its content is overwritten.
    """
    weights = memory[: len(logits)].copy_(logits)  # (B, V), float32
    if temperature != 1:
        weights /= temperature
    highest = weights.amax(-1, keepdim=True)  # (B, 1)
    weights.sub_(highest).exp_()
    drawn, total = invert(weights, torch.from_numpy(uniform).to(logits.device)[:, None])
    # The log-probability is computed from the logit and not from the weight, because the weight of a very unlikely
    # token is so small that it has lost precision.
    logprobs = (logits.gather(1, drawn).float() / temperature - highest).double() - total.log()  # (B, 1)
    return drawn.squeeze(1).cpu().numpy(), logprobs.squeeze(1).float().cpu().numpy()


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one index per row, with probabilities proportional to the weights of the row.

    The result is the first index at which the cumulative sum of the weights exceeds `uniform` times the sum of the row.
    A long row is divided into blocks. The sums of the blocks determine the block that contains the index, and then the
    index is searched in this block. This avoids a cumulative sum over the whole row, which is slow for large
    vocabularies.

    Args:
        weights: numbers of at least 0, not all 0 in a row, shape (B, V).
        uniform: random numbers in [0, 1), float64, shape (B, 1).
    Returns:
        (indices, sums of the rows in float64), each of shape (B, 1). The weight at each returned index is above 0.
    """
    B, V = weights.shape
    if V <= _BLOCK:
        sums = weights.cumsum(-1, dtype=torch.float64)  # (B, V)
        return _first_above(sums, uniform * sums[:, -1:]), sums[:, -1:]
    padded = F.pad(weights, (0, -V % _BLOCK)) if V % _BLOCK else weights
    blocks = padded.view(B, -1, _BLOCK)  # (B, number of blocks, _BLOCK)
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, number of blocks)
    level = uniform * sums[:, -1:]  # (B, 1)
    block = _first_above(sums, level)  # (B, 1)
    before = F.pad(sums, (1, 0)).gather(1, block)  # (B, 1): sum of all weights before the block
    # Cumulative sums within the block, shape (B, _BLOCK).
    inside = blocks.gather(1, block[:, :, None].expand(B, 1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(inside, level - before), sums[:, -1:]


def _first_above(sums: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Return for each row the index of the first cumulative sum above the row's level, shape (B, 1).

    Args:
        sums: cumulative sums of n weights of at least 0, shape (B, n). The weight at the returned index is never 0.
        level: one number per row, at least 0 and about at most the last cumulative sum, shape (B, 1).
    """
    total = sums[:, -1:]
    # Rounding may raise a level to the total or above it. No cumulative sum is above the total, so the level is then
    # lowered to the largest number below the total.
    level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, level, right=True).clamp_max(sums.shape[1] - 1)


def kv_bytes_per_token(model: Any) -> int:
    """Return the number of bytes of the keys and values of one token in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize)
