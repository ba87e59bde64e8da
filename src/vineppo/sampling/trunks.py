"""Divide requests into rows and trunks.

A *row* is one sample that is being decoded. A *trunk* is a token sequence whose keys and values are computed once. The
prefix of a row consists of the first tokens of a trunk, so rows with different prefixes can share a trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vineppo.types import Completion, SampleRequest


@dataclass(frozen=True)
class Row:
    """One sample that is being decoded."""

    request: int
    """Index of the sample's request among the requests that the sampler received."""
    sample: int
    """Index of the sample among the samples of the request, counted from 0."""
    prefix_length: int
    """Number of tokens of the row's prefix, which consists of the first tokens of the row's trunk."""
    budget: int
    """Maximum number of new tokens."""


@dataclass(frozen=True)
class Trunk:
    """A token sequence whose keys and values are computed once, and the rows whose prefixes are its first tokens."""

    token_ids: tuple[int, ...]
    rows: tuple[Row, ...]

    @property
    def budget(self) -> int:
        """The largest `budget` of the trunk's rows."""
        return max(row.budget for row in self.rows)


def trunks_of(requests: Sequence[SampleRequest], indices: Sequence[int]) -> list[Trunk]:
    """Return the trunks, with their rows, of the requests with the given indices.

    Every prefix becomes a trunk, except for a prefix with which a longer prefix begins. The rows of such a prefix use
    the trunk of the longer prefix.
    """
    rows_by_prefix: dict[tuple[int, ...], list[Row]] = {}
    for i in indices:
        request = requests[i]
        if request.max_new_tokens > 0:
            rows_by_prefix.setdefault(request.prompt_ids, []).extend(
                Row(i, j, len(request.prompt_ids), request.max_new_tokens) for j in range(request.num_samples)
            )
    trunks: list[tuple[tuple[int, ...], list[Row]]] = []
    # In descending order, a prefix comes directly after the longer prefixes that begin with it. Therefore comparing it
    # with the last trunk suffices.
    for ids in sorted((ids for ids, rows in rows_by_prefix.items() if rows), reverse=True):
        if not trunks or trunks[-1][0][: len(ids)] != ids:
            trunks.append((ids, []))
        trunks[-1][1].extend(rows_by_prefix[ids])
    return [Trunk(ids, tuple(rows)) for ids, rows in trunks]


def response_tail(request: SampleRequest, length: int) -> tuple[int, ...]:
    """Return the last ids of the part of the response that the request's prefix contains, at most `length` ids."""
    size = min(length, request.response_tokens)
    return request.prompt_ids[-size:] if size else ()


def stop_window(stop: Sequence[str]) -> int:
    """Return over how many tokens a stop string is spread at most: its bytes, as a token has at least one byte."""
    return max((len(text.encode()) for text in stop), default=0)


def has_stop(
    decode: Callable[[Sequence[int]], str], tail: Sequence[int], token_ids: Sequence[int], stop: Sequence[str]
) -> bool:
    """Return whether the end of a sequence contains a stop string.

    One token more than the window is decoded, because some decoders drop a space at the start of a text.

    Args:
        decode: function that converts token ids to text.
        tail: the last ids of the part of the response in the prefix (`response_tail`).
        token_ids: the sampled ids.
        stop: the stop strings.
    """
    text = decode((*tail, *token_ids)[-1 - stop_window(stop) :])
    return any(string in text for string in stop)


def empty_results(requests: Sequence[SampleRequest], version: int) -> list[list[Completion | None]]:
    """Return a list for the completions of each request. Those without new tokens are there already."""
    return [
        [None if request.max_new_tokens > 0 else Completion((), (), "length", version)] * request.num_samples
        for request in requests
    ]
