"""Units depend on the requests and two limits only, and contain every sample once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vineppo.sampling.units import Part, Unit, cut
from vineppo.types import Draft, SampleRequest, UserError

LONG, SHORT, OTHER, GREEDY = (
    SampleRequest((1, 2, 3, 4), 3, 6, seed=11),
    SampleRequest((1, 2), 3, 8, seed=12, first_sample=10),
    SampleRequest((9, 9), 2, 5, seed=13),
    SampleRequest((1, 2), 1, 8, seed=14, temperature=0.0),
)


def test_units_keep_a_trunk_together_and_divide_one_that_is_too_large() -> None:
    units = cut([SHORT, LONG, OTHER, GREEDY], max_rows=4, kv_tokens=1000, memory="memory")
    # The trunk (1, 2, 3, 4) has six rows, those of the longer prefix first: four, then the other two with (9, 9).
    first = (
        Part(0, 0, SampleRequest((1, 2), 1, 8, seed=12, first_sample=10)),
        Part(1, 0, LONG),
    )
    second = (
        Part(0, 1, SampleRequest((1, 2), 2, 8, seed=12, first_sample=11)),
        Part(2, 0, OTHER),
    )
    assert units == [
        Unit(first, family=0, cost=4 + 3 * 6 + 8),
        Unit(second, family=1, cost=2 + 2 * 5 + 4 + 2 * 8),
        Unit((Part(3, 0, GREEDY),), family=2, cost=2 + 8),
    ]


def test_the_memory_limits_a_unit() -> None:
    # Two rows need 4 + 2 * 6 = 16 tokens, three 22.
    units = cut([LONG], max_rows=4, kv_tokens=21, memory="sampler.unit_memory")
    assert [[(p.first, p.request.num_samples) for p in unit.parts] for unit in units] == [[(0, 2)], [(2, 1)]]
    with pytest.raises(UserError, match=r"needs keys and values of 10 tokens, but sampler.unit_memory holds 9; raise"):
        cut([LONG], max_rows=4, kv_tokens=9, memory="sampler.unit_memory")


def test_empty_requests_are_in_no_unit() -> None:
    nothing = [SampleRequest((1,), 0, 5, seed=1), SampleRequest((1,), 2, 0, seed=2)]
    assert cut(nothing, max_rows=4, kv_tokens=100, memory="m") == []


def test_the_context_of_a_draft_has_no_rows() -> None:
    draft = Draft(context=(7, 8), token_ids=(1, 2), logprobs=(-1.0, -1.0))
    request = SampleRequest((1, 2), 3, 8, seed=1, draft=draft)
    (unit,) = cut([request], max_rows=8, kv_tokens=100, memory="m")
    assert unit.requests == [request]


REQUESTS = st.lists(
    st.builds(
        SampleRequest,
        prompt_ids=st.lists(st.integers(0, 1), min_size=1, max_size=5).map(tuple),
        num_samples=st.integers(0, 9),
        max_new_tokens=st.integers(0, 4),
        seed=st.integers(0, 1 << 40),
        first_sample=st.integers(0, 5),
        temperature=st.sampled_from([0.0, 1.0]),
        stop=st.sampled_from([(), ("x",)]),
    ),
    max_size=12,
)


@given(REQUESTS, st.integers(1, 6), st.integers(9, 60))
def test_every_sample_is_in_one_unit_within_the_limits(requests: list[SampleRequest], rows: int, kv: int) -> None:
    units = cut(requests, rows, kv, "m")
    expected = Counter(
        (i, r.seed, r.first_sample + j)
        for i, r in enumerate(requests)
        if r.max_new_tokens
        for j in range(r.num_samples)
    )
    found = Counter(
        (part.index, part.request.seed, part.request.first_sample + j)
        for unit in units
        for part in unit.parts
        for j in range(part.request.num_samples)
    )
    assert found == expected
    for unit in units:
        assert sum(r.num_samples for r in unit.requests) <= rows
        assert len({(r.temperature, r.stop) for r in unit.requests}) == 1
        for part in unit.parts:
            assert requests[part.index].first_sample + part.first == part.request.first_sample
            assert requests[part.index].prompt_ids == part.request.prompt_ids
    # A worker samples each unit in one batch: it does not divide it again.
    for unit in units:
        assert len(cut(unit.requests, rows, kv, "m")) == 1
