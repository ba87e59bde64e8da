"""Read and write the directory of a run. The directory contains:

```
config.yaml             every setting of the run
run.json                recipe, version of the package, whether the model was in memory, settings changed on a resume
metrics.jsonl           one JSON object per iteration
rollouts/000001.parquet one file per iteration, one row per rollout and per other training sample
checkpoints/000020/     checkpoints (see checkpoint.py)
final/                  the trained model
plots/, summary.json    written at the end
report.md, report.html  written at the end (see view/report.py)
view.html               all saved responses, written at the end of short runs (see view/page.py)
exports/                data sets (see view/export.py)
tensorboard/, tracker_id  written for experiment trackers (see trackers.py)
.lock                   locked by the process that trains (see lock.py)
```
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vineppo.config.load import config_to_dict
from vineppo.run.environment import package_version
from vineppo.run.files import check_writable, fsync_directory, json_ready, remove_tree, write_text
from vineppo.run.lock import LOCK_FILE
from vineppo.run.records import Decode, rollout_rows, write_parquet
from vineppo.types import RolloutGroup, TrainingSample, UserError

_BEFORE_CONFIG = (LOCK_FILE, "run.json", ".run.json.tmp", ".config.yaml.tmp")
"""Files that are written to a new run directory before config.yaml is complete."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run. Call `create` or `open` to get an instance."""

    path: Path
    """Path of the directory."""
    config: Mapping[str, Any]
    """The content of config.yaml: plain dicts, lists and scalars."""

    @classmethod
    def create(cls, path: str | Path, config: Any, recipe: str = "", *, in_memory: bool = False) -> RunDirectory:
        """Create a new run directory and write config.yaml and run.json to it.

        Args:
            path: path of the directory, which must not exist or must be empty.
            config: a `vineppo.config.schema.Config` with all settings of the run.
            recipe: name of the recipe.
            in_memory: whether the starting model was passed in memory and not loaded from `config.model.path`.
        Raises:
            UserError: if the directory exists and is not empty, or cannot be written.
        """
        run = cls(Path(path), config_to_dict(config))
        run.make_folder()
        try:
            # With config.yaml the directory is a run. If the process is killed before, the directory counts as new.
            run.write_record({"recipe": recipe, "vineppo": package_version(), "model_in_memory": in_memory})
            run.write_config(run.config)
            for directory in (run.rollouts, run.checkpoints, run.plots):
                directory.mkdir()
        except OSError as error:
            raise _unwritable(run.path, error) from error
        return run

    @classmethod
    def check_new(cls, path: str | Path, *, resumable: bool = True) -> None:
        """Check that `create` can create the directory. Nothing is left behind.

        Args:
            resumable: whether a run of this kind can be resumed, which the error message then suggests.
        Raises:
            UserError: if the directory exists and is not empty, or cannot be written.
        """
        run = cls(Path(path), {})
        try:
            run._require_new(resumable)
            check_writable(run.path)
        except OSError as error:
            raise _unwritable(run.path, error) from error

    def make_folder(self) -> None:
        """Create the folder of a new run. It may contain what a process wrote that was killed before it had started.

        Raises:
            UserError: if the folder exists and is not empty, or cannot be created.
        """
        try:
            self._require_new()
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _require_new(self, resumable: bool = True) -> None:
        """Raise UserError if the directory contains more than what is written before config.yaml."""
        if self.path.is_dir() and any(entry.name not in _BEFORE_CONFIG for entry in self.path.iterdir()):
            advice = f", or continue that run with --resume {self.path}" if resumable else ""
            raise UserError(f"run directory {self.path} already exists and is not empty; give another run.dir{advice}")

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = True) -> RunDirectory:
        """Open an existing run directory.

        Args:
            path: path of the directory.
            writable: whether to check that files can be written to the directory. Pass False in order to only read it.
        Raises:
            UserError: if `path` is not a run directory, if config.yaml is not a YAML mapping, or if `writable` is true
                and the directory cannot be written.
        """
        run = Path(path)
        if not run.is_dir():
            raise UserError(f"no run directory at {path}; give a directory that `vineppo train` created")
        try:
            config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
            if writable:
                tempfile.TemporaryFile(dir=run).close()  # raises OSError if the directory cannot be written
                (run / "checkpoints").mkdir(exist_ok=True)  # raises OSError for a link whose target is gone
        except FileNotFoundError:
            raise UserError(f"{path} is not a run directory: it has no config.yaml") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise UserError(f"{run / 'config.yaml'} is damaged: it is not valid YAML; start a new run") from None
        except OSError as error:
            raise _unwritable(run, error) from error
        if not isinstance(config, dict):
            raise UserError(f"{run / 'config.yaml'} is damaged: it contains no settings; start a new run")
        return cls(run, config)

    @property
    def source(self) -> str:
        """The source of the run's settings in error messages, with the version that wrote them if it is another one."""
        writer = self.read_record().get("vineppo")
        other = f" (written by vineppo {writer}; this is vineppo {package_version()})"
        return f"in {self.path}/config.yaml" + (other if writer not in (None, package_version()) else "")

    @property
    def metrics(self) -> Path:
        """Path of the file with the metrics, which has one JSON object per line and one line per iteration."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Directory of the Parquet files with the rollouts."""
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """Directory of the trained model. It is created at the end of the run."""
        return self.path / "final"

    @property
    def plots(self) -> Path:
        """Directory of the plots."""
        return self.path / "plots"

    @property
    def summary(self) -> Path:
        """Path of the JSON file with the results of the run."""
        return self.path / "summary.json"

    def rollouts_of(self, iteration: int) -> Path:
        """Return the path of the Parquet file with the rollouts of an iteration. Iterations are counted from 1."""
        return self.rollouts / f"{iteration:06d}.parquet"

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append metrics as one line to metrics.jsonl, and force the file to disk. NaN and infinity become null.

        The line is written by one system call and ends with a line break, so a last line without one is incomplete. If
        the disk is full, the part that was written is removed again.
        """
        is_new = not self.metrics.exists()
        line = (json.dumps(json_ready(metrics), allow_nan=False) + "\n").encode()
        with open(self.metrics, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                written = file.write(line) or 0
                while written < len(line):
                    written += file.write(line[written:]) or 0
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if is_new:
            fsync_directory(self.path)

    def read_record(self) -> dict[str, Any]:
        """Return the content of run.json; empty if the file is missing, as in runs of earlier versions, or damaged."""
        return _read_object(self.path / "run.json")

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json, atomically."""
        write_text(self.path / "run.json", json.dumps(json_ready(record), indent=2) + "\n")

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml, atomically."""
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def read_summary(self) -> dict[str, Any]:
        """Return the content of summary.json; empty if the file is missing or damaged."""
        return _read_object(self.summary)

    @property
    def is_finished(self) -> bool:
        """Whether the run has reached its end. A run that was interrupted has not."""
        return self.read_summary().get("finish_reason") not in (None, "interrupted")

    def remove_leftovers(self) -> None:
        """Remove temporary files that a killed process left. Only a process that holds the lock may call this."""
        for folder in (self.path, self.rollouts, self.checkpoints, self.plots):
            for path in folder.glob(".*.tmp"):
                remove_tree(path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl as dictionaries, or an empty list if the file does not exist.

        A crash can leave an incomplete last line behind. Such a line is ignored.

        Raises:
            UserError: if any other line is not a JSON object with the key `iteration`.
        """
        if not self.metrics.exists():
            return []
        # The text after the last newline is empty, or it is an incomplete line.
        *lines, unfinished = self.metrics.read_bytes().split(b"\n")
        del unfinished
        parsed = []
        for number, line in enumerate(lines, start=1):
            try:
                parsed.append(_parse_object(line))
            except ValueError:
                raise UserError(
                    f"{self.metrics} is damaged: line {number} is not a JSON object; remove that line"
                ) from None
        return parsed

    def truncate_metrics(self, after_iteration: int) -> None:
        """Remove the lines of iterations after `after_iteration` from metrics.jsonl, and an incomplete last line.

        This function is called when a run is resumed, because the run then repeats these iterations. The file is
        replaced atomically.
        """
        kept = [line for line in self.read_metrics() if line["iteration"] <= after_iteration]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))

    def remove_rollouts(self, after_iteration: int) -> None:
        """Remove the Parquet files of iterations after `after_iteration`.

        This function is called when a run is resumed, because the run then repeats these iterations.
        """
        for path in self.rollouts.glob("*.parquet"):
            if path.stem.isdigit() and int(path.stem) > after_iteration:
                path.unlink()

    def write_rollouts(
        self,
        iteration: int,
        groups: Sequence[RolloutGroup],
        samples: Sequence[TrainingSample],
        decode: Decode,
        entropies: Sequence[Sequence[float]] = (),
    ) -> Path:
        """Write the rollouts and training samples of an iteration to a Parquet file, atomically.

        Args:
            iteration: number of the iteration, counted from 1.
            groups: the rollouts.
            samples: the training samples that the credit function returned.
            decode: function that converts token ids to text.
            entropies: entropies of the trained tokens of each sample, in the order of `samples`; empty if unknown.
        Returns:
            The path of the file. It has the columns of `records.SCHEMA`.
        """
        path = self.rollouts_of(iteration)
        self.rollouts.mkdir(exist_ok=True)
        write_parquet(path, rollout_rows(iteration, groups, samples, decode, entropies))
        return path

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the results of the run to summary.json, atomically. NaN and infinity become null."""
        write_text(self.summary, json.dumps(json_ready(summary), indent=2, allow_nan=False) + "\n")


def _unwritable(path: Path, error: OSError) -> UserError:
    """Return the error for a run directory that cannot be written."""
    reason = error.strerror or type(error).__name__
    return UserError(f"run directory {path} cannot be written ({reason}); give another run.dir")


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _parse_object(line: bytes) -> dict[str, Any]:
    """Return a line of metrics.jsonl as a dictionary.

    Raises:
        ValueError: if the line is not a JSON object with an integer under the key `iteration`.
    """
    value = json.loads(line)
    if not isinstance(value, dict) or not isinstance(value.get("iteration"), int):
        raise ValueError("no metrics line")
    return value
