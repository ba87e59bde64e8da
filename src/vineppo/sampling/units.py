"""Cut requests into units: the requests that are sampled in one batch, whatever the number of workers.

The rounding of a matrix product depends on the size of the batch. A sampler that decodes all requests of a call in one
batch therefore gives other bits as soon as the requests are divided among several workers. A unit depends on the
requests and on two limits only. So the bits are the same for any number of workers, whichever worker samples a unit.

A unit keeps requests together that share a prefix (a trunk, sampling/trunks.py), because the keys and values of the
prefix are then computed once. A trunk with more rows than a unit may have is divided into several units of one family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from vineppo.sampling.trunks import Trunk, trunks_of
from vineppo.types import SampleRequest, UserError


@dataclass(frozen=True)
class Part:
    """Consecutive samples of one request, which belong to a unit."""

    index: int
    """Index of the request among all requests of the call."""
    first: int
    """Index of the first of the samples among the samples of the request, counted from 0."""
    request: SampleRequest
    """The request for these samples alone."""


@dataclass(frozen=True)
class Unit:
    """Requests that are sampled in one batch. They have the same temperature and stop strings."""

    parts: tuple[Part, ...]
    """The samples of the unit, in ascending order of requests and samples."""
    family: int
    """Number of the trunk with the most rows. It is best that one worker samples the units of a family."""
    cost: int
    """Maximum number of tokens that are computed for the unit: the trunks, and the budgets of the rows."""

    @property
    def requests(self) -> list[SampleRequest]:
        """The requests to sample."""
        return [part.request for part in self.parts]


def cut(requests: Sequence[SampleRequest], max_rows: int, kv_tokens: int, memory: str) -> list[Unit]:
    """Cut requests into units. Every sample that has new tokens belongs to exactly one unit.

    Args:
        max_rows: maximum number of samples of a unit.
        kv_tokens: limit on the keys and values of a unit in tokens, see `waves_of`.
        memory: name of the setting that limits the keys and values, for the error message.
    Raises:
        UserError: if the keys and values of a single sequence exceed the limit.
    """
    units: list[Unit] = []
    families: dict[tuple[int, ...], int] = {}
    for indices in equally_sampled(requests):
        trunks = [trunk for trunk in trunks_of(requests, indices) if trunk.rows]
        for wave in waves_of(trunks, max_rows, kv_tokens, memory):
            family = families.setdefault(wave[0].token_ids, len(families))
            cost = sum(len(trunk.token_ids) + sum(row.budget for row in trunk.rows) for trunk in wave)
            units.append(Unit(_parts(requests, wave), family, cost))
    return units


def _parts(requests: Sequence[SampleRequest], wave: Sequence[Trunk]) -> tuple[Part, ...]:
    """Return the parts of requests whose samples are the rows of a wave."""
    rows = sorted((row.request, row.sample) for trunk in wave for row in trunk.rows)
    # The difference between the sample and its place in the list is constant over consecutive samples of a request.
    runs = groupby(enumerate(rows), key=lambda item: (item[1][0], item[1][1] - item[0]))
    parts = []
    for _, run in runs:
        samples = [row for _, row in run]
        index, first = samples[0]
        request = requests[index]
        part = replace(request, num_samples=len(samples), first_sample=request.first_sample + first)
        parts.append(Part(index, first, part))
    return tuple(parts)


def equally_sampled(requests: Sequence[SampleRequest]) -> list[list[int]]:
    """Return the indices of the requests in groups with equal temperature and stop strings.

    Only requests of the same group may be decoded in one batch.
    """
    groups: dict[tuple[float, tuple[str, ...]], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault((request.temperature, request.stop), []).append(i)
    return list(groups.values())


def waves_of(
    trunks: Sequence[Trunk], max_rows: int, kv_tokens: int, memory: str = "rollouts.kv_memory"
) -> Iterator[list[Trunk]]:
    """Divide the trunks into waves, and yield each wave as a list of trunks. A wave is decoded in one batch.

    The trunks of a wave have similar numbers of rows, so that the tree of the PyTorch sampler (`KVTree`) has few empty
    places. A trunk whose rows do not fit into one wave is first divided into several trunks.

    Args:
        max_rows: maximum number of rows of a wave.
        kv_tokens: limit on the size of a wave in tokens. The size is (number of trunks x length of the longest trunk) +
            (number of rows x largest budget).
        memory: name of the setting that limits the size, for the error message.
    Raises:
        UserError: if a single sequence exceeds the limit.
    """
    pieces = [piece for trunk in trunks for piece in _pieces(trunk, max_rows, kv_tokens, memory)]
    pieces.sort(key=lambda piece: -len(piece.rows))
    wave: list[Trunk] = []
    for piece in pieces:
        if wave and not _fits([*wave, piece], max_rows, kv_tokens):
            yield wave
            wave = []
        wave.append(piece)
    if wave:
        yield wave


def _pieces(trunk: Trunk, max_rows: int, kv_tokens: int, memory: str) -> Iterator[Trunk]:
    """Yield copies of a trunk with parts of its rows, such that each copy fits into one wave.

    Raises:
        UserError: if not even the trunk with one row fits.
    """
    length, budget = len(trunk.token_ids), trunk.budget
    size = min(max_rows, (kv_tokens - length) // budget)
    if size < 1:
        raise UserError(
            f"a prefix of {length} tokens with {budget} new tokens needs keys and values of {length + budget} tokens, "
            f"but {memory} holds {kv_tokens}; raise {memory} or lower rollouts.max_new_tokens"
        )
    for start in range(0, len(trunk.rows), size):
        yield Trunk(trunk.token_ids, trunk.rows[start : start + size])


def _fits(wave: Sequence[Trunk], max_rows: int, kv_tokens: int) -> bool:
    """Return whether the trunks fit into one wave. The limits have the same meaning as in `waves_of`."""
    rows = sum(len(trunk.rows) for trunk in wave)
    trunks = len(wave) * max(len(trunk.token_ids) for trunk in wave)
    return rows <= max_rows and trunks + rows * max(trunk.budget for trunk in wave) <= kv_tokens
