"""Pack sequences into one row of tokens without padding, in which a common prefix of sequences occurs once.

The tokens of a packed row are the nodes of a tree: a token belongs to every sequence that starts with the tokens up to
it. In the linear layers of a model, a packed row is a sequence like any other. In the attention, a token attends to
itself and to the tokens before it in its sequences. This attention is registered in the attention interface of
transformers, so it works with the unchanged modules of any architecture that uses this interface.

A sequence *owns* the tokens that no sequence before it contains. For the attention, the owned tokens are the queries of
the sequence, and all its tokens are its keys. Sequences are put into *blocks*, in which queries and keys are padded.

Letters in shapes: L tokens of the packed row, R sequences of a block, Q queries and K keys of its longest sequences, H
query heads, Hkv key-value heads, d dimensions of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "vineppo_packed"
"""Name of the attention to packed rows in the attention interface of transformers."""
_TRIAL = ((0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 8, 9), (0, 1, 2, 3, 8, 10, 11))
"""Token ids of the sequences with which `packing_supported` compares the packed form with the padded one."""
_TRIAL_DISTANCE = 1e-3
"""Largest total variation distance between two next-token distributions that `packing_supported` accepts in float32.
The effect of rounding is below 1e-5, and the effect of a wrong attention is larger."""
_TRIAL_DISTANCE_ROUNDED = 0.2
"""The same limit for 16-bit weights."""
_GATHERED = 8
"""A micro-batch gathers at most this number of keys for each token that it may have (`packed_batches`)."""
_WORTH_SHARING = 0.2
"""A common prefix is shared from this share of a sequence on (`shared_tokens`)."""
_SHORTEST = 0.6
"""A sequence with fewer queries or keys than this share of the longest sequence of a block starts a new block."""


@dataclass
class Block:
    """R sequences whose attention is computed in one call."""

    queries: torch.Tensor
    """Index of each query in the packed row, padded with 0, int64, shape (R, Q)."""
    keys: torch.Tensor
    """Index of each key in the packed row, padded with 0, int64, shape (R, K)."""
    starts: torch.Tensor
    """Position of the first query of each sequence, int64, shape (R,)."""
    causal: bool
    """Whether all sequences own all their tokens, so that query q attends to the keys 0 to q."""
    whole: bool
    """Whether the tokens of the sequences are the tokens of the packed row, in this order and without padding."""
    _biases: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers that are added to the attention scores, shape (R, 1, Q, K): 0 or -inf.

        Args:
            window: number of most recent tokens that a query may attend to; None means all tokens.
            dtype: dtype of the result.
        """
        if (window, dtype) not in self._biases:
            (R, Q), K, device = self.queries.shape, self.keys.shape[1], self.queries.device
            # A padded query gets the position of an existing key, because a softmax over no keys would be nan.
            positions = (self.starts[:, None] + torch.arange(Q, device=device)).clamp_max(K - 1)  # (R, Q)
            distance = positions[:, :, None] - torch.arange(K, device=device)  # (R, Q, K)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            bias = torch.zeros(R, 1, Q, K, dtype=dtype, device=device)
            self._biases[window, dtype] = bias.masked_fill_(hidden[:, None], float("-inf"))
        return self._biases[window, dtype]


@dataclass
class Packing:
    """A packed row of L tokens, and what the attention needs to know about its sequences."""

    token_ids: torch.Tensor
    """Shape (1, L), int64."""
    position_ids: torch.Tensor
    """Position of each token in its sequences, shape (1, L), int64."""
    paths: list[np.ndarray]
    """For each sequence, the index in the packed row of each of its tokens, int64, shape (tokens of the sequence,)."""
    blocks: list[Block]
    order: torch.Tensor
    """Index of each token of the packed row among the queries of all blocks, int64, shape (L,)."""
    windowed: bool = False
    """Whether a layer has used sliding-window attention."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens with which both sequences start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared_tokens(last: Sequence[int], sequence: Sequence[int]) -> int:
    """Return the number of tokens that a sequence shares with the sequence before it in a packed row.

    A short common prefix is not shared: the attention to shared tokens needs a mask and copies of the keys, which take
    more time than a few tokens in the linear layers.
    """
    common = common_prefix(last, sequence)
    return common if common >= _WORTH_SHARING * len(sequence) else 0


def packed_batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Divide sequences into micro-batches of at most `max_tokens` packed tokens.

    Sequences with common prefixes are put together. A sequence longer than `max_tokens` is alone in its micro-batch.

    Args:
        sequences: the token ids of each sequence.
    Returns:
        One list per micro-batch, with the indices of its sequences in the order in which they are packed. Every index
        occurs exactly once.
    """
    groups: list[list[int]] = []
    tokens = gathered = 0
    # In lexicographic order, the longest prefix that a sequence has in common with any before it is that with the last.
    for index in sorted(range(len(sequences)), key=lambda i: (sequences[i], i)):
        length = len(sequences[index])
        own = length - (shared_tokens(sequences[groups[-1][-1]], sequences[index]) if groups else 0)
        if groups and tokens + own <= max_tokens and gathered + length <= _GATHERED * max_tokens:
            groups[-1].append(index)
            tokens, gathered = tokens + own, gathered + length
        else:
            groups.append([index])
            tokens = gathered = length
    return groups


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> Packing:
    """Pack sequences into one row.

    A sequence shares the tokens that it has in common with the start of the sequence before it, if they are many.

    Args:
        sequences: the token ids of each sequence, at least one token each.
    """
    paths: list[np.ndarray] = []
    starts: list[int] = []
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    last: Sequence[int] = ()
    total = 0
    for sequence in sequences:
        start, length = shared_tokens(last, sequence), len(sequence)
        own = np.arange(total, total + length - start)
        paths.append(np.concatenate([paths[-1][:start], own]) if start else own)
        starts.append(start)
        token_ids.extend(sequence[start:])
        positions.append(np.arange(start, length))
        total, last = total + length - start, sequence
    blocks, order = _blocks(paths, starts, total, device)
    position_ids = torch.from_numpy(np.concatenate(positions))[None].to(device)
    return Packing(torch.tensor([token_ids], device=device), position_ids, paths, blocks, order)


def _blocks(
    paths: list[np.ndarray], starts: list[int], total: int, device: torch.device | str
) -> tuple[list[Block], torch.Tensor]:
    """Put the sequences into blocks. Sequences that own no tokens are left out.

    Args:
        paths: as in `Packing`.
        starts: number of tokens of each sequence that sequences before it contain.
        total: L.
    Returns:
        (blocks, `Packing.order`).
    """
    blocks: list[Block] = []
    order, offset = np.empty(total, dtype=np.int64), 0
    for group in _groups([len(path) for path in paths], starts):
        rows = [paths[i][starts[i] :] for i in group]
        queries, keys = _padded(rows), _padded([paths[i] for i in group])
        for number, row in enumerate(rows):
            order[row] = offset + number * queries.shape[1] + np.arange(len(row))
        offset += queries.size
        causal = not any(starts[i] for i in group)
        whole = causal and queries.size == total and bool((queries.ravel() == np.arange(total)).all())
        firsts = np.array([starts[i] for i in group])
        moved = [torch.from_numpy(array).to(device) for array in (queries, keys, firsts)]
        blocks.append(Block(moved[0], moved[1], moved[2], causal, whole))
    return blocks, torch.from_numpy(order).to(device)


def _groups(lengths: list[int], starts: list[int]) -> list[list[int]]:
    """Return the indices of the sequences of each block. The arguments are those of `_blocks`."""
    owning = [i for i, length in enumerate(lengths) if length > starts[i]]
    if all(starts[i] == 0 and lengths[i] == lengths[owning[0]] for i in owning):
        return [owning]
    groups: list[list[int]] = []
    # Sequences that own all their tokens come first; then those with the most queries.
    for i in sorted(owning, key=lambda i: (starts[i] > 0, starts[i] - lengths[i], i)):
        first = groups[-1][0] if groups else i
        fits = (
            (starts[i] > 0) == (starts[first] > 0)
            and lengths[i] - starts[i] >= _SHORTEST * (lengths[first] - starts[first])
            and _SHORTEST * lengths[first] <= lengths[i] <= lengths[first] / _SHORTEST
        )
        if groups and fits:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Return the rows as one array, padded on the right with zeros."""
    out = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute the attention of one layer to a packed row. In `packed_mode`, the attention modules call this function.

    Args:
        module: the attention module.
        query: shape (1, H, L, d).
        key, value: shape (1, Hkv, L, d).
        attention_mask: ignored, because `packing` determines which tokens a query attends to.
        scaling: factor of the attention scores; None means d ** -0.5.
        softcap: if given, each score s is replaced by softcap * tanh(s / softcap).
        sliding_window: number of most recent tokens that a query may attend to; None means all tokens.
        s_aux: attention sinks, which are not supported.
    Returns:
        (attention output of shape (1, L, H, d), None in place of attention weights).
    Raises:
        TypeError: if `s_aux` is given.
    """
    if s_aux is not None:
        raise TypeError("attention to packed rows does not support attention sinks")
    packing.windowed |= sliding_window is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # (L, heads, d)
    outs = []
    for block in packing.blocks:
        q, k, v = (
            _taken(row, block, index) for row, index in zip(rows, (block.queries, block.keys, block.keys), strict=True)
        )
        outs.append(_attend(block, q, k, v, scale, softcap, sliding_window).transpose(1, 2).flatten(0, 1))
    if len(outs) == 1 and packing.blocks[0].whole:
        return outs[0][None], None
    out = torch.cat(outs)  # (queries of all blocks, H, d)
    return F.embedding(packing.order, out.flatten(1)).view(1, -1, *out.shape[1:]), None


def _taken(rows: torch.Tensor, block: Block, index: torch.Tensor) -> torch.Tensor:
    """Return the queries, keys or values of a block, of shape (R, heads, Q or K, d), from those of the packed row."""
    if block.whole:
        return rows.reshape(*index.shape, *rows.shape[1:]).transpose(1, 2)
    # The gradient of F.embedding is several times as fast as that of an indexed tensor. Only padded queries attend to
    # padded keys, and no output of a padded query is used, so that the gradient of padding is 0.
    taken = F.embedding(index, rows.flatten(1))  # (R, Q or K, heads * d)
    return taken.view(*index.shape, *rows.shape[1:]).transpose(1, 2)


def _attend(
    block: Block,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Return the attention of the queries of a block, shape (R, H, Q, d).

    Args:
        query: shape (R, H, Q, d).
        key, value: shape (R, Hkv, K, d).
    """
    groups = query.shape[1] // key.shape[1]
    causal = block.causal and (window is None or window >= key.shape[2])
    if softcap is None:
        bias = None if causal else block.bias(window, query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))  # (R, H, Q, K)
    return (scores + block.bias(window, query.dtype)).float().softmax(-1).to(value.dtype) @ value


@contextlib.contextmanager
def attention_mode(model: Any, name: str) -> Iterator[None]:
    """Context manager in which a model uses another function of the attention interface of transformers.

    The backward pass must be in the context too, because gradient checkpointing computes layers again.

    Args:
        name: name of the function in the attention interface.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def packed_mode(model: Any) -> contextlib.AbstractContextManager[None]:
    """Context manager in which every call of the model needs the argument `packing`. See `attention_mode`."""
    return attention_mode(model, NAME)


_SUPPORTED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""The results of `packing_supported`."""


def packing_supported(model: Any) -> bool:
    """Return whether the next-token distributions of a packed row are those of the padded sequences.

    Full attention and sliding-window attention are supported. Not supported are layers with another state than keys and
    values (convolutions, recurrences), chunked attention, attention sinks, and models that pass a sliding window to the
    attention only as part of the attention mask. Some unsupported models are recognised by their configuration. For the
    others, the distributions of short sequences are compared. The answer is stored for each model.
    """
    if model not in _SUPPORTED:
        _SUPPORTED[model] = _tried(model)
    return _SUPPORTED[model]


@torch.no_grad()
def _tried(model: Any) -> bool:
    """Compute the result of `packing_supported`."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    # Whether some layers have a sliding window according to the configuration.
    windowed = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    if not getattr(model, "_supports_attention_backend", False) or kinds - {"full_attention", "sliding_attention"}:
        return False
    device = next(model.parameters()).device
    sequences = [tuple(token % config.vocab_size for token in sequence) for sequence in _TRIAL]
    packing = pack(sequences, device)
    try:
        with packed_mode(model):
            packed = model(
                input_ids=packing.token_ids, position_ids=packing.position_ids, use_cache=False, packing=packing
            ).logits[0]  # (L, V)
    except (RuntimeError, TypeError):
        return False
    limit = _TRIAL_DISTANCE if packed.element_size() >= 4 else _TRIAL_DISTANCE_ROUNDED
    for sequence, path in zip(sequences, packing.paths, strict=True):
        expected = model(input_ids=torch.tensor([sequence], device=device), use_cache=False).logits[0]  # (T, V)
        distances = (packed[path].float().softmax(-1) - expected.float().softmax(-1)).abs().sum(-1) / 2  # (T,)
        if not bool(distances.max() < limit):
            return False
    # The sequences are shorter than any sliding window, so the distances do not show whether the windows are applied.
    # Therefore the windows that the configuration describes must also have been passed to the attention.
    return packing.windowed == windowed


AttentionInterface.register(NAME, packed_attention)
