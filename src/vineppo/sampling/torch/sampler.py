"""The native sampler: many continuations of few prefixes, from the policy's own weights in memory.

Every prefix is computed once, however many samples it has, and a prefix of another prefix costs nothing (the states of
one response all lie on it). Finished rows leave the batch. Sample j of a request draws its t-th token with one uniform
number addressed by (request seed, j, t), so a sample does not depend on what else is in the batch, up to floating-point
rounding of the logits.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from vineppo.model.batch import pad
from vineppo.model.codec import Codec
from vineppo.model.logits import selected_logits
from vineppo.sampling.torch.packed import packed_weights
from vineppo.sampling.torch.tree import KVTree, tree_mode, tree_supported
from vineppo.seeds import stream_keys, uniforms
from vineppo.types import Capabilities, Completion, OnFinished, SampleRequest, UserError, Weights

_KEEP_SHARE = 0.85
"""Rows are compacted when at most this share of them would stay."""
_BLOCK = 256
"""Vocabulary entries that are summed at once when a token is drawn."""
_LOGITS_AT_ONCE = 1 << 19
"""Of rows from which tokens are drawn together: few enough to stay in a processor's cache from one pass to the next."""


class LanguageModel(Protocol):
    """What the sampler needs of a policy."""

    model: Any
    """A transformers causal language model."""
    codec: Codec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...


@dataclass(frozen=True)
class _Row:
    """One sample to be: its request, its place in the request, and where its prefix ends on its trunk."""

    request: int
    sample: int
    prefix_length: int
    budget: int


@dataclass(frozen=True)
class _Trunk:
    """A token sequence to compute once, with the rows that start on it."""

    token_ids: tuple[int, ...]
    rows: tuple[_Row, ...]

    @property
    def budget(self) -> int:
        """The largest of its rows'."""
        return max(row.budget for row in self.rows)


class TorchSampler:
    """Sampler protocol (types.Sampler) over a Policy in the same process.

    Args:
        policy: whose weights are used as they are at each call; nothing is copied.
        max_rows: largest number of sequences decoded at once; more are cut into waves.
        kv_memory: bytes that the keys and values of a wave may take, the same way.
    """

    capabilities = Capabilities(excluded_first=True, reproducible=True)

    def __init__(self, policy: LanguageModel, *, max_rows: int = 2048, kv_memory: int = 4 << 30):
        self.policy = policy
        self.version = 0
        self.max_rows, self.kv_memory = max_rows, kv_memory
        self.tree_attention = tree_supported(policy.model)
        if not self.tree_attention:
            warnings.warn(
                f"{type(policy.model).__name__} has layers that are not plain attention through transformers' "
                "interface: sampling recomputes every token, which is slow",
                stacklevel=2,
            )

    def update_weights(self, version: int, weights: Weights) -> None:
        """Note the version; the weights themselves are shared with the policy."""
        self.version = version

    @torch.no_grad()
    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """One list of `num_samples` completions per request, in order.

        A request without budget gets empty completions that end by "length", which `on_finished` is not told. Requests
        of different temperatures or stop strings are decoded apart, as if each kind had been a call of its own.

        Raises:
            UserError: when the keys and values of a single sequence do not fit into `kv_memory`.
        """
        results: list[list[Completion | None]] = [[None] * request.num_samples for request in requests]
        for i, request in enumerate(requests):
            if request.max_new_tokens < 1:
                results[i] = [Completion((), (), "length", self.version)] * request.num_samples
        waves = [
            wave
            for alike in _alike(requests)
            for wave in _waves(_trunks(requests, alike), self.max_rows, self._kv_tokens())
        ]
        with packed_weights(self.policy.model) if waves else contextlib.nullcontext():
            for wave in waves:
                for row, completion in _Wave(self, requests, wave, on_finished).run():
                    results[row.request][row.sample] = completion
        return [[c for c in completions if c is not None] for completions in results]

    def _kv_tokens(self) -> int:
        """Number of tokens whose keys and values `kv_memory` holds; as good as endless where none are kept."""
        if not self.tree_attention:
            return 1 << 62
        return self.kv_memory // kv_bytes_per_token(self.policy.model)


class _Wave:
    """The decode loop over M trunks and the N rows on them, in the order of the trunks; all of one temperature."""

    def __init__(
        self,
        sampler: TorchSampler,
        requests: Sequence[SampleRequest],
        trunks: Sequence[_Trunk],
        on_finished: OnFinished | None,
    ):
        self.on_finished = on_finished
        self.sampler, self.model = sampler, sampler.policy.model
        self.device = sampler.policy.device
        self.trunks = trunks
        self.rows: list[_Row] = [row for trunk in trunks for row in trunk.rows]
        self.trunk_of = np.repeat(np.arange(len(trunks)), [len(trunk.rows) for trunk in trunks])
        self.prefix_lengths = np.array([row.prefix_length for row in self.rows])
        self.budgets = np.array([row.budget for row in self.rows])
        self.keys = stream_keys(
            np.array([requests[row.request].seed for row in self.rows], dtype=np.uint64),
            np.array([requests[row.request].first_sample + row.sample for row in self.rows]),
        )
        any_request = requests[self.rows[0].request]
        self.temperature, self.stop = any_request.temperature, any_request.stop
        # A stop string may begin in the part of the response that is continued.
        window = max((len(text.encode()) for text in self.stop), default=0)
        self.tails = [_tail(requests[row.request], window) for row in self.rows]
        self.excluded = {i: ids for i, row in enumerate(self.rows) if (ids := requests[row.request].excluded_first)}
        steps = int(self.budgets.max())
        self.token_ids = np.zeros((len(self.rows), steps), dtype=np.int64)
        self.logprobs = np.zeros((len(self.rows), steps), dtype=np.float32)
        self.counts = np.zeros(len(self.rows), dtype=np.int64)
        self.finished = np.zeros(len(self.rows), dtype=bool)
        self.stopped = np.zeros(len(self.rows), dtype=bool)

    def run(self) -> list[tuple[_Row, Completion]]:
        """Decode until every row has finished."""
        decode = self._decode_tree if self.sampler.tree_attention else self._decode_plain
        for position, (logits, alive) in enumerate(decode()):
            self._take(logits, alive, position)
        return [(row, self._completion(i)) for i, row in enumerate(self.rows)]

    def _decode_tree(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """Yield (logits (B', V), rows (B',)) per position; rows that finish in between are dropped in blocks."""
        with tree_mode(self.model):
            tree, logits = self._prefill()
            rows = np.arange(len(self.rows))  # those that the tree holds, finished ones among them
            while True:
                active = ~self.finished[rows]
                yield logits if active.all() else logits[self._on_device(np.flatnonzero(active))], rows[active]
                active = ~self.finished[rows]
                if not active.any():
                    return
                if active.mean() <= _KEEP_SHARE:
                    tree.keep(self._on_device(np.flatnonzero(active)))
                    rows = rows[active]
                # A finished row that is still here stays where it ended: further on, the model may have no position.
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
        """Compute the trunks once; logits after each row's prefix, shape (N, V)."""
        token_ids = pad([trunk.token_ids for trunk in self.trunks], torch.int64, self.device)  # (M, L)
        tree = KVTree(
            self._on_device(self.trunk_of),
            self._on_device(self.prefix_lengths),
            token_ids.shape[1],
            int(self.budgets.max()),
        )
        select = np.zeros(token_ids.shape, dtype=bool)
        where = self.trunk_of, self.prefix_lengths - 1
        select[where] = True
        place = (select.reshape(-1).cumsum() - 1).reshape(select.shape)  # (M, L): row of each selected position
        logits = selected_logits(self.model, token_ids, self._on_device(select), tree=tree)  # (prefixes, V)
        return tree, logits[self._on_device(place[where])]

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _decode_plain(self) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
        """The slow, general path: the whole sequence is computed again for every token."""
        prefixes = [trunk.token_ids[: row.prefix_length] for trunk in self.trunks for row in trunk.rows]
        while not self.finished.all():
            alive = np.flatnonzero(~self.finished)
            rows = [(*prefixes[i], *self.token_ids[i, : self.counts[i]].tolist()) for i in alive]
            token_ids = pad(rows, torch.int64, self.device)
            select = torch.zeros(token_ids.shape, dtype=torch.bool, device=self.device)
            select[torch.arange(len(rows)), torch.tensor([len(row) - 1 for row in rows])] = True
            yield selected_logits(self.model, token_ids, select), alive

    def _take(self, logits: torch.Tensor, alive: np.ndarray, position: int) -> None:
        """Draw one token for each living row, write it down, and see who has finished."""
        if position == 0 and self.excluded:
            logits = self._without_excluded(logits, alive)
        drawn, logprobs = draw(logits, self.temperature, uniforms(self.keys[alive], position))
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
        """Logits (B', V) of the first position with -inf at each row's excluded tokens."""
        places = [(place, token) for place, row in enumerate(alive) for token in self.excluded.get(row, ())]
        places_in_batch, tokens = torch.tensor(places, device=logits.device).T
        logits = logits.clone()
        logits[places_in_batch, tokens] = float("-inf")
        return logits

    def _ends_with_stop(self, row: int) -> bool:
        """Whether a stop string has been completed; tokens are at least one byte, so a few of the last ones suffice."""
        window = 1 + max(len(text.encode()) for text in self.stop)
        last = (*self.tails[row], *self.token_ids[row, : self.counts[row]].tolist())[-window:]
        text = self.sampler.policy.codec.decode(last)
        return any(stop in text for stop in self.stop)

    def _completion(self, row: int) -> Completion:
        n = self.counts[row]
        return Completion(
            token_ids=tuple(self.token_ids[row, :n].tolist()),
            logprobs=tuple(self.logprobs[row, :n].tolist()),
            finish_reason="stop" if self.stopped[row] else "length",
            version=self.sampler.version,
        )


def draw(logits: torch.Tensor, temperature: float, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token per row by inversion of the cumulative distribution: one uniform per row, not one per logit.

    Args:
        logits: shape (B, V).
        temperature: 0 takes the most likely token.
        uniform: in [0, 1), shape (B,).
    Returns:
        (token ids (B,), log-probabilities (B,)) of the distribution that was sampled.
    """
    if temperature == 0:
        best = logits.argmax(-1).cpu().numpy()
        return best, np.zeros(len(best), dtype=np.float32)
    size = max(1, min(len(logits), _LOGITS_AT_ONCE // logits.shape[1]))
    # One piece of memory for all parts: fresh memory costs more than the arithmetic in it.
    weights = torch.empty(size, logits.shape[1], device=logits.device)
    parts = [
        _draw(logits[start : start + size], temperature, uniform[start : start + size], weights)
        for start in range(0, len(logits), size)
    ]
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([logprobs for _, logprobs in parts])


def _draw(
    logits: torch.Tensor, temperature: float, uniform: np.ndarray, memory: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    weights = memory[: len(logits)].copy_(logits)  # (B, V), float32
    if temperature != 1:
        weights /= temperature
    highest = weights.amax(-1, keepdim=True)  # (B, 1)
    weights.sub_(highest).exp_()
    drawn, total = invert(weights, torch.from_numpy(uniform).to(logits.device)[:, None])
    # From the logit: the exponential of a very unlikely token has lost digits.
    logprobs = (logits.gather(1, drawn).float() / temperature - highest).double() - total.log()  # (B, 1)
    return drawn.squeeze(1).cpu().numpy(), logprobs.squeeze(1).float().cpu().numpy()


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry at which the running sum of each row passes `uniform` times the row's total.

    A long row is searched for the block of entries first, by the blocks' sums, and then inside of it: that spares the
    running sum over everything, in which a hundred thousand small numbers would be added one after another.

    Args:
        weights: not negative, not all 0, shape (B, V).
        uniform: float64, in [0, 1), shape (B, 1).
    Returns:
        (entries (B, 1), never one of weight 0; totals (B, 1) in float64).
    """
    B, V = weights.shape
    if V <= _BLOCK:
        sums = weights.cumsum(-1, dtype=torch.float64)  # (B, V)
        return _first_above(sums, uniform * sums[:, -1:]), sums[:, -1:]
    blocks = F.pad(weights, (0, -V % _BLOCK)).view(B, -1, _BLOCK)  # (B, blocks, _BLOCK); no copy where V fits
    sums = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, blocks)
    level = uniform * sums[:, -1:]  # (B, 1)
    block = _first_above(sums, level)  # (B, 1)
    before = F.pad(sums, (1, 0)).gather(1, block)  # (B, 1)
    inside = blocks.gather(1, block[:, :, None].expand(B, 1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return block * _BLOCK + _first_above(inside, level - before), sums[:, -1:]


def _first_above(sums: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Index of the first running sum, shape (B, n), above each level, (B, 1): never that of an entry that adds 0."""
    total = sums[:, -1:]
    # Rounding may lift a level to the total, above which there is no entry.
    level = torch.minimum(level, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, level, right=True).clamp_max(sums.shape[1] - 1)


def _alike(requests: Sequence[SampleRequest]) -> list[list[int]]:
    """Numbers of the requests that are decoded together: those of one temperature and the same stop strings."""
    groups: dict[tuple[float, tuple[str, ...]], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault((request.temperature, request.stop), []).append(i)
    return list(groups.values())


def _trunks(requests: Sequence[SampleRequest], chosen: Sequence[int]) -> list[_Trunk]:
    """Group the prefixes of the chosen requests so that a prefix of a longer one lies on it."""
    wanted: dict[tuple[int, ...], list[_Row]] = {}
    for i in chosen:
        request = requests[i]
        if request.max_new_tokens > 0:
            wanted.setdefault(request.prompt_ids, []).extend(
                _Row(i, j, len(request.prompt_ids), request.max_new_tokens) for j in range(request.num_samples)
            )
    trunks: list[tuple[tuple[int, ...], list[_Row]]] = []
    # In descending order a prefix comes right behind the sequences that extend it.
    for ids in sorted((ids for ids, rows in wanted.items() if rows), reverse=True):
        if not trunks or trunks[-1][0][: len(ids)] != ids:
            trunks.append((ids, []))
        trunks[-1][1].extend(wanted[ids])
    return [_Trunk(ids, tuple(rows)) for ids, rows in trunks]


def _tail(request: SampleRequest, length: int) -> tuple[int, ...]:
    """The last ids of the response that a request continues, at most `length`."""
    kept = min(length, request.response_tokens)
    return request.prompt_ids[-kept:] if kept else ()


def kv_bytes_per_token(model: Any) -> int:
    """Keys and values of one token in all layers, in bytes."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize)


def _waves(trunks: Sequence[_Trunk], max_rows: int, kv_tokens: int) -> Iterator[list[_Trunk]]:
    """Cut the work into waves, trunks with similarly many rows together.

    A wave has at most `max_rows` rows. Its trunks are padded to the longest and its branches to the largest budget; all
    that holds at most `kv_tokens` tokens.
    """
    pieces = sorted((p for trunk in trunks for p in _pieces(trunk, max_rows, kv_tokens)), key=lambda p: -len(p.rows))
    wave: list[_Trunk] = []
    for piece in pieces:
        if wave and not _fits([*wave, piece], max_rows, kv_tokens):
            yield wave
            wave = []
        wave.append(piece)
    if wave:
        yield wave


def _pieces(trunk: _Trunk, max_rows: int, kv_tokens: int) -> Iterator[_Trunk]:
    """A trunk with so many of its rows at a time that it fits into a wave of its own."""
    length, budget = len(trunk.token_ids), trunk.budget
    size = min(max_rows, (kv_tokens - length) // budget)
    if size < 1:
        raise UserError(
            f"a sequence of {length} tokens and {budget} new ones needs keys and values of {length + budget} tokens, "
            f"but rollouts.kv_memory holds {kv_tokens}; raise rollouts.kv_memory or lower rollouts.max_new_tokens"
        )
    for start in range(0, len(trunk.rows), size):
        yield _Trunk(trunk.token_ids, trunk.rows[start : start + size])


def _fits(wave: Sequence[_Trunk], max_rows: int, kv_tokens: int) -> bool:
    rows = sum(len(trunk.rows) for trunk in wave)
    trunks = len(wave) * max(len(trunk.token_ids) for trunk in wave)
    return rows <= max_rows and trunks + rows * max(trunk.budget for trunk in wave) <= kv_tokens
