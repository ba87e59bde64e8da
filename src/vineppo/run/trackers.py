"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio behind two verbs, log and close."""

from __future__ import annotations

import importlib
import math
import os
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from vineppo.run.files import write_text
from vineppo.types import UserError

PROJECT = "vineppo"
"""Project that runs are listed under at Weights & Biases and trackio."""
_MODULES = {
    "tensorboard": ("torch.utils.tensorboard", "SummaryWriter"),
    "wandb": ("wandb", "init"),
    "trackio": ("trackio", "init"),
}


class Tracker(Protocol):
    """Where metrics are shown beside metrics.jsonl."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Show the finite numbers among the metrics at an iteration; the rest is left out."""
        ...

    def close(self) -> None:
        """Send what is pending and let go."""
        ...


class TensorBoardTracker:
    """Event files in the run directory's `tensorboard/`."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], start: int) -> None:
        writer = _load("tensorboard").SummaryWriter
        # Points past the checkpoint that a run resumes from are hidden, as they are cut from metrics.jsonl.
        self._writer = writer(run_dir / "tensorboard", purge_step=start + 1 if start else None)
        if not start:
            self._writer.add_text("config", _config_table(config))

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """One point per finite number."""
        for name, value in _finite(metrics).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending."""
        self._writer.close()


class WandbTracker:
    """A run at Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like have their usual meaning."""

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
                f"wandb did not start: {reason}; log in by `wandb login`, set WANDB_MODE=offline, or take wandb out of "
                "run.report_to"
            ) from None

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the finite numbers."""
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()


class TrackioTracker:
    """A run in trackio's local store."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any]) -> None:
        name = f"{run_dir.name}-{_tracker_id(run_dir)}"
        self._run = _load("trackio").init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Send the finite numbers."""
        self._run.log(_finite(metrics), step=step)

    def close(self) -> None:
        """Send what is pending."""
        self._run.finish()


def require_trackers(report_to: Iterable[str]) -> None:
    """Refuse early, before a run directory is made.

    Raises:
        UserError: if a tracker is unknown or its package is not installed.
    """
    for name in report_to:
        _load(name)


def build_trackers(
    report_to: Iterable[str], run_dir: str | Path, config: Mapping[str, Any], start: int = 0
) -> list[Tracker]:
    """The trackers that `run.report_to` names, in its order.

    Args:
        config: the resolved settings, as plain dicts, lists and scalars.
        start: completed iterations when a run is resumed, else 0.
    Raises:
        UserError: if a tracker is unknown, its package is not installed, or it does not start.
    """
    names = tuple(report_to)
    require_trackers(names)
    return [_build(name, Path(run_dir), config, start) for name in names]


def _build(name: str, run_dir: Path, config: Mapping[str, Any], start: int) -> Tracker:
    if name == "tensorboard":
        return TensorBoardTracker(run_dir, config, start)
    if name == "wandb":
        return WandbTracker(run_dir, config)
    return TrackioTracker(run_dir, config)


def _load(name: str) -> Any:
    if name not in _MODULES:
        raise UserError(f"run.report_to has {name}; allowed: {', '.join(_MODULES)}")
    module_name, needed = _MODULES[name]
    try:
        module = importlib.import_module(module_name)
        getattr(module, needed)  # a mere directory of that name, as wandb leaves one, imports as an empty module
    except (ImportError, AttributeError):
        raise UserError(
            f'run.report_to has {name}, which is not installed; install it by `pip install "vineppo[tracking]"`, or '
            f"take it out of run.report_to"
        ) from None
    return module


def _finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _config_table(config: Mapping[str, Any], prefix: str = "") -> str:
    """The settings as indented lines, which TensorBoard's Markdown shows as they are."""
    lines = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            lines.append(_config_table(value, f"{prefix}{key}."))
        else:
            lines.append(f"    {prefix}{key}: {value}")
    return "\n".join(lines)


def _tracker_id(run_dir: Path) -> str:
    """A name that no other run has, kept in the run directory so that a resumed run is the same run to a tracker."""
    path = run_dir / "tracker_id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
