"""Keep account of the responses that a judge has to grade in the background: each one once, and its verdict."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from vineppo.types import Problem, Verdict

Key = tuple[str, str]
"""(problem id, response text). Responses with equal keys are one job and are graded once."""
Job = tuple[Problem, str, list[int]]
"""(problem, response text, token ids of the response): a response to grade."""
CHUNK = 8
"""Maximum number of responses that are sent to a worker at once. A small number would leave the worker idle between two
messages. With a large number, many responses would have to be sent again if the worker ends."""


class Jobs:
    """The responses that were submitted and whose verdicts have not been collected yet."""

    def __init__(self) -> None:
        self._queue: deque[Key] = deque()
        """Keys of the jobs that no worker has."""
        self._jobs: dict[Key, Job] = {}
        self._verdicts: dict[Key, Verdict] = {}

    def __len__(self) -> int:
        """Return the number of jobs, also of those that have a verdict."""
        return len(self._jobs)

    def __getitem__(self, key: Key) -> Job:
        """Return a job."""
        return self._jobs[key]

    @property
    def waiting(self) -> int:
        """Number of jobs that no worker has."""
        return len(self._queue)

    @property
    def graded(self) -> int:
        """Number of verdicts that have not been collected yet."""
        return len(self._verdicts)

    def submit(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Key]:
        """Queue a job for each response that does not have one yet. Return the key of each response."""
        keys = [(problem.id, text) for problem, text in zip(problems, texts, strict=True)]
        for i, (key, problem) in enumerate(zip(keys, problems, strict=True)):
            if key not in self._jobs:
                self._jobs[key] = problem, key[1], list(completion_ids[i]) if completion_ids else []
                self._queue.append(key)
        return keys

    def take(self, workers: int) -> list[Key]:
        """Return the next jobs for the first of some idle workers: an equal share of the queue, at most `CHUNK`."""
        share = -(-len(self._queue) // workers)
        return [self._queue.popleft() for _ in range(min(CHUNK, share))]

    def put_back(self, keys: Sequence[Key]) -> None:
        """Put jobs that a worker had back to the front of the queue, in their order."""
        self._queue.extendleft(reversed(keys))

    def finish(self, key: Key, verdict: Verdict) -> None:
        """Store the verdict on a job."""
        self._verdicts[key] = verdict

    def unfinished(self, keys: Iterable[Key]) -> bool:
        """Return whether a job has no verdict."""
        return any(key not in self._verdicts for key in keys)

    def collect(self, keys: Sequence[Key]) -> list[Verdict]:
        """Return the verdicts on jobs, which have all been graded, and forget these jobs."""
        verdicts = [self._verdicts[key] for key in keys]
        for key in set(keys):
            del self._verdicts[key], self._jobs[key]
        return verdicts
