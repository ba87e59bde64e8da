"""Call the callbacks of transformers during a run, in the order in which transformers' `Trainer` calls them."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vineppo.run.trl_names import with_trl_names
from vineppo.training.stopping import without_console

NOT_CALLED = ("on_pre_optimizer_step", "on_optimizer_step", "on_substep_end")
"""Methods of `TrainerCallback` that transformers calls during training, but this package does not."""
_OF_THE_RUN = ("iteration", "updates", "tokens/", "seconds/train")
"""Beginnings of the names of metrics that count from the start of the run. Logs contain their last value."""
_LAST = ("policy/lr", "learning_rate", "policy/grad_norm", "grad_norm")
"""Further metrics of which logs contain the last value, as in transformers."""


class Schedule(NamedTuple):
    """Numbers of a run that the listener needs."""

    max_steps: int
    """Planned number of updates of the run (`state.max_steps`)."""
    updates_per_iteration: int
    """Planned number of updates per iteration."""
    logging_interval: int
    """Number of updates between logs; 0 means no logs."""
    epochs_per_iteration: float
    """Number of problems per iteration, divided by the number of training problems."""


class Listener:
    """Calls transformers callbacks during a run; implements `vineppo.training.session.Reporter`.

    For callbacks, an iteration is one step; `state.global_step` counts updates.

    Args:
        callbacks: `TrainerCallback` objects.
        args: the `VinePPOConfig`, which callbacks get as their first argument.
        objects: further arguments of every call: `model` and `processing_class`.
        schedule: function that returns the numbers of the run. It is called when training starts.
    """

    def __init__(
        self, callbacks: Sequence[Any], args: Any, objects: Mapping[str, Any], schedule: Callable[[], Schedule]
    ):
        from transformers import TrainerControl, TrainerState

        self.callbacks: list[Any] = []
        self.args, self.objects, self._schedule = args, dict(objects), schedule
        self.state, self.control = TrainerState(), TrainerControl()
        self.losses: list[float] = []
        """The loss of every iteration since the last call of `start`."""
        self._noted: dict[str, list[float]] = defaultdict(list)
        self._not_logged: list[dict[str, Any]] = []
        self._numbers = schedule()
        self._epoch: int | None = None  # number of the epoch that has begun, or None
        self._saved_step = 0
        for callback in callbacks:
            self.add(callback)

    def add(self, callback: Any) -> None:
        """Add a callback. Warn if it has a method that is never called.

        Args:
            callback: an object or class.
        """
        from transformers import TrainerCallback

        callback = callback() if isinstance(callback, type) else callback
        self.callbacks.append(callback)
        kind = type(callback)
        unused = [
            name for name in NOT_CALLED if getattr(kind, name, None) not in (None, getattr(TrainerCallback, name))
        ]
        if unused:
            warnings.warn(
                f"{', '.join(unused)} of the callback {kind.__name__} will not be called (docs/from-trl.md#callbacks)",
                stacklevel=4,
            )

    def note(self, name: str, value: float) -> None:
        """Record a number that a reward function passed to `log_metric`.

        A log contains, for each name, the mean of the numbers that were recorded since the last log.
        """
        self._noted[name].append(float(value))

    def start(self, sampler: str) -> None:
        """Set the planned numbers in the state, and call `on_train_begin`."""
        self._numbers = self._schedule()
        self.state.max_steps = self._numbers.max_steps
        self.state.logging_steps = self._numbers.logging_interval
        self.state.global_step, self._saved_step, self._epoch = 0, 0, None
        self.losses.clear()
        self._not_logged.clear()
        self.call("on_train_begin")

    def before_iteration(self, iteration: int) -> None:
        """Call `on_step_begin`, and before it `on_epoch_end` and `on_epoch_begin` if a new epoch begins."""
        numbers = self._numbers
        if self.state.global_step == 0:  # a resumed run begins with a later iteration
            self.state.global_step = (iteration - 1) * numbers.updates_per_iteration
        self.state.epoch = (iteration - 1) * numbers.epochs_per_iteration
        epoch = int(self.state.epoch + 1e-9)
        if self._epoch is not None and epoch > self._epoch:
            self.call("on_epoch_end")
            self._epoch = None
        if self._epoch is None:
            self._epoch = epoch
            self.call("on_epoch_begin")
        self.call("on_step_begin")

    def phase(self, name: str) -> None:
        """Do nothing: transformers has no callbacks for phases."""

    def iteration(self, metrics: Mapping[str, Any]) -> None:
        """Call `on_step_end`, `on_log`, and `on_evaluate` if there was an evaluation.

        Args:
            metrics: content of the iteration's line in metrics.jsonl. Iteration 0 is the time before training.
        """
        line = with_trl_names(metrics)
        evaluation = {key: line.pop(key) for key in list(line) if key.startswith("eval") or key == "seconds/eval"}
        before = self.state.global_step
        self.state.global_step = int(metrics.get("updates") or 0)
        self.state.epoch = metrics["iteration"] * self._numbers.epochs_per_iteration
        if metrics["iteration"]:
            self.losses += [line["loss"]] if "loss" in line else []
            self._not_logged.append(line)
            self.call("on_step_end")
            interval, is_first = self._numbers.logging_interval, metrics["iteration"] == 1
            if (interval and self.state.global_step // interval > before // interval) or (
                is_first and self.args.logging_first_step
            ):
                self._log({**_means(self._not_logged), **self._mean_notes()})
                self._not_logged.clear()
        if "eval/accuracy" in evaluation:
            self._log({"iteration": metrics["iteration"], **evaluation})
            self.call("on_evaluate", metrics=dict(self.state.log_history[-1]))

    def saved(self, iteration: int) -> None:
        """Call `on_save`, unless it was called for this step before. The checkpoint before training is not reported."""
        if iteration and self.state.global_step != self._saved_step:
            self._saved_step = self.state.global_step
            self.call("on_save")

    def wants_to_stop(self) -> bool:
        """Return whether a callback has set `control.should_training_stop` to True."""
        return bool(self.control.should_training_stop)

    def finish(self, summary: Mapping[str, Any], run_dir: Path) -> None:
        """Call `on_epoch_end` and `on_train_end`."""
        if self._epoch is not None:
            self.call("on_epoch_end")
        self.call("on_train_end")

    def call(self, event: str, **more: Any) -> None:
        """Call the method named `event` of each callback that has it, with `more` as additional arguments."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                changed = method(self.args, self.state, self.control, **self.objects, **more)
                # A callback may return a new TrainerControl, or None.
                self.control = self.control if changed is None else changed

    def _log(self, logs: dict[str, Any]) -> None:
        """Add a log to the history, call `on_log`, and print the mean rewards as JSON."""
        logs = {**logs, "step": self.state.global_step, "epoch": self.state.epoch}
        self.state.log_history.append(logs)
        self.call("on_log", logs=logs)
        line = json.dumps({key: logs[key] for key in ("iteration", "reward", "eval_reward") if key in logs})
        without_console(lambda: print(line, flush=True))

    def _mean_notes(self) -> dict[str, float]:
        """Return the mean of the numbers noted under each name, and forget the numbers."""
        means = {name: sum(values) / len(values) for name, values in self._noted.items()}
        self._noted.clear()
        return means


def _means(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of each metric over several iterations, or its last value where a mean has no meaning."""
    means: dict[str, Any] = {}
    for key in dict.fromkeys(key for line in lines for key in line):
        values = [line[key] for line in lines if line.get(key) is not None]
        is_mean = values and not key.startswith(_OF_THE_RUN) and key not in _LAST
        means[key] = sum(values) / len(values) if is_mean else values[-1] if values else None
    return means
