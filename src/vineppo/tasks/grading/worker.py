"""Run a grader process, which grades responses for `workers.WorkerPool` in the main process.

`WorkerPool` starts it with `python -m vineppo.tasks.grading.worker PID FD`. PID is the process id of the main process,
and FD the number of the file descriptor of a connection to it.

The program forks. The first process, the guard, only waits: when the main process has ended for whatever reason, the
guard kills the whole process group, and so also the processes that reward functions have started. The second process
receives functions that load the reward functions, calls them, and sends "ready". It then receives lists of responses,
and sends a verdict on each response.

The main process sends pickled objects. The grader process sends one line of JSON per message, because unpickling can
execute code, and a message may have been written by the text of a model. The messages are

- `{"ready": [notice, ...]}`: the functions are loaded. The notices are shown to the user;
- `{"job": number, "rewards": [...]}` or `{"job": number, "failure": text}`: the verdict on a response. With
  `"full": true`, the process has reached its memory limit and ends;
- `{"error": text}`: a mistake of the user, which ends the run. In the sandbox, only before "ready".

The standard streams of the process are a pipe, which the main process reads and prints.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import pickle
import resource
import signal
import socket
import sys
import threading
import time
from typing import Any

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.tasks.grading.sandbox import Protection, enter_sandbox, missing_protection
from vineppo.types import Failure, Problem, RewardFn, UserError

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux: an option of `prctl` that sends a signal to this process when its parent ends."""
_WATCH_SECONDS = 0.5
"""How often the guard checks whether the trainer is alive."""
_MAX_TEXT = 2_000
"""Maximum number of characters of the text of a failure."""
_FULL_SHARE = 0.5
"""A process ends when its responses have used up this share of the memory that was free after loading."""


def main() -> None:
    """Grade responses until the other end of the connection is closed."""
    trainer, descriptor = int(sys.argv[1]), int(sys.argv[2])
    _start_guard(trainer, descriptor)
    os.set_inheritable(descriptor, False)
    channel = socket.socket(fileno=descriptor)
    # Both streams write to one pipe, in order and without a buffer. Unpaired surrogates of a model's text are escaped.
    raw = io.FileIO(2, "wb", closefd=False)
    sys.stdout = sys.stderr = io.TextIOWrapper(raw, "utf-8", "backslashreplace", write_through=True)
    try:
        _serve(channel)
    except UserError as error:
        _send(channel, {"error": str(error)})
    except (EOFError, OSError):  # the trainer closed the connection, or a reward function did
        pass


def _start_guard(trainer: int, descriptor: int) -> None:
    """Fork. The parent, which is the leader of the process group, becomes the guard and does not return."""
    child = os.fork()
    if child == 0:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        return
    os.close(descriptor)
    threading.Thread(target=_kill_group_after, args=(trainer,), daemon=True).start()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _kill_group_after(trainer: int) -> None:
    """Wait until the process `trainer` is no longer the parent of this process, then kill the process group."""
    while os.getppid() == trainer:
        time.sleep(_WATCH_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _serve(channel: socket.socket) -> None:
    """Load the reward functions and grade responses until the connection is closed, or the memory is used up."""
    requests = channel.makefile("rb")
    loaders, memory, path, protection = pickle.load(requests)
    sys.path[:] = path
    fns = tuple(load() for load in loaders)
    for fn in fns:
        getattr(fn, "prepare", lambda: None)()
    limit, notices = _limit_memory(memory)
    notices += _protect(protection)
    loaded = _address_space()
    most = loaded + _FULL_SHARE * max(limit - loaded, 0) if limit else math.inf
    _send(channel, {"ready": notices})
    while True:
        for number, problem, text, token_ids in pickle.load(requests):
            reply, full = _grade(fns, problem, text, token_ids, trusted=protection == "none")
            if full or _address_space() > most:
                _send(channel, {"job": number, **reply, "full": True})
                os._exit(0)  # without cleaning up, for which the memory may not be sufficient
            _send(channel, {"job": number, **reply})


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Send a message as one line of JSON."""
    channel.sendall(json.dumps(message).encode() + b"\n")


def _grade(
    fns: tuple[RewardFn, ...], problem: Problem, text: str, token_ids: list[int], trusted: bool
) -> tuple[dict[str, Any], bool]:
    """Return the verdict on a response as fields of a message, and whether the process ran out of memory.

    Args:
        trusted: whether a UserError of a reward function is raised. Otherwise it may come from the text of the model,
            and is a failure.
    """
    process = os.getpid()
    try:
        [verdict] = apply_rewards(fns, [problem], [text], [token_ids])
    except MemoryError:
        return {"failure": "a reward function ran out of memory (task.grading.memory)"}, True
    except UserError as error:
        # `apply_rewards` converts other exceptions of a reward function to a UserError with a cause. They concern only
        # this response. A UserError without a cause was raised by the reward function itself, or is about a returned
        # value that is not allowed. It ends the run.
        if error.__cause__ is None and trusted:
            raise
        return {"failure": str(error)[:_MAX_TEXT]}, isinstance(error.__cause__, MemoryError)
    except BaseException as error:  # SystemExit and KeyboardInterrupt
        return {"failure": f"a reward function raised {type(error).__name__}"[:_MAX_TEXT]}, False
    finally:
        if os.getpid() != process:
            os._exit(0)  # a reward function forked and returned in the new process too
    if isinstance(verdict, Failure):
        return {"failure": verdict.text[:_MAX_TEXT]}, False
    return {"rewards": verdict}, False


def _limit_memory(limit: int) -> tuple[int, list[str]]:
    """Limit the address space to `limit` bytes, or to the hard limit of the system if that is lower; 0: no limit.

    Returns:
        The limit, and notices: one if the system refuses a limit, which is then 0; otherwise none.
    """
    if not limit:
        return 0, []
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ValueError, OSError) as error:
        return 0, [
            f"the system refuses a limit on the memory of grader processes ({error}); they run without one; set "
            "task.grading.memory to 0 to hide this warning"
        ]
    return limit, []


def _protect(protection: Protection) -> list[str]:
    """Enter the sandbox if `protection` asks for it. Return a notice if that fails and the sandbox is not required."""
    if protection == "none" or (protection == "available" and missing_protection()):
        return []
    try:
        enter_sandbox()
    except OSError as error:
        if protection == "required":
            raise UserError(f"{error}; set task.grading.trust_scorer to true to run the scorer without it") from error
        return [f"grader processes run without a sandbox: {error}"]
    return []


def _address_space() -> int:
    """Return the size of the address space in bytes; 0 where the system does not tell it in /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
