"""Drafts of requests in the form that the compiled engine reads, and the memory that they need."""

from __future__ import annotations

from collections.abc import Sequence

from vineppo.sampling.engine.families import EngineModel
from vineppo.sampling.engine.library import DraftTable, draft_table
from vineppo.sampling.trunks import Row, Trunk, draft_length
from vineppo.types import SampleRequest

_PANEL = 16
"""The engine rounds the width of a hidden state up to a multiple of this number, as in native/numbers.h."""


class Drafts:
    """The drafts of the requests of one call, and where their own contexts are.

    Args:
        requests: the requests.
        trunks: their trunks, from `trunks_of`.
        model: the model, for the sizes of its states.
    """

    def __init__(self, requests: Sequence[SampleRequest], trunks: Sequence[Trunk], model: EngineModel):
        self.requests, self.trunks, self.model = requests, trunks, model
        self._trunk_of = {i: t for t, trunk in enumerate(trunks) for i in trunk.drafts}
        # For each trunk with drafts, the positions [begin, end) whose hidden states are needed to compute a
        # distribution in a draft's own context.
        self._positions = {t: self._span(trunk.drafts) for t, trunk in enumerate(trunks) if trunk.drafts}

    def table(self, rows: Sequence[Row]) -> DraftTable | None:
        """Return the table of the drafts of the rows; None if there are none."""
        if not self._trunk_of:
            return None
        index_of = {request: index for index, request in enumerate(self._trunk_of)}
        places, tokens, logprobs = [], [], []
        for i, trunk in self._trunk_of.items():
            draft, length = self.requests[i].draft, draft_length(self.requests[i])
            assert draft is not None
            places.append((trunk, len(draft.context), draft.start))
            tokens.append(draft.token_ids[:length])
            logprobs.append(draft.logprobs[:length])
        return draft_table(places, tokens, logprobs, [index_of.get(row.request, -1) for row in rows])

    def bytes(self, index: int) -> int:
        """Return the bytes that the drafts of a trunk's rows need in addition to the keys and values of the trunk.

        They are those of the hidden states of all contexts, and of the keys and values of a context while it is
        computed, as `prepare_trunk` in native/decode.cpp counts them.
        """
        contexts = {self._trunk_of[row.request] for row in self.trunks[index].rows if row.request in self._trunk_of}
        contexts |= self._positions.keys() & {index}
        hidden = -(-self.model.compiled.shape.hidden // _PANEL) * _PANEL
        states = sum(4 * hidden * (end - begin) for begin, end in (self._positions[t] for t in contexts))
        passing = max((self.model.compiled.kv_bytes(self._positions[t][1]) for t in contexts - {index}), default=0)
        return states + passing

    def _span(self, drafts: Sequence[int]) -> tuple[int, int]:
        """Return the range [begin, end) of the positions that are followed by tokens of drafts."""
        spans = []
        for i in drafts:
            draft = self.requests[i].draft
            assert draft is not None
            spans.append((len(draft.context) - 1, len(draft.context) - 1 + draft_length(self.requests[i])))
        return min(begin for begin, _ in spans), max(end for _, end in spans)
