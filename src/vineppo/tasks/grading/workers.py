"""Graders in processes of their own, with a real limit on time and memory, while sampling goes on.

A reward function may hang in C code, eat the memory or crash the interpreter; only another process can be stopped. Each
worker is sent a few responses and answers one after another. The one that it does not answer in time, or that it dies
of, is an error; the worker is replaced and the others are graded again.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vineppo.types import Failure, Problem, RewardFn, UserError, Verdict

_CHUNK = 8
"""Responses that a worker holds at most: it need not wait for us between them, and little is lost when it dies."""
_START_SECONDS = 180.0
"""For importing the functions' modules."""
_GRACE_SECONDS = 2.0
"""For a process to end whose connection has."""
_Key = tuple[str, str]
"""(problem's id, response): what makes two gradings the same."""
_Job = tuple[Problem, str, list[int]]


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    jobs: deque[_Key] = field(default_factory=deque)
    """In the order in which they are answered."""
    ready: bool = False
    since: float = field(default_factory=time.monotonic)
    """When it began with the first of its jobs, or was started."""


class WorkerPool:
    """Reaches verdicts in other processes; implements `judge.Judge`. Equal responses to a problem are graded once.

    Args:
        loaders: each gives a reward function when it is called in the worker; must be picklable.
        workers: number of processes; they start with the first response.
        seconds: that one response may take, over all functions.
        memory: bytes of address space of a worker; 0 is no limit.
    """

    early = True

    def __init__(self, loaders: Sequence[Callable[[], RewardFn]], workers: int, seconds: float, memory: int):
        self._setup = pickle.dumps((tuple(loaders), memory, list(sys.path)))
        self._size, self._seconds = workers, seconds
        self._workers: list[_Worker] = []
        self._queue: deque[_Key] = deque()
        self._jobs: dict[_Key, _Job] = {}
        """Everything that waits, is being graded, or has a verdict that was not asked for yet."""
        self._verdicts: dict[_Key, Verdict] = {}

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Begin to grade these in the background."""
        self._submit(problems, texts, completion_ids)
        self._serve(0.0)

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """One for each response, as soon as all are there.

        Raises:
            UserError: what a function's module or a grader says of a mistake of the user's.
        """
        keys = self._submit(problems, texts, completion_ids)
        while any(key not in self._verdicts for key in keys):
            self._serve(min(0.2, self._seconds))
        found = [self._verdicts[key] for key in keys]
        for key in set(keys):
            del self._verdicts[key], self._jobs[key]
        return found

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        for worker in self._workers:
            _kill(worker)
            self._queue.extendleft(reversed(worker.jobs))
        self._workers = []

    def __del__(self) -> None:
        self.close()

    def _submit(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[_Key]:
        keys = [(problem.id, text) for problem, text in zip(problems, texts, strict=True)]
        for i, (key, problem) in enumerate(zip(keys, problems, strict=True)):
            if key not in self._jobs:
                self._jobs[key] = problem, key[1], list(completion_ids[i]) if completion_ids else []
                self._queue.append(key)
        return keys

    def _serve(self, patience: float) -> None:
        """Take what the workers answered, stop those that are too late, hand out what waits."""
        while self._queue and len(self._workers) < min(self._size, len(self._jobs)):
            self._workers.append(self._start())
        self._hand_out()
        for connection in wait([worker.connection for worker in self._workers], patience):
            self._receive(next(worker for worker in self._workers if worker.connection is connection))
        now = time.monotonic()
        for worker in list(self._workers):
            limit = self._seconds if worker.ready else _START_SECONDS
            if (worker.jobs or not worker.ready) and now - worker.since > limit:
                late = f"a response was not graded within {limit:g} s (task.grading.seconds)"
                what = late if worker.ready else f"its modules were not imported within {limit:g} s"
                self._replace(worker, Failure(what, timed_out=True))
        self._hand_out()

    def _hand_out(self) -> None:
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for place, worker in enumerate(idle):
            share = -(-len(self._queue) // (len(idle) - place))
            keys = [self._queue.popleft() for _ in range(min(_CHUNK, share))]
            if keys:
                worker.jobs, worker.since = deque(keys), time.monotonic()
                try:
                    worker.connection.send([self._jobs[key] for key in keys])
                except OSError:  # it has died since; _receive finds out
                    pass
                except Exception as error:
                    raise UserError(f"a problem's columns cannot be sent to a grader: {error}") from error

    def _receive(self, worker: _Worker) -> None:
        """Everything that the worker has said."""
        try:
            while worker.connection.poll():
                self._take(worker, worker.connection.recv())
        except (EOFError, OSError):
            try:
                code = worker.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # its other threads hold it
                code = -signal.SIGKILL
            self._replace(worker, Failure(f"the grader's process died ({_cause(code)})"))

    def _take(self, worker: _Worker, answer: Any) -> None:
        worker.since = time.monotonic()
        if isinstance(answer, UserError):
            self.close()
            raise answer
        if worker.ready:
            self._verdicts[worker.jobs.popleft()] = answer
        worker.ready = True

    def _replace(self, worker: _Worker, failure: Failure) -> None:
        """The first of its jobs has failed; the others wait again, before everything else."""
        _kill(worker)
        self._workers.remove(worker)
        if not worker.ready:
            raise UserError(f"a grader's process could not be started: {failure.text}")
        if worker.jobs:
            self._verdicts[worker.jobs.popleft()] = failure
            self._queue.extendleft(reversed(worker.jobs))

    def _start(self) -> _Worker:
        ours, theirs = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        root = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        process = subprocess.Popen(
            [sys.executable, "-m", "vineppo.tasks.grading.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run, which ends its workers itself
            env=environment,
        )
        theirs.close()
        worker = _Worker(process, ours)
        ours.send_bytes(self._setup)
        return worker


def _kill(worker: _Worker) -> None:
    worker.connection.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)  # with what a reward function has started
    worker.process.wait()


def _cause(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
