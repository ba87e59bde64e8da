"""A process that imports the package once and runs each command line of `vineppo` in a forked child.

It reads one job per line on standard input, as JSON, and answers with the exit code. A job can send a signal to its own
process when it reaches a certain place, or after a delay.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES: dict[str, tuple[str, str]] = {
    "sampling": ("vineppo.training.parts:Parts", "sample"),
    "credit": ("vineppo.credit.sample", "training_sample"),
    "update": ("vineppo.learning.optim:Optimizer", "step"),
    "sampler weights": ("vineppo.training.parts:Parts", "update_sampler"),
    "evaluation": ("vineppo.training.evaluate:Measurement", "mean_reward"),
    "rollouts file": ("vineppo.run.records", "write_parquet"),
    "metrics line": ("vineppo.run.directory:RunDirectory", "append_metrics"),
    "checkpoint": ("vineppo.learning.learner:TorchLearner", "save"),
    "checkpoint file": ("vineppo.run.files", "fsync_file"),
    "checkpoint rename": ("vineppo.run.checkpoint", "_put_in_place"),
    "old checkpoint": ("vineppo.run.files", "remove_tree"),
    "final model": ("vineppo.model.policy:Policy", "save"),
    "summary": ("vineppo.run.directory:RunDirectory", "write_summary"),
    "plots": ("vineppo.run.figures", "save"),
}
"""Name of a place in a run -> (module or module:class, function or method that is called there)."""


def call_at(place: str, number: int, when: str, action: Callable[[], None]) -> None:
    """Replace a function, so that its call with this number calls `action` `before` or `after` its own work."""
    owner, name = PLACES[place]
    module_name, _, class_name = owner.partition(":")
    module = importlib.import_module(module_name)
    home: Any = getattr(module, class_name) if class_name else module
    real, calls = getattr(home, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            action()
        result = real(*args, **kwargs)
        if calls == number and when == "after":
            action()
        return result

    setattr(home, name, wrapped)
    if not class_name:  # also where the function was imported by name
        for other in list(sys.modules.values()):
            if getattr(other, "__name__", "").startswith("vineppo.") and getattr(other, name, None) is real:
                setattr(other, name, wrapped)


def run_job(job: dict[str, Any]) -> int:
    """Run one job in this process. Return the exit code."""
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    if job.get("closed_stdout"):
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    else:
        os.dup2(log, 1)
    os.dup2(log, 2)

    def act() -> None:
        if job.get("pause"):
            Path(job["pause"]).touch()
            while Path(job["pause"]).exists():
                time.sleep(0.02)
        else:
            os.kill(os.getpid(), job["signal"])

    def act_later() -> None:
        time.sleep(job["delay"])
        os.kill(os.getpid(), job["signal"])

    if "place" in job:
        call_at(job["place"], job["number"], job.get("when", "before"), act)
    if "delay" in job:
        threading.Thread(target=act_later, daemon=True).start()
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    from vineppo.cli.main import main

    return main(job["command"])


def serve() -> None:
    """Answer jobs until standard input ends."""
    for module in ("vineppo.cli.main", "vineppo.training.loop", "vineppo.model.lora", "peft", *_modules()):
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = run_job(job)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answers.write(json.dumps(code) + "\n")
        answers.flush()


def _modules() -> list[str]:
    return sorted({owner.partition(":")[0] for owner, _ in PLACES.values()})


if __name__ == "__main__":
    serve()
