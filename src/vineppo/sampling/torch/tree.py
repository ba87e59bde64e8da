"""Attention over a tree of keys and values. The tree has trunks, which many rows share, and one branch per row.

A row is a sequence that is being decoded. A trunk is a token sequence whose keys and values are computed once; the
prefix of every row is a prefix of one trunk. The branch of a row holds the keys and values of the tokens sampled for
it. Attention to the trunk and to the branch is computed separately and combined exactly by means of the log-sum-exps,
so the keys of a trunk are read once for all its rows and are never copied per row.

The attention is registered in transformers' attention interface, so it works with the unchanged modules of any
architecture that uses this interface.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "vineppo_tree"
_TRIAL_TOKENS = 8
_TRIAL_DISTANCE = 0.05
"""Largest accepted total variation distance between next-token distributions in float32: above the effect of rounding,
below that of a wrong attention."""
_TRIAL_DISTANCE_ROUNDED = 0.3
"""The same limit for 16-bit weights. For SmolLM2-135M the distance is below 1e-6 in float32 and 0.10 in bfloat16."""


class KVTree:
    """Keys and values of one wave: M trunks, and B rows in the order of their trunks.

    Shapes per layer: trunks (M, Hkv, L, d); branches (B, Hkv, capacity, d), of which the first `length` tokens are
    used. Attention to the trunks needs the same number of rows per trunk, so the queries of the rows are copied into a
    tensor of M x R places, with R the largest number of rows of one trunk; some of the places may be empty.
    """

    def __init__(
        self, trunk_of: torch.Tensor, prefix_lengths: torch.Tensor, trunk_length: int, branch_limit: int = 1 << 30
    ):
        """Create a tree without keys and values.

        Args:
            trunk_of: index of the trunk of each row, ascending, every trunk at least once, shape (B,).
            prefix_lengths: number of tokens of its trunk that each row uses, shape (B,).
            trunk_length: L.
            branch_limit: maximum number of tokens of a branch, which limits the allocated memory.
        """
        self.trunk_keys: dict[int, torch.Tensor] = {}
        self.trunk_values: dict[int, torch.Tensor] = {}
        self.branch_keys: dict[int, torch.Tensor] = {}
        self.branch_values: dict[int, torch.Tensor] = {}
        self.length = 0
        self.trunk_length, self.branch_limit = trunk_length, branch_limit
        self.windowed = False
        self._set_rows(trunk_of, prefix_lengths)

    def _set_rows(self, trunk_of: torch.Tensor, prefix_lengths: torch.Tensor) -> None:
        self.trunk_of, self.prefix_lengths = trunk_of, prefix_lengths
        counts = trunk_of.bincount()  # (M,)
        first = counts.cumsum(0) - counts
        M, R = len(counts), int(counts.max())
        self.places = trunk_of * R + torch.arange(len(trunk_of), device=trunk_of.device) - first[trunk_of]  # (B,)
        # An empty place attends to one token of its trunk, because a softmax over no tokens would be nan.
        self.lengths_by_place = prefix_lengths.new_ones(M * R).index_copy(0, self.places, prefix_lengths).view(M, R)
        self._bias: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def to_places(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy one entry per row, shape (B, ...), to the places of the trunks, (M, R, ...); empty places are 0."""
        M, R = self.lengths_by_place.shape
        spread = tensor.new_zeros(M * R, *tensor.shape[1:]).index_copy(0, self.places, tensor)
        return spread.view(M, R, *tensor.shape[1:])

    def from_places(self, tensor: torch.Tensor) -> torch.Tensor:
        """Invert `to_places`: return one entry per row, (B, ...), from the places of the trunks, (M, R, ...)."""
        return tensor.flatten(0, 1)[self.places]

    def trunk_bias(self, groups: int, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """Return the attention bias of the trunk tokens, shape (M, 1, R * groups, L).

        The bias is 0 for tokens that a row may attend to, and -inf for others. It is cached until rows are removed.
        With a sliding window it is not cached, because the window moves with every token.

        Args:
            groups: number of query heads per key head.
            window: size of the sliding window, or None.
        """
        if window is None and (groups, dtype) in self._bias:
            return self._bias[groups, dtype]
        columns = torch.arange(self.trunk_length, device=self.lengths_by_place.device)  # (L,)
        lengths = self.lengths_by_place[:, :, None]  # (M, R, 1)
        visible = columns < lengths  # (M, R, L)
        if window is not None:
            visible &= columns > lengths + self.length - window
        M, R, L = visible.shape
        visible = visible[:, None, :, None].expand(M, 1, R, groups, L).reshape(M, 1, R * groups, L)
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
        if window is None:
            self._bias[groups, dtype] = bias
        return bias

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the given rows, shape (B',), ascending, and the trunks that they use."""
        trunks, trunk_of = self.trunk_of[rows].unique(return_inverse=True)
        prefix_lengths = self.prefix_lengths[rows]
        longest = int(prefix_lengths.max())
        if len(trunks) < len(self.lengths_by_place) or longest < self.trunk_length:
            for store in (self.trunk_keys, self.trunk_values):
                for layer, tensor in store.items():
                    store[layer] = tensor[trunks, :, :longest].contiguous()
            self.trunk_length = longest
        for store in (self.branch_keys, self.branch_values):
            for layer, tensor in store.items():
                kept = tensor.new_empty(len(rows), *tensor.shape[1:])
                kept[:, :, : self.length] = tensor[rows, :, : self.length]
                store[layer] = kept
        self._set_rows(trunk_of, prefix_lengths)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the key and value of one token, each (B, Hkv, 1, d), to the branches; return the whole branches."""
        for store, tensor in ((self.branch_keys, key), (self.branch_values, value)):
            branch = store.get(layer)
            if branch is None:
                branch = tensor.new_empty(*tensor.shape[:2], min(32, self.branch_limit), tensor.shape[3])
            if self.length == branch.shape[2]:
                added = min(self.length, self.branch_limit - self.length)
                branch = torch.cat([branch, branch.new_empty(*branch.shape[:2], added, branch.shape[3])], dim=2)
            branch[:, :, self.length] = tensor[:, :, 0]
            store[layer] = branch
        used = self.length + 1
        return self.branch_keys[layer][:, :, :used], self.branch_values[layer][:, :, :used]


def tree_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: KVTree,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention in place of transformers' functions: query (B, H, q, d), key and value (B, Hkv, q, d).

    The result has the shape (B, q, H, d). In the first call for a layer the sequences of the batch are the trunks, and
    the attention is causal. In every later call they are the rows, with one new token each (q = 1).

    Raises:
        TypeError: if the model has attention sinks (`s_aux`), which are not supported.
    """
    if s_aux is not None:
        raise TypeError("tree attention does not support attention sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = module.layer_idx
    tree.windowed |= sliding_window is not None
    if layer not in tree.trunk_keys:
        tree.trunk_keys[layer], tree.trunk_values[layer] = key, value
        out = _prefill_attention(query, key, value, scale, softcap, sliding_window)
    else:
        keys, values = tree.append(layer, key, value)
        out = _decode_attention(tree, layer, query, keys, values, scale, softcap, sliding_window)
    return out.transpose(1, 2), None


def _prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute causal attention within the trunks."""
    groups = query.shape[1] // key.shape[1]
    if softcap is None and window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)
    length = query.shape[2]
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]  # (T, T)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    bias = torch.zeros(length, length, dtype=query.dtype, device=query.device).masked_fill_(~visible, float("-inf"))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return _attend(query, key, value, bias, scale, softcap)[0]


def _decode_attention(
    tree: KVTree,
    layer: int,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """Compute the attention of one query per row to the row's trunk and branch."""
    B, H, _, d = query.shape
    M, R = tree.lengths_by_place.shape
    Hkv = keys.shape[1]
    g = H // Hkv
    query = query.view(B, Hkv, g, d)
    # All rows of a trunk and all query heads of a key head are the rows of one matrix product.
    by_trunk = tree.to_places(query).transpose(1, 2).reshape(M, Hkv, R * g, d)
    bias = tree.trunk_bias(g, query.dtype, window)
    plain = softcap is not None or window is not None or query.device.type != "cpu"
    attend = _attend if plain else _attend_fused
    out_trunk, lse_trunk = attend(by_trunk, tree.trunk_keys[layer], tree.trunk_values[layer], bias, scale, softcap)
    out_trunk = tree.from_places(out_trunk.view(M, Hkv, R, g, d).transpose(1, 2))  # (B, Hkv, g, d)
    lse_trunk = tree.from_places(lse_trunk.view(M, Hkv, R, g, 1).transpose(1, 2))  # (B, Hkv, g, 1)
    if window is not None and keys.shape[2] > window:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    # With one query per head and row the fused kernel is slower than batched products, by a fifth to two thirds.
    out_branch, lse_branch = _attend(query, keys, values, None, scale, softcap)
    weight = torch.sigmoid(lse_trunk - lse_branch.unsqueeze(-1))  # (B, Hkv, g, 1), float32
    return (out_branch + weight * (out_trunk - out_branch)).to(query.dtype).view(B, H, 1, d)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax attention (..., q, d) and the log-sum-exp of the scores (..., q) in float32.

    For a query that may attend to no key, they are 0 and -inf.
    """
    scores = ((query * scale) @ key.transpose(-1, -2)).float()  # (..., q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores += bias
    highest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)  # (..., q, 1)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)  # (..., q, 1)
    out = (weights.to(value.dtype) @ value) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return out, (highest + total.log()).squeeze(-1)


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    _softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same as `_attend` with PyTorch's fused CPU kernel, which does not store the scores."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    return out, lse


@contextlib.contextmanager
def tree_mode(model: Any) -> Iterator[None]:
    """Context manager in which the model uses tree attention instead of its configured implementation."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@torch.no_grad()
def tree_supported(model: Any) -> bool:
    """Return whether decoding with tree attention gives the same next-token distributions as the model's forward pass.

    Tree attention supports full and sliding-window attention. It does not support layers with
    another state (convolutions, recurrences), chunked attention, attention sinks, and windows that only the attention
    mask contains.
    Some of these are visible in the configuration; the others are detected by comparing the distributions on a few
    tokens.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    if not getattr(model, "_supports_attention_backend", False) or kinds - {"full_attention", "sliding_attention"}:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(_TRIAL_TOKENS, device=device)[None] % config.vocab_size  # (1, T)
    one_row = torch.zeros(1, dtype=torch.int64, device=device)
    tree = KVTree(one_row, one_row + _TRIAL_TOKENS - 2, _TRIAL_TOKENS - 2)
    try:
        with tree_mode(model):
            model(input_ids=ids[:, :-2], use_cache=False, tree=tree)
            for position in range(_TRIAL_TOKENS - 2, _TRIAL_TOKENS):
                place = torch.tensor([[position]], device=device)  # (1, 1)
                decoded = model(input_ids=ids[:, place[0]], position_ids=place, use_cache=False, tree=tree).logits
                tree.length += 1
    except (RuntimeError, TypeError):
        return False
    expected = model(input_ids=ids, use_cache=False).logits  # (1, T, V)
    distance = (expected[0, -1].float().softmax(-1) - decoded[0, -1].float().softmax(-1)).abs().sum() / 2
    limit = _TRIAL_DISTANCE if expected.dtype == torch.float32 else _TRIAL_DISTANCE_ROUNDED
    return bool(distance < limit) and tree.windowed == windowed


AttentionInterface.register(NAME, tree_attention)
