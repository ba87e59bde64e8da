"""The sampler that decodes with the compiled engine.

Every thread of the engine decodes samples on its own, and hardly ever waits for another one. The bits of a completion
depend neither on the number of threads nor on the other requests of the call, because the engine adds up the numbers of
a row in the same order, whichever rows are computed with it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from vineppo.sampling.engine.drafts import Drafts
from vineppo.sampling.engine.families import EngineModel
from vineppo.sampling.engine.library import Job, Library, start_job
from vineppo.sampling.language_model import LanguageModel
from vineppo.sampling.stops import StopTokens
from vineppo.sampling.trunks import Row, Trunk, empty_results, has_stop, response_tail, stop_window, trunks_of
from vineppo.seeds import stream_keys
from vineppo.types import Capabilities, Completion, OnFinished, SampleRequest, UserError, Weights

_LARGE = 256
"""Largest hidden size of a small model."""
_SMALL_BATCH, _LARGE_BATCH, _LARGE_BATCH_BF16 = 24, 96, 256
"""Maximum number of rows that a thread decodes together: for small models, for large ones, and for large ones in
bfloat16. The states of a batch and the weights of a layer of a small model fit into the cache of a core. The weights of
a large model are read from memory once per batch, so the time per row falls with the number of rows."""


class EngineSampler:
    """Samples with the weights of a policy in the same process; implements `types.Sampler`.

    Args:
        policy: the policy. Its weights are copied when they have changed.
        library: the compiled library.
        max_rows: maximum number of rows that are decoded at the same time.
        kv_memory: maximum number of bytes of keys and values.
        threads: number of threads; None: as many as PyTorch uses.
    """

    capabilities = Capabilities(excluded_first=True, reproducible=True, drafts=True)

    def __init__(
        self,
        policy: LanguageModel,
        library: Library,
        *,
        max_rows: int = 2048,
        kv_memory: int = 4 << 30,
        threads: int | None = None,
    ):
        self.policy, self.version = policy, 0
        self.max_rows, self.kv_memory, self.threads = max_rows, kv_memory, threads
        self._model = EngineModel(library, policy.model)
        self._lock, self._running = threading.RLock(), 0
        large = _LARGE_BATCH_BF16 if library.bf16 else _LARGE_BATCH
        self._batch = large if self._model.compiled.shape.hidden > _LARGE else _SMALL_BATCH
        self._stops = StopTokens(policy.codec, self._model.compiled.shape.vocabulary)

    @property
    def num_threads(self) -> int:
        """Number of threads that decode."""
        return self.threads or torch.get_num_threads()

    def update_weights(self, version: int, weights: Weights) -> None:
        """Store `version`, the number of policy updates that the weights include.

        The function `weights` is not called: the weights of the policy are copied in the next call of `sample`.
        """
        self.version = version

    def sample(
        self, requests: Sequence[SampleRequest], on_finished: OnFinished | None = None
    ) -> list[list[Completion]]:
        """Return the completions of requests, as `types.Sampler.sample` says.

        Raises:
            UserError: if the keys and values of a single sequence do not fit into `kv_memory`, or if the model has
                changed in a way that the engine does not know.
            EngineError: if the engine fails, for example because the logits are not finite.
        """
        results = empty_results(requests, self.version)
        trunks = trunks_of(requests, range(len(requests)))
        # Calls in other threads wait. A call from `on_finished` is possible as long as no weight has to be copied.
        with self._lock:
            self._running += 1
            try:
                if trunks:
                    self._decode(requests, trunks, results, on_finished)
            finally:
                self._running -= 1
        return [[c for c in completions if c is not None] for completions in results]

    def _decode(
        self,
        requests: Sequence[SampleRequest],
        trunks: Sequence[Trunk],
        results: list[list[Completion | None]],
        on_finished: OnFinished | None,
    ) -> None:
        """Decode the rows of the trunks, and store their completions in `results`."""
        rows = [row for trunk in trunks for row in trunk.rows]
        with self._start(requests, trunks, rows) as job:
            at_once = on_finished is not None or any(request.stop for request in requests)
            for events in job.events(at_once):
                finished = []
                for asks, index in events:
                    row = rows[index]
                    if asks:
                        job.answer(index, self._stops_after(requests[row.request], job.result(index)[0]))
                        continue
                    completion = self._completion(*job.result(index))
                    results[row.request][row.sample] = completion
                    finished.append((row.request, completion))
                if finished and on_finished:
                    on_finished(finished)

    def _start(self, requests: Sequence[SampleRequest], trunks: Sequence[Trunk], rows: Sequence[Row]) -> Job:
        """Start to decode the rows, which are in the order of their trunks."""
        drafts = Drafts(requests, trunks, self._model)
        self._check_memory(trunks, drafts)
        positions = max(len(trunk.token_ids) + trunk.budget for trunk in trunks)
        self._model.refresh(positions, self.version, in_use=self._running > 1)
        of_row = [requests[row.request] for row in rows]
        stop_of = [self._stop_of(request) for request in requests]
        stops = [stop_of[row.request] for row in rows]
        kinds = list(dict.fromkeys(stop for stop in stops if stop))
        samples = {
            "trunk": np.repeat(np.arange(len(trunks)), [len(trunk.rows) for trunk in trunks]),
            "prefix_length": np.array([row.prefix_length for row in rows]),
            "budget": np.array([row.budget for row in rows]),
            "key": stream_keys(
                np.array([r.seed for r in of_row], np.uint64),
                np.array([r.first_sample + row.sample for r, row in zip(of_row, rows, strict=True)]),
            ),
            "temperature": np.array([r.temperature for r in of_row]),
            "ask_kind": np.array([kinds.index(stop) if stop else -1 for stop in stops]),
        }
        threads = max(1, min(self.num_threads, self.max_rows))
        most = max(1, min(self._batch, self.max_rows // threads))
        return start_job(
            self._model.compiled,
            [trunk.token_ids for trunk in trunks],
            samples,
            [r.excluded_first for r in of_row],
            np.array([self._stops.table(stop) for stop in kinds]),
            sorted(self.policy.codec.eos_ids),
            threads,
            min(most, -(-len(rows) // threads)),
            self.kv_memory,
            drafts.table(rows),
        )

    def _check_memory(self, trunks: Sequence[Trunk], drafts: Drafts) -> None:
        """Raise UserError if the keys and values of a trunk and of one of its rows do not fit into the memory."""
        kv_bytes = self._model.compiled.kv_bytes
        for i, trunk in enumerate(trunks):
            of_drafts = drafts.bytes(i)
            needed = kv_bytes(len(trunk.token_ids)) + kv_bytes(trunk.budget) + of_drafts
            if trunk.rows and needed > self.kv_memory:
                raise UserError(
                    f"a prefix of {len(trunk.token_ids)} tokens with {trunk.budget} new tokens needs {needed} bytes of "
                    f"keys and values{' and states of drafts' if of_drafts else ''}, but rollouts.kv_memory holds "
                    f"{self.kv_memory}; raise rollouts.kv_memory or lower rollouts.max_new_tokens"
                )

    def _stop_of(self, request: SampleRequest) -> tuple[str, ...]:
        """Return the stop strings for which tokens are checked.

        If the part of the response in the prefix contains one already, every token must be checked. The empty string is
        then added, which every token may complete (`StopTokens`).
        """
        text = self.policy.codec.decode(response_tail(request, stop_window(request.stop))) if request.stop else ""
        return (*request.stop, "") if any(stop in text for stop in request.stop) else request.stop

    def _stops_after(self, request: SampleRequest, token_ids: Sequence[int]) -> bool:
        """Return whether the last token of a completion completed a stop string."""
        tail = response_tail(request, stop_window(request.stop))
        return has_stop(self.policy.codec.decode, tail, token_ids, request.stop)

    def _completion(self, token_ids: list[int], logprobs: list[float], stopped: bool, accepted: int) -> Completion:
        return Completion(tuple(token_ids), tuple(logprobs), "stop" if stopped else "length", self.version, accepted)
