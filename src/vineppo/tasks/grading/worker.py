"""The program of a grader process: `python -m vineppo.tasks.grading.worker FD`, started by `workers.WorkerPool`.

The process loads the reward functions and sends "ready". It then receives responses and sends a verdict on each one.
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

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Grade responses until the other end of the connection is closed."""
    if sys.platform == "linux":
        # Otherwise a worker whose reward function hangs would continue after the main process has been killed.
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    # Output of reward functions goes to stderr, because the output of `vineppo` may be JSON.
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
    try:
        return apply_rewards(fns, [problem], [text], [token_ids])[0]
    except UserError as error:
        # A UserError without a cause (raised by the grader, or about the returned rewards) ends the run. Any other
        # exception of a reward function is a failure of this response.
        return error if error.__cause__ is None else Failure(str(error))
    except MemoryError:
        return Failure("a reward function ran out of memory (task.grading.memory)")


def _limit_memory(limit: int) -> None:
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
