"""Grade responses in separate processes, with limits on time and memory, while sampling continues.

A reward function can hang in C code, use up the memory or crash the interpreter. Only a separate process can then be
stopped safely. A worker is such a process. It receives a few responses at a time and grades them one after another. If
a response exceeds the time limit, or its grading ends the process, its verdict is a `Failure`. Another worker then
grades the responses that the first worker had received but not graded.
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
"""Maximum number of responses that are sent to a worker at once. A small number would leave the worker idle between two
messages. With a large number, many responses would have to be sent again if the worker ends."""
_START_SECONDS = 180.0
"""Time limit for a worker to import the modules of the reward functions."""
_GRACE_SECONDS = 2.0
"""Time limit for a worker process to end after it has closed its connection."""
_Key = tuple[str, str]
"""(problem id, response text). Responses with equal keys are one job and are graded once."""
_Job = tuple[Problem, str, list[int]]
"""(problem, response text, token ids of the response): a response to grade."""


@dataclass
class _Worker:
    """A grader process and the jobs that were sent to it."""

    process: subprocess.Popen[bytes]
    connection: Connection
    jobs: deque[_Key] = field(default_factory=deque)
    """Jobs sent to the worker that have no verdict yet, in the order in which the worker processes them."""
    ready: bool = False
    """Whether the process has loaded the reward functions and has sent "ready"."""
    busy_since: float = field(default_factory=time.monotonic)
    """Value of `time.monotonic()` when the worker began its current job, `jobs[0]`. If the worker is not ready yet, the
    value when its process was started."""


class WorkerPool:
    """Grades responses in worker processes; implements `judge.Judge`. Equal responses to a problem are graded once.

    Args:
        loaders: picklable functions without arguments. Each is called in the worker and returns a reward function.
        workers: maximum number of processes; they are started when the first responses are submitted.
        seconds: time limit for grading one response with all functions.
        memory: limit on the address space of a worker in bytes; 0 means no limit.
    """

    grades_in_background = True
    """True, because `expect` starts grading in the worker processes."""

    def __init__(self, loaders: Sequence[Callable[[], RewardFn]], workers: int, seconds: float, memory: int):
        self._setup = pickle.dumps((tuple(loaders), memory, list(sys.path)))
        self._size, self._seconds = workers, seconds
        self._workers: list[_Worker] = []
        self._queue: deque[_Key] = deque()
        """Keys of the jobs that have not been sent to a worker."""
        self._jobs: dict[_Key, _Job] = {}
        """Jobs in the queue, jobs that were sent to a worker, and jobs whose verdict has not been returned yet."""
        self._verdicts: dict[_Key, Verdict] = {}

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Start grading these responses in the background."""
        self._submit(problems, texts, completion_ids)
        self._serve(0.0)

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Wait until all responses have been graded, and return the verdict on each response.

        Raises:
            UserError: if a worker cannot load the reward functions, if a reward function raises UserError or returns a
                value that is not allowed, or if a problem cannot be pickled.
        """
        keys = self._submit(problems, texts, completion_ids)
        while any(key not in self._verdicts for key in keys):
            self._serve(min(0.2, self._seconds))
        verdicts = [self._verdicts[key] for key in keys]
        for key in set(keys):
            del self._verdicts[key], self._jobs[key]
        return verdicts

    def close(self) -> None:
        """Stop the worker processes. A later call of `expect` or `verdicts` starts new processes."""
        for worker in self._workers:
            _kill(worker)
            self._queue.extendleft(reversed(worker.jobs))
        self._workers = []

    def __del__(self) -> None:
        self.close()

    def _submit(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[_Key]:
        """Queue a job for each response that does not have one yet. Return the key of each response."""
        keys = [(problem.id, text) for problem, text in zip(problems, texts, strict=True)]
        for i, (key, problem) in enumerate(zip(keys, problems, strict=True)):
            if key not in self._jobs:
                self._jobs[key] = problem, key[1], list(completion_ids[i]) if completion_ids else []
                self._queue.append(key)
        return keys

    def _serve(self, timeout: float) -> None:
        """Start workers, send queued jobs, receive verdicts, and replace workers that exceeded their time limit.

        Args:
            timeout: maximum time in seconds to wait for a message from a worker.
        """
        while self._queue and len(self._workers) < min(self._size, len(self._jobs)):
            self._workers.append(self._start())
        self._send_jobs()
        for connection in wait([worker.connection for worker in self._workers], timeout):
            self._receive(next(worker for worker in self._workers if worker.connection is connection))
        now = time.monotonic()
        for worker in list(self._workers):
            limit = self._seconds if worker.ready else _START_SECONDS
            if (worker.jobs or not worker.ready) and now - worker.busy_since > limit:
                response_late = f"a response was not graded within {limit:g} s (task.grading.seconds)"
                reason = response_late if worker.ready else f"its modules were not imported within {limit:g} s"
                self._replace(worker, Failure(reason, timed_out=True))
        self._send_jobs()

    def _send_jobs(self) -> None:
        """Send queued jobs to the workers that have none, in equal shares of at most _CHUNK jobs."""
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for index, worker in enumerate(idle):
            share = -(-len(self._queue) // (len(idle) - index))
            keys = [self._queue.popleft() for _ in range(min(_CHUNK, share))]
            if keys:
                worker.jobs, worker.busy_since = deque(keys), time.monotonic()
                try:
                    worker.connection.send([self._jobs[key] for key in keys])
                except OSError:  # The process has ended. The next call of _receive replaces the worker.
                    pass
                except Exception as error:
                    raise UserError(f"the columns of a problem cannot be sent to a grader process: {error}") from error

    def _receive(self, worker: _Worker) -> None:
        """Receive all verdicts that the worker has sent; replace the worker if its process has ended."""
        try:
            while worker.connection.poll():
                self._handle_message(worker, worker.connection.recv())
        except (EOFError, OSError):
            try:
                code = worker.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # Threads of a reward function keep the process alive.
                code = -signal.SIGKILL
            self._replace(worker, Failure(f"the grader process ended unexpectedly ({_cause(code)})"))

    def _handle_message(self, worker: _Worker, message: Any) -> None:
        """Handle one message of a worker: "ready", the verdict on its first job, or an error that ends the run."""
        worker.busy_since = time.monotonic()
        if isinstance(message, UserError):
            self.close()
            raise message
        if worker.ready:
            self._verdicts[worker.jobs.popleft()] = message
        worker.ready = True

    def _replace(self, worker: _Worker, failure: Failure) -> None:
        """Stop a worker. Its current job gets `failure` as verdict; its other jobs return to the front of the queue."""
        _kill(worker)
        self._workers.remove(worker)
        if not worker.ready:
            raise UserError(f"a grader process could not be started: {failure.text}")
        if worker.jobs:
            self._verdicts[worker.jobs.popleft()] = failure
            self._queue.extendleft(reversed(worker.jobs))

    def _start(self) -> _Worker:
        """Start a grader process, and send it the loaders, the memory limit and sys.path."""
        parent_end, worker_end = Pipe()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # With the source folder of this module in PYTHONPATH, the worker imports the same copy of vineppo.
        root = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        process = subprocess.Popen(
            [sys.executable, "-m", "vineppo.tasks.grading.worker", str(worker_end.fileno())],
            pass_fds=[worker_end.fileno()],
            stdin=subprocess.DEVNULL,
            # In a new session, Ctrl-C does not reach the worker. The main process gets it and stops the workers.
            start_new_session=True,
            env=environment,
        )
        worker_end.close()
        worker = _Worker(process, parent_end)
        parent_end.send_bytes(self._setup)
        return worker


def _kill(worker: _Worker) -> None:
    """Close the connection to a worker and stop its process."""
    worker.connection.close()
    with contextlib.suppress(ProcessLookupError):
        # killpg also ends the processes that a reward function started.
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()


def _cause(code: int) -> str:
    """Describe the exit code of a process. A negative code is the number of the signal that ended the process."""
    return f"exit code {code}" if code >= 0 else f"signal {-code}"
