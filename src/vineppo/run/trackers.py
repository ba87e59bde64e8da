"""Send metrics to experiment trackers: TensorBoard, Weights & Biases and trackio."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from vineppo.objects import first_line
from vineppo.run.files import write_text
from vineppo.types import UserError

PROJECT = "vineppo"
"""Project name in trackio, and in Weights & Biases unless WANDB_PROJECT is set."""
_MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""Name of a tracker, which is also the name of its package -> module to import."""


class Tracker(Protocol):
    """An experiment tracker. It receives the metrics of each iteration."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Record the metrics of an iteration. Values that are not finite numbers are left out.

        Args:
            metrics: name of the metric -> value.
            step: number of the iteration, which is the x coordinate in the tracker.
        """
        ...

    def close(self) -> None:
        """Write or send all pending data, and close the tracker."""
        ...


class TensorBoardTracker:
    """Write event files for TensorBoard to `tensorboard/` in the run directory.

    Args:
        run_dir: directory of the run.
        config: all settings of the run, which are shown as a text in TensorBoard.
        start: number of completed iterations if the run is resumed, else 0.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], start: int) -> None:
        writer = _load("tensorboard").SummaryWriter
        # A resumed run repeats the iterations after its checkpoint. `purge_step` hides their earlier points.
        self._writer = writer(run_dir / "tensorboard", purge_step=start + 1 if start else None)
        if not start:
            self._writer.add_text("config", _config_table(config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add one point for each metric that is a finite number."""
        for name, value in _finite(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write pending data."""
        self._writer.close()


class WandbTracker:
    """Log to Weights & Biases. Environment variables such as WANDB_PROJECT and WANDB_MODE have their usual effect.

    Args:
        run_dir: directory of the run. Its name is the name of the run in Weights & Biases.
        config: all settings of the run.
    Raises:
        UserError: if wandb is not installed or does not start, for example because the user is not logged in.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        wandb = _load("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_dir.name,
                id=_tracker_id(run_dir),
                dir=str(run_dir),
                config=dict(config),
                resume="allow",
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"wandb did not start: {reason}; log in with `wandb login`, set WANDB_MODE=offline, or remove wandb "
                "from run.report_to"
            ) from None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the metrics that are finite numbers."""
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        """Send all pending data and finish the run in Weights & Biases."""
        self._run.finish()


class TrackioTracker:
    """Log to the local database of trackio.

    Args:
        run_dir: directory of the run. Its name is part of the name of the run in trackio.
        config: all settings of the run.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        name = f"{run_dir.name}-{_tracker_id(run_dir)}"
        self._run = _load("trackio").init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the metrics that are finite numbers."""
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        """Write all pending data and finish the run in trackio."""
        self._run.finish()


def require_trackers(report_to: Iterable[str]) -> None:
    """Check that the packages of the trackers are installed, without importing them, because this takes seconds.

    The training loop calls this function before it creates the run directory, so that no directory is left behind.

    Args:
        report_to: names of the trackers.
    Raises:
        UserError: if a tracker is unknown or its package is not installed.
    """
    for name in report_to:
        if name not in _MODULES:
            raise UserError(f"run.report_to has {name}; allowed: {', '.join(_MODULES)}")
        # Without the package, Python finds a directory of the same name, such as the log directory `wandb`. It has no
        # file of its own as origin.
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise _not_installed(name)


def build_trackers(
    report_to: Iterable[str], run_dir: str | Path, config: Mapping[str, Any], start: int = 0
) -> list[Tracker]:
    """Create the trackers that the setting `run.report_to` lists, in the same order.

    Args:
        report_to: names of the trackers.
        run_dir: directory of the run.
        config: all settings of the run, as nested dicts, lists and scalars.
        start: number of completed iterations if the run is resumed, else 0.
    Raises:
        UserError: if a tracker is unknown, its package is not installed, or the tracker does not start.
    """
    names = tuple(report_to)
    require_trackers(names)
    return [TolerantTracker(name, _started(name, Path(run_dir), config, start)) for name in names]


class TolerantTracker:
    """Wraps a tracker, so that its failures do not end the run. The first failure is a warning."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._warned = False

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the metrics of an iteration to the tracker."""
        self._tolerate(lambda: self._tracker.log(metrics, step), f"at iteration {step}")

    def close(self) -> None:
        """Close the tracker."""
        self._tolerate(self._tracker.close, "at the end of the run")

    def _tolerate(self, call: Callable[[], None], when: str) -> None:
        try:
            call()
        except Exception as error:
            if not self._warned:
                warnings.warn(
                    f"the tracker {self._name} failed {when} ({first_line(error)}); the run goes on, and metrics.jsonl "
                    "has all metrics; later failures of this tracker are not reported",
                    stacklevel=4,
                )
            self._warned = True


def _started(name: str, run_dir: Path, config: Mapping[str, Any], start: int) -> Tracker:
    try:
        return _build(name, run_dir, config, start)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the tracker {name} did not start ({first_line(error)}); mend that, or remove {name} from run.report_to"
        ) from error


def _build(name: str, run_dir: Path, config: Mapping[str, Any], start: int) -> Tracker:
    """Create the tracker with a name. See `build_trackers` for the other arguments."""
    if name == "tensorboard":
        return TensorBoardTracker(run_dir, config, start)
    if name == "wandb":
        return WandbTracker(run_dir, config)
    return TrackioTracker(run_dir, config)


def _load(name: str) -> Any:
    """Import and return the module of a tracker.

    Raises:
        UserError: if the package of the tracker cannot be imported.
    """
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        raise _not_installed(name) from None


def _not_installed(name: str) -> UserError:
    return UserError(
        f'run.report_to has {name}, which is not installed; install it with `pip install "vineppo[tracking]"`, or '
        f"remove it from run.report_to"
    )


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are finite numbers."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _config_table(config: Mapping[str, Any], prefix: str = "") -> str:
    """Return the settings as text with one line `key: value` per setting. Keys are dotted.

    The lines are indented by four spaces, so that TensorBoard, which reads Markdown, shows them as a code block.

    Args:
        config: nested settings.
        prefix: dotted key of the section that `config` contains, followed by a dot, such as `learner.kl.`; empty if
            `config` contains all settings.
    """
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines.append(_config_table(value, f"{prefix}{key}."))
        else:
            lines.append(f"    {prefix}{key}: {value}")
    return "\n".join(lines)


def _tracker_id(run_dir: Path) -> str:
    """Return an id of 8 random hexadecimal digits that identifies the run in Weights & Biases and trackio.

    The id is stored in the file `tracker_id` in the run directory. A resumed run finds the id there, so that the
    tracker continues the same run.
    """
    path = run_dir / "tracker_id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
