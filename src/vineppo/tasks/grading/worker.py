"""Run a grader process, which grades responses for `workers.WorkerPool` in the main process.

`WorkerPool` starts it with `python -m vineppo.tasks.grading.worker FD`. FD is the number of the file descriptor of a
connection to the main process. The grader process receives functions that load the reward functions, calls them, and
sends "ready". It then receives lists of responses, and sends a verdict on each response.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from multiprocessing.connection import Connection

from vineppo.tasks.grading.rewards import apply_rewards
from vineppo.types import Failure, Problem, RewardFn, UserError, Verdict

_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux: an option of `prctl` that sends a signal to this process when its parent ends."""


def main() -> None:
    """Grade responses until the other end of the connection is closed."""
    if sys.platform == "linux":
        # Otherwise this process would continue if a reward function hangs and the main process is killed.
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    # Output of reward functions goes to stderr, because stdout belongs to `vineppo`, whose output may be JSON.
    os.dup2(2, 1)
    try:
        loaders, memory, path = pickle.loads(connection.recv_bytes())
        sys.path[:] = path
        fns = tuple(load() for load in loaders)
        for fn in fns:
            getattr(fn, "prepare", lambda: None)()
        _limit_memory(memory)
        connection.send("ready")
        while True:
            for problem, text, token_ids in connection.recv():
                connection.send(_verdict(fns, problem, text, token_ids))
    except UserError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):
        pass


def _verdict(fns: tuple[RewardFn, ...], problem: Problem, text: str, token_ids: list[int]) -> Verdict | UserError:
    """Return the verdict on one response, or the error that must end the run."""
    try:
        return apply_rewards(fns, [problem], [text], [token_ids])[0]
    except UserError as error:
        # `apply_rewards` converts other exceptions of a reward function to a UserError with a cause. They concern only
        # this response. A UserError without a cause was raised by the reward function itself, or is about a returned
        # value that is not allowed. It ends the run.
        return error if error.__cause__ is None else Failure(str(error))
    except MemoryError:
        return Failure("a reward function ran out of memory (task.grading.memory)")


def _limit_memory(limit: int) -> None:
    """Limit the address space of this process to `limit` bytes. 0 means no limit."""
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
