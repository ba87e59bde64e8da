"""The keys and values of sequences that share prefixes, for tree attention (attention.py).

Terms used in this module:

- A *row* is one sequence that is being decoded: a prefix and the tokens sampled so far.
- A *trunk* is a token sequence whose keys and values are computed once. The prefix of a row consists of the first
  tokens of a trunk, and many rows can share a trunk.
- The *branch* of a row holds the keys and values of the tokens that were sampled for the row.

Letters in shapes: M trunks, L tokens of the longest trunk, B rows, R rows of the trunk with the most rows, H query
heads, Hkv key-value heads, d dimensions of a head, q queries, k keys, T tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch

_FIRST_CAPACITY = 64
"""Smallest `capacity` of a fixed tree. It is doubled whenever the branches are full."""


class KVTree:
    """Keys and values of M trunks and of the branches of B rows. The rows are in the order of their trunks.

    For each layer of the model, the keys of the trunks have the shape (M, Hkv, L, d), and those of the branches
    (B, Hkv, capacity, d). Of the capacity, the first `length` tokens are used. The values have the same shapes.

    Attention to the trunks is one batched matrix product over the trunks, which needs the same number of rows for every
    trunk. Therefore the queries of the rows are copied into a tensor with R *places* for each trunk. A trunk with fewer
    than R rows has empty places.
    """

    def __init__(
        self,
        trunk_of: torch.Tensor,
        prefix_lengths: torch.Tensor,
        trunk_length: int,
        branch_limit: int = 1 << 30,
        fixed: bool = False,
    ):
        """Create a tree without keys and values.

        Args:
            trunk_of: index of the trunk of each row, shape (B,). The indices ascend, and every trunk occurs.
            prefix_lengths: for each row, the number of tokens of its trunk that are the prefix of the row, shape (B,).
            trunk_length: L, the number of tokens of the longest trunk.
            branch_limit: maximum number of tokens of a branch. The capacity of the branches does not exceed it.
            fixed: whether the tensors keep their addresses until rows are removed. The branches then have their full
                capacity from the start, and attention reads `capacity` tokens of them and hides the unused ones.
        """
        # Dictionaries from the index of a layer to a tensor.
        self.trunk_keys: dict[int, torch.Tensor] = {}
        self.trunk_values: dict[int, torch.Tensor] = {}
        self.branch_keys: dict[int, torch.Tensor] = {}
        self.branch_values: dict[int, torch.Tensor] = {}
        # Number of tokens in every branch. The caller increases it after each forward pass of the model.
        self.length = 0
        # The same number on the device, for a fixed tree; `end_step` increases it.
        self.end = trunk_of.new_zeros(1)
        self.trunk_length, self.branch_limit, self.fixed = trunk_length, branch_limit, fixed
        # Whether a layer has used sliding-window attention.
        self.windowed = False
        self._set_rows(trunk_of, prefix_lengths)

    def _set_rows(self, trunk_of: torch.Tensor, prefix_lengths: torch.Tensor) -> None:
        """Store the trunk and the prefix length of each row, both of shape (B,), and assign a place to each row."""
        self.trunk_of, self.prefix_lengths = trunk_of, prefix_lengths
        counts = trunk_of.bincount()  # (M,)
        first = counts.cumsum(0) - counts  # (M,): index of the first row of each trunk
        M, R = len(counts), int(counts.max())
        # The index of each row's place among all M * R places.
        self.places = trunk_of * R + torch.arange(len(trunk_of), device=trunk_of.device) - first[trunk_of]  # (B,)
        # For each place, the number of trunk tokens that its row may attend to. An empty place attends to one token,
        # because a softmax over no tokens may be nan.
        self.lengths_by_place = prefix_lengths.new_ones(M * R).index_copy(0, self.places, prefix_lengths).view(M, R)
        self._bias: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        # Numbers that change with every token: (name, window) -> tensor, for the layers of one step.
        self._moving: dict[tuple[str, int | None], torch.Tensor] = {}

    @property
    def capacity(self) -> int:
        """Number of tokens of each branch that attention reads in a fixed tree, the unused ones included."""
        return min(max(_FIRST_CAPACITY, 1 << self.length.bit_length()), self.branch_limit)

    def begin_step(self) -> None:
        """Prepare a forward pass for one token of each row."""
        self._moving = {}

    def end_step(self) -> None:
        """Note on the device that each branch has one token more."""
        self.end.add_(1)

    def to_places(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor with one entry per row to the places of the rows.

        Args:
            tensor: shape (B, ...).
        Returns:
            A tensor of shape (M, R, ...), which is 0 at empty places.
        """
        M, R = self.lengths_by_place.shape
        spread = tensor.new_zeros(M * R, *tensor.shape[1:]).index_copy(0, self.places, tensor)
        return spread.view(M, R, *tensor.shape[1:])

    def from_places(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy the entries at the places of the rows from a tensor of shape (M, R, ...), to the shape (B, ...)."""
        return tensor.flatten(0, 1)[self.places]

    def trunk_bias(self, groups: int, dtype: torch.dtype, window: int | None) -> torch.Tensor:
        """Return the numbers that are added to the attention scores of the trunk tokens, shape (M, 1, R * groups, L).

        The number is 0 for a token that the row at a place may attend to, and -inf for other tokens. Without a sliding
        window the result is cached until rows are removed. A sliding window moves with every token.

        Args:
            groups: number of query heads per key-value head.
            window: size of the sliding window in tokens, or None.
        """
        if window is None and (groups, dtype) in self._bias:
            return self._bias[groups, dtype]
        if ("trunk", window) in self._moving:
            return self._moving["trunk", window]
        columns = torch.arange(self.trunk_length, device=self.lengths_by_place.device)  # (L,)
        lengths = self.lengths_by_place[:, :, None]  # (M, R, 1)
        visible = columns < lengths  # (M, R, L)
        if window is not None:
            # The token that is being decoded has the position lengths + self.length.
            visible &= columns > lengths + (self.end if self.fixed else self.length) - window
        M, R, L = visible.shape
        visible = visible[:, None, :, None].expand(M, 1, R, groups, L).reshape(M, 1, R * groups, L)
        bias = _bias_of(visible, dtype)
        if window is None:
            self._bias[groups, dtype] = bias
        else:
            self._moving["trunk", window] = bias
        return bias

    def branch_bias(self, dtype: torch.dtype, window: int | None) -> torch.Tensor | None:
        """Return the numbers that are added to the attention scores of the branch tokens, shape (1, 1, 1, capacity).

        The result is None if the tree is not fixed: no branch has unused tokens then.

        Args:
            window: size of the sliding window in tokens, or None.
        """
        if not self.fixed:
            return None
        if ("branch", window) not in self._moving:
            columns = torch.arange(self.capacity, device=self.end.device)  # (capacity,)
            visible = columns <= self.end
            if window is not None:
                visible &= columns > self.end - window
            self._moving["branch", window] = _bias_of(visible[None, None, None], dtype)
        return self._moving["branch", window]

    def keep(self, rows: torch.Tensor) -> None:
        """Remove all rows except the given ones, and all trunks that no remaining row uses.

        Args:
            rows: indices of the B' rows to keep, ascending, shape (B',).
        """
        trunks, trunk_of = self.trunk_of[rows].unique(return_inverse=True)
        prefix_lengths = self.prefix_lengths[rows]
        longest = int(prefix_lengths.max())
        if len(trunks) < len(self.lengths_by_place) or longest < self.trunk_length:
            # The trunks are also cut to the longest prefix of a remaining row.
            for store in (self.trunk_keys, self.trunk_values):
                for layer, tensor in store.items():
                    store[layer] = tensor[trunks, :, :longest].contiguous()
            self.trunk_length = longest
        for store in (self.branch_keys, self.branch_values):
            for layer, tensor in store.items():
                create = tensor.new_zeros if self.fixed else tensor.new_empty
                kept = create(len(rows), *tensor.shape[1:])
                kept[:, :, : self.length] = tensor[rows, :, : self.length]
                store[layer] = kept
        self._set_rows(trunk_of, prefix_lengths)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of one token per row to the branches of a layer.

        Args:
            key, value: shape (B, Hkv, 1, d).
        Returns:
            (keys, values) of the branches with the new token, each of shape (B, Hkv, length + 1, d), or in a fixed tree
            (B, Hkv, capacity, d).
        """
        if self.fixed:
            return self._put(self.branch_keys, layer, key), self._put(self.branch_values, layer, value)
        for store, tensor in ((self.branch_keys, key), (self.branch_values, value)):
            branch = store.get(layer)
            if branch is None:
                branch = tensor.new_empty(*tensor.shape[:2], min(32, self.branch_limit), tensor.shape[3])
            if self.length == branch.shape[2]:
                # The capacity is doubled, but does not exceed the limit.
                added = min(self.length, self.branch_limit - self.length)
                branch = torch.cat([branch, branch.new_empty(*branch.shape[:2], added, branch.shape[3])], dim=2)
            branch[:, :, self.length] = tensor[:, :, 0]
            store[layer] = branch
        used = self.length + 1
        return self.branch_keys[layer][:, :, :used], self.branch_values[layer][:, :, :used]

    def _put(self, store: dict[int, torch.Tensor], layer: int, tensor: torch.Tensor) -> torch.Tensor:
        """Write the keys or values of one token per row into the branches of a fixed tree, and return the branches."""
        if layer not in store:
            # Unused tokens are multiplied by a weight of 0, so they must be finite.
            store[layer] = tensor.new_zeros(*tensor.shape[:2], self.branch_limit, tensor.shape[3])
        return store[layer].index_copy_(2, self.end, tensor)[:, :, : self.capacity]


def _bias_of(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where `visible`, of shape (..., k), is True, and -inf elsewhere.

    On a GPU, the memory of a row has a multiple of 8 numbers, as PyTorch's fused attention requires.
    """
    *shape, k = visible.shape
    room = -(-k // 8) * 8 if visible.device.type != "cpu" else k
    bias = torch.zeros(*shape, room, dtype=dtype, device=visible.device)[..., :k]
    return bias.masked_fill_(~visible, float("-inf"))
