"""The run directory: resolved config, metrics, rollouts, summary; and the clock of an iteration's phases.

```
config.yaml             every setting of the run
metrics.jsonl           one JSON object per iteration
rollouts/000001.parquet one file per iteration, one row per rollout (and other training sample)
checkpoints/000020/     whole checkpoints (see checkpoint.py)
final/                  the trained model
plots/, summary.json    made at the end
```
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vineppo.config.load import config_to_dict
from vineppo.run.files import fsync_directory, write_text
from vineppo.run.records import Decode, rollout_rows, write_parquet
from vineppo.types import RolloutGroup, TrainingSample, UserError


def _json_ready(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null. Numbers of NumPy and PyTorch become Python's."""
    if isinstance(value, Mapping):
        return {str(key): _json_ready(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class RunDirectory:
    """One run on disk. Make it with `create` or `open`."""

    path: Path
    config: Mapping[str, Any]
    """What config.yaml holds: plain dicts, lists and scalars."""

    @classmethod
    def create(cls, path: str | Path, config: Any) -> RunDirectory:
        """Make a new run directory and write the resolved config (a dataclass) into it.

        Raises:
            UserError: if something is there already, or if it cannot be written.
        """
        run = cls(Path(path), config_to_dict(config))
        try:
            if run.path.is_dir() and any(run.path.iterdir()):
                raise UserError(
                    f"run directory {path} exists already and is not empty; give another run.dir, or go on with that "
                    f"run by --resume {path}"
                )
            run.path.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
            write_text(run.path / "config.yaml", text)
            for directory in (run.rollouts, run.checkpoints, run.plots):
                directory.mkdir()
        except OSError as error:
            raise _unwritable(run.path, error) from error
        return run

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = True) -> RunDirectory:
        """Open an existing run directory, to go on with it or (`writable=False`) only to read it.

        Raises:
            UserError: if it is no run directory, its config.yaml is no YAML mapping, or it cannot be written.
        """
        run = Path(path)
        if not run.is_dir():
            raise UserError(f"no run directory at {path}; give the directory that `vineppo train` made")
        try:
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            if writable:
                tempfile.TemporaryFile(dir=run).close()
        except FileNotFoundError:
            raise UserError(f"{path} is no run directory: it has no config.yaml") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(f"{run / 'config.yaml'} is damaged: it is no YAML; start the run anew") from None
        except OSError as error:
            raise _unwritable(run, error) from error
        if not isinstance(config, dict):
            raise UserError(f"{run / 'config.yaml'} is damaged: it holds no settings; start the run anew")
        return cls(run, config)

    @property
    def metrics(self) -> Path:
        """One JSON object per iteration."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Directory of the Parquet files."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Directory of the trained model; not there before the end."""
        return self.path / "final"

    @property
    def plots(self) -> Path:
        """Directory of the pictures."""
        return self.path / "plots"

    @property
    def summary(self) -> Path:
        """The figures of the finished run, as JSON."""
        return self.path / "summary.json"

    def rollouts_of(self, iteration: int) -> Path:
        """The Parquet file of one iteration."""
        return self.rollouts / f"{iteration:06d}.parquet"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, on disk when this returns. NaN and infinity are written as null."""
        is_new = not self.metrics.exists()
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(_json_ready(metrics), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            fsync_directory(self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order; none where there is no file.

        A last line that a crash cut short is left out.

        Raises:
            UserError: if another line is no JSON object.
        """
        if not self.metrics.exists():
            return []
        *lines, unfinished = self.metrics.read_bytes().split(b"\n")  # a whole file ends in a newline
        del unfinished
        parsed = []
        for number, line in enumerate(lines, start=1):
            try:
                parsed.append(_parse_object(line))
            except ValueError:
                raise UserError(f"{self.metrics} is damaged: line {number} is no JSON object; remove it") from None
        return parsed

    def truncate_metrics(self, after_iteration: int) -> None:
        """Cut off the lines of later iterations, and a half-written one, atomically: before a resumed run goes on."""
        kept = [line for line in self.read_metrics() if line["iteration"] <= after_iteration]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def remove_rollouts(self, after_iteration: int) -> None:
        """Remove the Parquet files of later iterations: a resumed run samples those iterations again."""
        for path in self.rollouts.glob("*.parquet"):
            if path.stem.isdigit() and int(path.stem) > after_iteration:
                path.unlink()

    def write_rollouts(
        self, iteration: int, groups: Sequence[RolloutGroup], samples: Sequence[TrainingSample], decode: Decode
    ) -> Path:
        """Write every rollout of an iteration with its credit, and every other training sample, as Parquet (columns:
        `records.SCHEMA`), atomically.
        """
        path = self.rollouts_of(iteration)
        self.rollouts.mkdir(exist_ok=True)
        write_parquet(path, rollout_rows(iteration, groups, samples, decode))
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, atomically."""
        write_text(self.summary, json.dumps(_json_ready(summary), indent=2, allow_nan=False) + "\n")


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(f"run directory {path} cannot be written ({reason}); give another run.dir")


def _parse_object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get("iteration"), int):
        raise ValueError("no metrics line")
    return value
