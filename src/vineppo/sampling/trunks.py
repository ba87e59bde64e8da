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
    first_position: int = 0
    """Position of the row's first new token, from which the positions of its random numbers are counted."""


@dataclass(frozen=True)
class Trunk:
    """A token sequence whose keys and values are computed once, and the rows whose prefixes are its first tokens."""

    token_ids: tuple[int, ...]
    rows: tuple[Row, ...]
    """The rows; none if the trunk is only the context of drafts."""
    drafts: tuple[int, ...] = ()
    """Indices of the requests whose drafts have their own context in this trunk: it begins with the context and the
    tokens of the draft, except for the draft's last token."""

    @property
    def budget(self) -> int:
        """The largest `budget` of the trunk's rows; 0 without rows."""
        return max((row.budget for row in self.rows), default=0)


def trunks_of(
    requests: Sequence[SampleRequest], indices: Sequence[int], first_positions: Sequence[int] = ()
) -> list[Trunk]:
    """Return the trunks, with their rows, of the requests with the given indices.

    Every prefix becomes a trunk, except for a prefix with which a longer prefix begins. The rows of such a prefix use
    the trunk of the longer prefix. The contexts of drafts are prefixes without rows.

    Args:
        first_positions: `Row.first_position` of the rows of each request in `requests`; empty: 0 for all.
    """
    rows_by_prefix: dict[tuple[int, ...], list[Row]] = {}
    drafts_by_prefix: dict[tuple[int, ...], list[int]] = {}
    for i in indices:
        request, first = requests[i], first_positions[i] if first_positions else 0
        if request.max_new_tokens == 0 or request.num_samples == 0:
            continue
        rows_by_prefix.setdefault(request.prompt_ids, []).extend(
            Row(i, j, len(request.prompt_ids), request.max_new_tokens, first) for j in range(request.num_samples)
        )
        length = draft_length(request)
        if request.draft is not None and length > 0:
            context = request.draft.context + request.draft.token_ids[: length - 1]
            drafts_by_prefix.setdefault(context, []).append(i)
    trunks: list[tuple[tuple[int, ...], list[Row], list[int]]] = []
    # In descending order, a prefix comes directly after the longer prefixes that begin with it. Therefore comparing it
    # with the last trunk suffices.
    for ids in sorted({*rows_by_prefix, *drafts_by_prefix}, reverse=True):
        if not trunks or trunks[-1][0][: len(ids)] != ids:
            trunks.append((ids, [], []))
        trunks[-1][1].extend(rows_by_prefix.get(ids, ()))
        trunks[-1][2].extend(drafts_by_prefix.get(ids, ()))
    return [Trunk(ids, tuple(rows), tuple(drafts)) for ids, rows, drafts in trunks]


def draft_length(request: SampleRequest) -> int:
    """Return how many tokens of its draft a completion can take at most; 0 without a draft.

    A draft that is longer than the completion may be is cut.
    """
    draft = request.draft
    return 0 if draft is None else max(0, min(len(draft.token_ids), request.max_new_tokens - draft.start))


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
