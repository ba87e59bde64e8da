"""Tree attention: attention for decoding many sequences that share prefixes. `KVTree` in tree.py explains the terms.

The attention of a row to its trunk and to its branch is computed separately. The two results are then combined exactly
by means of their log-sum-exps (the logarithms of the softmax denominators). Therefore the keys and values of a trunk
are read once for all its rows, and are not copied for each row.

Tree attention is registered in the attention interface of transformers, so it works with the unchanged modules of any
architecture that uses this interface.

Letters in shapes: M trunks, L tokens of the longest trunk, B rows, R rows of the trunk with the most rows, H query
heads, Hkv key-value heads, d dimensions of a head, q queries, k keys, T tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from vineppo.model.packing import attention_mode
from vineppo.sampling.torch.tree import KVTree

NAME = "vineppo_tree"
"""Name of tree attention in the attention interface of transformers."""
_TRIAL_TOKENS = 8
"""Number of tokens of the test sequence of `tree_supported`."""
_TRIAL_DISTANCE = 0.05
"""Largest total variation distance between two next-token distributions that `tree_supported` accepts in float32. The
effect of rounding is smaller, and the effect of a wrong attention is larger."""
_TRIAL_DISTANCE_ROUNDED = 0.3
"""The same limit for 16-bit weights. As an example, the distance for SmolLM2-135M is below 1e-6 in float32 and 0.10 in
bfloat16."""


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
    """Compute the attention of one layer. In `tree_mode`, the attention modules of transformers call this function.

    In the first call for a layer, the sequences are the trunks: the first dimension is M, q is L, the attention is
    causal, and the keys and values are stored in the tree. In every later call, the sequences are the rows, with one
    new token each (q = 1).

    Args:
        module: the attention module; only its `layer_idx` is used.
        query: shape (B, H, q, d).
        key, value: shape (B, Hkv, q, d).
        attention_mask: ignored, because the tree determines which tokens a query may attend to.
        tree: the keys and values. They are extended by those of the new tokens.
        scaling, softcap, sliding_window, s_aux: as for `model.packing.packed_attention`.
    Returns:
        (attention output of shape (B, q, H, d), None in place of attention weights).
    Raises:
        TypeError: if `s_aux` is given.
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
    """Return the causal attention within the trunks, shape (M, H, L, d).

    Args:
        query: shape (M, H, L, d).
        key, value: shape (M, Hkv, L, d).
    """
    groups = query.shape[1] // key.shape[1]
    if softcap is None and window is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)
    length = query.shape[2]
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position[None, :]  # (L, L)
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
    """Return the attention of one query per row to the row's trunk and branch, shape (B, H, 1, d).

    Args:
        query: queries of the new tokens, shape (B, H, 1, d).
        keys, values: keys and values of the branches, including the new tokens, shape (B, Hkv, k, d).
    """
    B, H, _, d = query.shape
    M, R = tree.lengths_by_place.shape
    Hkv = keys.shape[1]
    g = H // Hkv  # number of query heads per key-value head
    query = query.view(B, Hkv, g, d)
    # The queries of all rows of a trunk, and of all query heads of a key-value head, form one matrix.
    by_trunk = tree.to_places(query).transpose(1, 2).reshape(M, Hkv, R * g, d)
    bias = tree.trunk_bias(g, query.dtype, window)
    attend = _trunk_attention(query, softcap, window)
    out_trunk, lse_trunk = attend(by_trunk, tree.trunk_keys[layer], tree.trunk_values[layer], bias, scale, softcap)
    out_trunk = tree.from_places(out_trunk.view(M, Hkv, R, g, d).transpose(1, 2))  # (B, Hkv, g, d)
    lse_trunk = tree.from_places(lse_trunk.reshape(M, Hkv, R, g, 1).transpose(1, 2))  # (B, Hkv, g, 1)
    if window is not None and keys.shape[2] > window and not tree.fixed:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    attend = _branch_attention(query, softcap)
    out_branch, lse_branch = attend(query, keys, values, tree.branch_bias(query.dtype, window), scale, softcap)
    # The trunk's share of the softmax over all tokens.
    weight = torch.sigmoid(lse_trunk - lse_branch.unsqueeze(-1))  # (B, Hkv, g, 1), float32
    return (out_branch + weight * (out_trunk - out_branch)).to(query.dtype).view(B, H, 1, d)


Attention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float, float | None],
    tuple[torch.Tensor, torch.Tensor],
]
"""The functions `_attend`, `_attend_on_cpu` and `_attend_on_cuda`."""


def _trunk_attention(query: torch.Tensor, softcap: float | None, window: int | None) -> Attention:
    """Return the function for the attention to the trunks."""
    # PyTorch's fused kernels do not support softcap. For a query that may attend to no token, the one for the CPU
    # returns a log-sum-exp of 0 instead of -inf. This happens with a sliding window when a branch is longer than the
    # window.
    if softcap is not None or window is not None:
        return _attend
    if query.device.type == "cpu":
        return _attend_on_cpu
    return _attend_on_cuda if fused_on_cuda(query.device, query.dtype, query.shape[-1]) else _attend


def _branch_attention(query: torch.Tensor, softcap: float | None) -> Attention:
    """Return the function for the attention to the branches.

    Every row has a separate branch, so there is one query per head and row. In float32 on a CPU, the fused kernel is
    slower than batched matrix products for so few queries, by a fifth to two thirds. In 16 bits, `_attend` first copies
    the keys to float32, which the fused kernels do not need.
    """
    if softcap is not None or (query.device.type == "cpu" and query.dtype == torch.float32):
        return _attend
    if query.device.type == "cpu":
        return _attend_on_cpu
    return _attend_on_cuda if fused_on_cuda(query.device, query.dtype, query.shape[-1]) else _attend


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention, and the log-sum-exp of the attention scores of each query.

    Args:
        query: shape (..., q, d).
        key, value: shape (..., k, d).
        bias: numbers that are added to the scores, of a shape that broadcasts to (..., q, k), or None.
        scale: factor of the scores.
        softcap: if given, each score s is replaced by softcap * tanh(s / softcap).
    Returns:
        (output of shape (..., q, d), log-sum-exps of shape (..., q) in float32). For a query whose bias is -inf for all
        keys, they are 0 and -inf.
    """
    # A product of 16-bit matrices would be rounded to 16 bits before the softmax, with up to 4 times the error.
    scores = (query.float() * scale) @ key.float().transpose(-1, -2)  # (..., q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores += bias
    # If all scores are -inf, their maximum is replaced by a finite number, because -inf - -inf would be nan.
    highest = scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)  # (..., q, 1)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)  # (..., q, 1)
    out = (weights.to(value.dtype) @ value) / total.clamp_min(torch.finfo(torch.float32).tiny)
    return out, (highest + total.log()).squeeze(-1)


def _attend_on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    _softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same as `_attend` without softcap, with PyTorch's fused CPU kernel, which does not store the scores.

    Every query must have at least one key with a finite bias.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=bias, scale=scale
    )
    return out, lse


def _attend_on_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    _softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same as `_attend` without softcap, with PyTorch's memory-efficient CUDA kernel.

    It is the one of PyTorch's kernels that takes a bias and returns log-sum-exps. It returns them for a multiple of 32
    queries.
    """
    q, k = query.shape[2], key.shape[2]
    wide = None if bias is None else bias.expand(*query.shape[:2], q, k)
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, wide, True, scale=scale)
    return out, lse[..., :q]


@functools.cache
def fused_on_cuda(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Return whether a device has PyTorch's memory-efficient kernel, and whether its results are those of `_attend`.

    Both are tried with random numbers, with and without a bias, once per device, dtype and dimension of a head. The
    result is False if a log-sum-exp or an output differs by more than the rounding of the dtype explains, for example
    because the kernel multiplies float32 numbers with fewer bits.
    """
    if device.type != "cuda":
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key, value = random(3, 2, 35, dim), random(3, 2, 45, dim), random(3, 2, 45, dim)
    lengths = torch.arange(1, 3 * 35 + 1, device=device).view(3, 1, 35, 1) % 45 + 1
    hidden = torch.arange(48, device=device) >= lengths  # (3, 1, 35, 48)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))[..., :45]
    limit = 2e-5 if dtype == torch.float32 else 0.02
    try:
        for some in (None, bias):
            fused, plain = (f(query, key, value, some, dim**-0.5, None) for f in (_attend_on_cuda, _attend))
            if max(float((a.float() - b.float()).abs().max()) for a, b in zip(fused, plain, strict=True)) > limit:
                return False
    except (RuntimeError, NotImplementedError):
        return False
    return True


def tree_mode(model: Any) -> contextlib.AbstractContextManager[None]:
    """Context manager in which a model uses tree attention instead of its configured attention implementation.

    In the context, every call of the model needs the argument `tree`, a `KVTree`.
    """
    return attention_mode(model, NAME)


@torch.no_grad()
def tree_supported(model: Any) -> bool:
    """Return whether decoding with tree attention gives the same next-token distributions as the model's forward pass.

    Tree attention supports full attention and sliding-window attention. It does not support layers with a state other
    than keys and values (convolutions, recurrences), chunked attention, attention sinks, and models that pass a sliding
    window to the attention only as part of the attention mask. Some unsupported models are recognised by their
    configuration. For the others, the last tokens of a short sequence are decoded with tree attention, and the
    resulting distribution is compared with that of the normal forward pass.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    # Whether some layers have a sliding window according to the configuration.
    windowed = "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
    if not getattr(model, "_supports_attention_backend", False) or kinds - {"full_attention", "sliding_attention"}:
        return False
    device = next(model.parameters()).device
    ids = torch.arange(_TRIAL_TOKENS, device=device)[None] % config.vocab_size  # (1, T)
    one_row = torch.zeros(1, dtype=torch.int64, device=device)
    tree = KVTree(one_row, one_row + _TRIAL_TOKENS - 2, _TRIAL_TOKENS - 2)
    # The last two tokens are decoded one at a time; the tokens before them are the prefix.
    try:
        with tree_mode(model):
            model(input_ids=ids[:, :-2], use_cache=False, tree=tree)
            for position in range(_TRIAL_TOKENS - 2, _TRIAL_TOKENS):
                place = torch.tensor([[position]], device=device)  # (1, 1)
                tree.begin_step()
                decoded = model(input_ids=ids[:, place[0]], position_ids=place, use_cache=False, tree=tree).logits
                tree.length += 1
    except (RuntimeError, TypeError):
        return False
    expected = model(input_ids=ids, use_cache=False).logits  # (1, T, V)
    distance = (expected[0, -1].float().softmax(-1) - decoded[0, -1].float().softmax(-1)).abs().sum() / 2
    # The sequence is shorter than any sliding window, so the distance does not show whether the windows are applied.
    # Therefore the windows that the configuration describes must also have been passed to tree attention.
    limit = _TRIAL_DISTANCE if expected.dtype == torch.float32 else _TRIAL_DISTANCE_ROUNDED
    return bool(distance < limit) and tree.windowed == windowed


AttentionInterface.register(NAME, tree_attention)
