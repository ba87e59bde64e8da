"""Grade responses in separate processes, with limits on time and memory, while sampling continues.

A reward function can hang in C code, use up the memory or crash the interpreter. Only a separate process can then be
stopped safely. A worker is such a process. It receives a few responses at a time and grades them one after another. If
a response exceeds the time limit, or its grading ends the process, its verdict is a `Failure`. Another worker then
grades the responses that the first worker had received but not graded. A worker whose memory has been used up by
earlier responses is replaced too.

The module `worker` describes the processes and their messages. The main process checks every message, because a reward
function, or the text of a model, may have written it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from vineppo.tasks.grading.jobs import Jobs, Key
from vineppo.tasks.grading.output import Output, print_to_stderr
from vineppo.tasks.grading.rewards import MAX_REWARD
from vineppo.tasks.grading.sandbox import Protection
from vineppo.types import Failure, Problem, RewardFn, UserError, Verdict

START_SECONDS = 180.0
"""Time limit for a worker to import the modules of the reward functions."""
_GRACE_SECONDS = 2.0
"""Time limit for a worker process to end after it has closed its connection."""
_MAX_MESSAGE = 1 << 20
"""Maximum number of bytes of a message of a worker."""
_WROTE_TO_CONNECTION = (
    "the grader process sent an invalid message; a reward function probably wrote to a file descriptor that it did not "
    "open"
)
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
"""Environment variables of the workers. There are several workers, and the sandbox needs processes of one thread."""


@dataclass
class _Worker:
    """A grader process and the jobs that were sent to it."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    output: Output
    jobs: deque[tuple[int, Key]] = field(default_factory=deque)
    """Jobs sent to the worker that have no verdict yet, each with its number, in the order in which the worker
    processes them."""
    received: bytes = b""
    """The beginning of a message."""
    graded: int = 0
    """Number of verdicts that the worker has sent."""
    ready: bool = False
    """Whether the process has loaded the reward functions and has sent "ready"."""
    busy_since: float = field(default_factory=time.monotonic)
    """Value of `time.monotonic()` when the worker began its current job, `jobs[0]`. If the worker is not ready yet, the
    value when its process was started."""


@dataclass(frozen=True)
class Place:
    """Where grader processes find modules and files, if another process than the trainer starts them."""

    path: list[str]
    """`sys.path` of the processes."""
    folder: str
    """Their current directory. It is not used if the machine does not have it."""

    @classmethod
    def here(cls) -> Place:
        """Return the modules and the current directory of this process."""
        return cls([os.path.abspath(entry) if entry == "" else entry for entry in sys.path], os.getcwd())


class WorkerPool:
    """Grades responses in worker processes; implements `judge.Judge`. Equal responses to a problem are graded once.

    Args:
        loaders: picklable functions without arguments. Each is called in the worker and returns a reward function.
        workers: maximum number of processes; they are started when the first responses are submitted.
        seconds: time limit for grading one response with all functions.
        memory: limit on the address space of a worker in bytes; 0 means no limit.
        protection: whether the workers run in the sandbox.
        place: where the workers find modules and files; by default, where this process finds them.
        show: called with what the workers print; by default, it is printed to stderr.
    """

    grades_in_background = True
    """True, because `expect` starts grading in the worker processes."""

    def __init__(
        self,
        loaders: Sequence[Callable[[], RewardFn]],
        workers: int,
        seconds: float,
        memory: int,
        protection: Protection = "none",
        *,
        place: Place | None = None,
        show: Callable[[str], None] = print_to_stderr,
    ):
        self._setup = pickle.dumps((tuple(loaders), memory, place.path if place else list(sys.path), protection))
        self._folder, self._show = place.folder if place and os.path.isdir(place.folder) else None, show
        self._size, self._seconds, self._num_rewards = workers, seconds, len(loaders)
        self._trusted = protection == "none"
        """Whether only a mistake of the user makes a worker send an error. In the sandbox, the text of a model may."""
        self._numbers = itertools.count()
        self._notices: set[str] = set()
        """Notices of workers that were shown as a warning."""
        self._workers: list[_Worker] = []
        self._jobs = Jobs()

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Start grading these responses in the background."""
        self._jobs.submit(problems, texts, completion_ids)
        self._serve(0.0)

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Wait until all responses have been graded, and return the verdict on each response.

        Raises:
            UserError: if a worker cannot load the reward functions, if a reward function raises UserError or returns a
                value that is not allowed, or if a problem cannot be pickled.
        """
        keys = self._jobs.submit(problems, texts, completion_ids)
        while self._jobs.unfinished(keys):
            self._serve(min(0.2, self._seconds))
        return self._jobs.collect(keys)

    def close(self) -> None:
        """Stop the worker processes. A later call of `expect` or `verdicts` starts new processes."""
        for worker in self._workers:
            _kill(worker)
            self._return_jobs(worker)
        self._workers = []

    def __del__(self) -> None:
        self.close()

    def _serve(self, timeout: float) -> None:
        """Start workers, send queued jobs, receive verdicts, and replace workers that exceeded their time limit.

        Args:
            timeout: maximum time in seconds to wait for a message from a worker.
        """
        while self._jobs.waiting and len(self._workers) < min(self._size, len(self._jobs)):
            self._workers.append(self._start())
        self._send_jobs()
        for channel in wait([worker.channel for worker in self._workers], timeout):
            self._receive(next(worker for worker in self._workers if worker.channel is channel))
        now = time.monotonic()
        for worker in list(self._workers):
            limit = self._seconds if worker.ready else START_SECONDS
            if (worker.jobs or not worker.ready) and now - worker.busy_since > limit:
                response_late = f"a response was not graded within {limit:g} s (task.grading.seconds)"
                reason = response_late if worker.ready else f"its modules were not imported within {limit:g} s"
                self._replace(worker, Failure(reason, timed_out=True))
        self._send_jobs()

    def _send_jobs(self) -> None:
        """Send queued jobs to the workers that have none, in equal shares of at most `CHUNK` jobs."""
        idle = [worker for worker in self._workers if worker.ready and not worker.jobs]
        for index, worker in enumerate(idle):
            keys = self._jobs.take(len(idle) - index)
            if keys:
                worker.jobs, worker.busy_since = deque(zip(self._numbers, keys)), time.monotonic()
                try:
                    message = pickle.dumps([(number, *self._jobs[key]) for number, key in worker.jobs])
                except Exception as error:
                    raise UserError(f"the columns of a problem cannot be sent to a grader process: {error}") from error
                with contextlib.suppress(OSError):  # the process has ended; _receive handles it
                    worker.channel.sendall(message)

    def _receive(self, worker: _Worker) -> None:
        """Receive messages that the worker has sent; replace the worker if its process has ended."""
        data = b""
        with contextlib.suppress(OSError):
            data = worker.channel.recv(1 << 16)
        if not data:
            try:
                code = worker.process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # Threads of a reward function keep the process alive.
                code = -signal.SIGKILL
            self._replace(worker, Failure(f"the grader process ended unexpectedly ({_cause(code)})"))
            return
        *lines, worker.received = (worker.received + data).split(b"\n")
        try:
            if len(worker.received) > _MAX_MESSAGE:
                raise _InvalidMessage
            for line in lines:
                if worker in self._workers:  # a message may be the reason to replace the worker
                    self._handle_message(worker, _parsed(line))
        except _InvalidMessage:
            self._replace(worker, Failure(_WROTE_TO_CONNECTION))

    def _handle_message(self, worker: _Worker, message: Mapping[str, Any]) -> None:
        """Handle a message: the process is ready, the verdict on its first job, or an error that ends the run."""
        worker.busy_since = time.monotonic()
        if isinstance(message.get("error"), str):
            if worker.ready and not self._trusted:
                raise _InvalidMessage
            self.close()
            raise UserError(message["error"])
        if not worker.ready:
            for notice in _notices(message):
                if notice not in self._notices:
                    self._notices.add(notice)
                    warnings.warn(notice, stacklevel=2)
            worker.ready = True
            return
        if not worker.jobs or message.get("job") != worker.jobs[0][0]:
            raise _InvalidMessage
        verdict, full = _verdict(message, self._num_rewards), message.get("full") is True
        # The memory may have been used up by earlier responses. A new process decides that.
        if not (full and worker.graded and isinstance(verdict, Failure)):
            self._jobs.finish(worker.jobs.popleft()[1], verdict)
            worker.graded += 1
        if full:
            _kill(worker)
            self._workers.remove(worker)
            self._return_jobs(worker)

    def _replace(self, worker: _Worker, failure: Failure) -> None:
        """Stop a worker. Its current job gets `failure` as verdict; its other jobs return to the front of the queue.

        Its current job returns too if an earlier response may be the cause, whose verdict the worker has sent already.
        A new process then grades the job. This is not done after a time-out, because it would double the time.
        """
        _kill(worker)
        self._workers.remove(worker)
        if not worker.ready:
            raise UserError(f"a grader process could not be started: {failure.text}")
        if worker.jobs and (failure.timed_out or not worker.graded):
            self._jobs.finish(worker.jobs.popleft()[1], failure)
        self._return_jobs(worker)

    def _return_jobs(self, worker: _Worker) -> None:
        """Put the jobs of a stopped worker back to the front of the queue."""
        self._jobs.put_back([key for _, key in worker.jobs])

    def _start(self) -> _Worker:
        trainer_end, worker_end = socket.socketpair()
        output = Output(self._show)
        environment = {**os.environ, **_ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}
        # With the source folder of this module in PYTHONPATH, the worker imports the same copy of vineppo.
        root = str(Path(__file__).resolve().parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        with worker_end:
            process = subprocess.Popen(
                [sys.executable, "-m", "vineppo.tasks.grading.worker", str(os.getpid()), str(worker_end.fileno())],
                pass_fds=[worker_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output.write_end,
                stderr=output.write_end,
                # In a new session, Ctrl-C does not reach the worker. The main process gets it and stops the workers.
                # The session is also a process group, which is killed as a whole.
                start_new_session=True,
                env=environment,
                cwd=self._folder,
            )
        output.start()
        with contextlib.suppress(OSError):  # the process has ended; _receive handles it
            trainer_end.sendall(self._setup)
        return _Worker(process, trainer_end, output)


class _InvalidMessage(Exception):
    """A worker sent something that is not one of the messages in `worker`."""


def _parsed(line: bytes) -> Mapping[str, Any]:
    """Return the message in a line. Raise _InvalidMessage if it is not an object of JSON."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _InvalidMessage from error
    if not isinstance(message, dict):
        raise _InvalidMessage
    return message


def _notices(message: Mapping[str, Any]) -> list[str]:
    """Return the notices of a "ready" message."""
    notices = message.get("ready")
    if not isinstance(notices, list) or not all(isinstance(notice, str) for notice in notices):
        raise _InvalidMessage
    return notices


def _verdict(message: Mapping[str, Any], num_rewards: int) -> Verdict:
    """Return the verdict in a message. Raise _InvalidMessage if it does not have `num_rewards` allowed rewards."""
    failure, rewards = message.get("failure"), message.get("rewards")
    if isinstance(failure, str):
        return Failure(failure)
    if not isinstance(rewards, list) or len(rewards) != num_rewards:
        raise _InvalidMessage
    if not all(reward is None or (isinstance(reward, float) and abs(reward) <= MAX_REWARD) for reward in rewards):
        raise _InvalidMessage
    return tuple(rewards)


def _kill(worker: _Worker) -> None:
    """Close the connection to a worker and stop its processes."""
    worker.channel.close()
    with contextlib.suppress(ProcessLookupError):
        # killpg also ends the processes that a reward function started.
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    worker.output.drain()


def _cause(code: int) -> str:
    """Describe an exit code. The guard of a worker ends with 128 + the number of the signal that ended the worker."""
    code = 128 - code if code < 0 else code
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"
