"""Use the model of a run: its final model, or the model in a checkpoint of a run that did not finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vineppo.config.load import settings_from_layers
from vineppo.config.schema import ModelConfig
from vineppo.config.settings import replace
from vineppo.model.location import is_run, run_of_checkpoint
from vineppo.run.checkpoint import has_checkpoint, latest_checkpoint
from vineppo.run.directory import RunDirectory
from vineppo.types import UserError


def model_of_run(path: Path) -> Path:
    """Return the directory of the newest model of a run: `final` if it is finished, or else its newest checkpoint.

    Raises:
        UserError: if the run has no undamaged checkpoint yet.
    """
    run = RunDirectory.open(path, writable=False)
    if run.final.is_dir() and (run.is_finished or not has_checkpoint(run.checkpoints)):
        return run.final
    if not has_checkpoint(run.checkpoints):
        raise UserError(
            f"{path} has no model yet: no checkpoint is complete; continue it with `vineppo train --resume {path}`"
        )
    return latest_checkpoint(run.checkpoints)


def started_from(config: ModelConfig) -> ModelConfig:
    """Return the model settings of a new run. If `path` is a run, it becomes the directory of its newest model.

    That model is recorded in the new run, so that a resume never starts from a later model of a run that went on.
    """
    local = Path(config.path).expanduser()
    return replace(config, path=str(model_of_run(local))) if config.path and is_run(local) else config


def base_of_checkpoint(config: ModelConfig) -> ModelConfig:
    """Return the settings of the model that the run of a checkpoint started from.

    Adapters and path are those of that run; data type, device and the other settings are those of `config`.

    Args:
        config: model settings whose path is a checkpoint.
    Raises:
        UserError: if the checkpoint contains adapters of a model that was passed in memory.
    """
    run, recorded = _recorded(config)
    if recorded.lora.r and run.read_record().get("model_in_memory"):
        raise UserError(
            f"{config.path} contains adapters of a model that a script passed in memory; finish that run, and use "
            f"{run.final}"
        )
    return replace(config, path=recorded.path, lora=recorded.lora)


def dtype_of_checkpoint(config: ModelConfig) -> str:
    """Return the data type with which the run of a checkpoint loaded its starting model.

    Args:
        config: model settings whose path is a checkpoint.
    """
    return _recorded(config)[1].dtype


def _recorded(config: ModelConfig) -> tuple[RunDirectory, ModelConfig]:
    """Return the run of a checkpoint, and the model settings of this run."""
    folder = run_of_checkpoint(Path(config.path).expanduser())
    assert folder is not None
    run = RunDirectory.open(folder, writable=False)
    section: Any = run.config.get("model", {})
    return run, settings_from_layers(ModelConfig, [(section, run.source)])
