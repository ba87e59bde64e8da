"""Train with several processes: rank 0 runs the training loop, and the other ranks follow it.

The loop, the credit, the grading and the files are those of one process, on rank 0. Its learner and its sampler
announce each of their calls. The other ranks make the same calls with their shards of the networks and their samplers.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vineppo.learning.learner import TorchLearner
from vineppo.learning.sharding import Ranks, joined
from vineppo.model.policy import Policy
from vineppo.run.peers import ended_together, require_launcher
from vineppo.sampling.ranks import RankSampler
from vineppo.training.parts import BUILD, InMemory, build_networks

STOP = "stop"
"""Announcement that the run has ended, with the content of summary.json."""


def with_ranks(device: str, in_memory: InMemory, lead: Callable[[Ranks], dict[str, Any]]) -> dict[str, Any]:
    """Train with all processes that a launcher started, and return the content of summary.json on all of them.

    Args:
        device: the setting `model.device`.
        in_memory: a model that is used instead of loading the configured one.
        lead: trains as rank 0, or as the only process.
    Raises:
        UserError: if this process reports why the run ends.
        PeerEnded: if another process does.
    """
    require_launcher()
    with ended_together() as watch, joined(device) as ranks:
        watch()
        if ranks.rank:
            return follow(ranks, in_memory)
        summary = lead(ranks)
        ranks.announce(STOP, summary)
        return summary


def follow(ranks: Ranks, in_memory: InMemory) -> dict[str, Any]:
    """Make the calls that rank 0 announces until the run ends, and return the content of its summary.json.

    Args:
        ranks: the ranks, of which this one does not lead.
        in_memory: a model that is used instead of loading the configured one.
    """
    with _signals_ignored():
        name, arguments = ranks.announced()
        assert name == BUILD, name
        config = arguments[0]
        learner, sampler = build_networks(config, in_memory.policy or Policy.load(config.model), ranks)
        assert sampler is None or isinstance(sampler, RankSampler)
        operations = _operations(learner, sampler)
        with contextlib.nullcontext() if sampler is None else contextlib.closing(sampler):
            while True:
                name, arguments = ranks.announced()
                if name == STOP:
                    summary: dict[str, Any] = arguments[0]
                    return summary
                operations[name](*arguments)


def _operations(learner: TorchLearner, sampler: RankSampler | None) -> dict[str, Callable[..., Any]]:
    """Return the operations of this rank that rank 0 announces, by their names."""
    operations: dict[str, Callable[..., Any]] = {
        method.__name__: method
        for method in (learner.update, learner.predict_values, learner.ref_logprobs, learner.save, learner.load)
    }
    if sampler is not None:
        operations["sample"], operations["sleep"] = sampler.sample, sampler.sleep
        operations["update_weights"] = lambda version: sampler.update_weights(version, learner.weights)
    return operations


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM, which a launcher sends to all ranks: rank 0 ends the run after its iteration."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
