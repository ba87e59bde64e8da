"""Grade responses in Ray actors, in the cluster to which the pool of samplers is connected (`sampler.pool ray`).

Each actor has one grader process (`host.GraderHost`). The actors reserve no CPU core, because the samplers may have
all of them, and are spread over the machines of the cluster.

This module can be imported without Ray.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from vineppo.tasks.grading.host import GraderHost, HostSettings, Report
from vineppo.tasks.grading.jobs import Job
from vineppo.tasks.grading.remote import HostDied, RemotePool
from vineppo.tasks.grading.sandbox import Protection
from vineppo.tasks.grading.workers import Place, WorkerPool
from vineppo.types import Problem, RewardFn, UserError, Verdict

_CLOSE_SECONDS = 2.0
"""How long the hosts have to return what their reward functions printed last."""


class RayCrew:
    """Ray actors that grade responses; implements `remote.Crew`. A handle is the reference to an actor's report.

    Args:
        ray: the module `ray`, connected to a cluster.
        size: number of actors.
        settings: the reward functions and their limits.
    """

    def __init__(self, ray: ModuleType, size: int, settings: HostSettings):
        self.ray, self.size = ray, size
        options = {"num_cpus": 0, "num_gpus": 0, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        self._kind = ray.remote(GraderHost).options(**options)
        self._settings = ray.put(settings)
        self.actors = [self._kind.remote(self._settings) for _ in range(size)]

    def start(self, host: int, jobs: Sequence[Job]) -> Any:
        """Let an actor grade responses. Return the reference to its report."""
        try:
            return self.actors[host].grade.remote(jobs)
        except (TypeError, ValueError, AttributeError, pickle.PicklingError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"the columns of a problem cannot be sent to a grader process: {reason}") from error

    def wait(self, handles: Sequence[Any], seconds: float) -> list[Any]:
        """Return the finished references, as soon as there is one, or none after a number of seconds."""
        finished, _ = self.ray.wait(list(handles), num_returns=1, timeout=seconds)
        more, _ = self.ray.wait(list(handles), num_returns=len(handles), timeout=0)
        return list(dict.fromkeys([*finished, *more]))

    def result(self, handle: Any) -> Report:
        """Return the report of a finished reference.

        Raises:
            HostDied: if the actor died, or its report was lost.
        """
        try:
            report: Report = self.ray.get(handle)
        except self.ray.exceptions.RayTaskError as error:
            raise RuntimeError(f"a Ray actor failed: {_last_line(error)}") from error
        except self.ray.exceptions.RayError as error:
            raise HostDied(_last_line(error)) from error
        return report

    def replace(self, host: int) -> None:
        """End an actor, and start a new one in its place, without waiting for it."""
        self._kill(self.actors[host])
        self.actors[host] = self._kind.remote(self._settings)

    def close(self) -> list[str]:
        """End all actors that still exist. Return what their reward functions printed since the last reports."""
        if sys.is_finalizing() or not self.ray.is_initialized():  # The actors ended with the connection.
            return []
        printed = [actor.close.remote() for actor in self.actors]
        done, _ = self.ray.wait(printed, num_returns=len(printed), timeout=_CLOSE_SECONDS)
        texts = []
        for handle in done:
            with contextlib.suppress(self.ray.exceptions.RayError):
                texts.append(self.ray.get(handle))
        for actor in self.actors:
            self._kill(actor)
        return texts

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(self.ray.exceptions.RayError, ValueError):  # It may have ended.
            self.ray.kill(actor)


class RayGraders:
    """Grades in actors if this process is connected to Ray, or else in grader processes; implements `judge.Judge`.

    The connection is that of the sampler, which exists before the first response. Commands that sample without a pool,
    such as `vineppo eval`, have no connection. The verdicts are the same.

    Args:
        loaders: picklable functions without arguments, each of which returns a reward function.
        workers: number of actors, or of grader processes.
        seconds, memory, protection: as for `workers.WorkerPool`.
    """

    grades_in_background = True
    """True, because `expect` starts grading in the actors."""

    def __init__(
        self,
        loaders: Sequence[Callable[[], RewardFn]],
        workers: int,
        seconds: float,
        memory: int,
        protection: Protection = "none",
    ):
        self._size = workers
        self._settings = HostSettings(tuple(loaders), seconds, memory, protection, Place.here())
        self._judge: RemotePool | WorkerPool | None = None

    @property
    def judge(self) -> RemotePool | WorkerPool:
        """The judge that grades, which is chosen at the first use."""
        if self._judge is None:
            ray, settings = sys.modules.get("ray"), self._settings
            if ray is not None and ray.is_initialized():
                self._judge = RemotePool(lambda: RayCrew(ray, self._size, settings), settings.seconds)
            else:
                limits = (settings.seconds, settings.memory, settings.protection)
                self._judge = WorkerPool(settings.loaders, self._size, *limits)
        return self._judge

    def expect(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> None:
        """Start grading these responses in the background."""
        self.judge.expect(problems, texts, completion_ids)

    def verdicts(
        self, problems: Sequence[Problem], texts: Sequence[str], completion_ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """Wait until all responses have been graded, and return the verdict on each response.

        Raises:
            UserError: as the judges raise it.
        """
        return self.judge.verdicts(problems, texts, completion_ids)

    def close(self) -> None:
        """End the actors or processes."""
        if self._judge is not None:
            self._judge.close()


def _last_line(error: BaseException) -> str:
    """Return the last line of an error that is not empty, without Ray's list of common causes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].partition(" Some common causes")[0] if lines else type(error).__name__
