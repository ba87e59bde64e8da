"""Find mistakes in the settings before PyTorch is imported and before a model is loaded.

A command calls these functions first, so that such a mistake is reported within seconds. This module does not import
PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vineppo.config.offline import OfflineConfig
from vineppo.config.schema import Config, EvalConfig, ModelConfig, SFTConfig, TaskConfig
from vineppo.model.hardware import check_device
from vineppo.model.location import NEW_TINY, only_local_copy
from vineppo.run.directory import RunDirectory
from vineppo.run.environment import require_one_process
from vineppo.run.files import check_writable
from vineppo.run.peers import launched_ranks, require_launcher
from vineppo.run.trackers import require_trackers
from vineppo.tasks.build import check_task
from vineppo.training.changes import check_resumable
from vineppo.types import Split, UserError


def check_sft(config: SFTConfig) -> None:
    """Check what `vineppo sft` needs, except what can be checked only with its model.

    Raises:
        UserError: if a launcher started several processes, if the output directory exists and is not empty or cannot
            be written, or if the model or the task cannot be used.
    """
    require_one_process()
    out = Path(config.out)
    try:
        if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
            raise UserError(
                f"out {config.out!r} already exists and is not an empty directory; give a new or empty directory"
            )
        check_writable(out)
    except OSError as error:
        raise UserError(f"out {config.out!r} cannot be written ({error.strerror}); give a writable directory") from None
    if config.model.path == NEW_TINY:
        check_device(config.model.device)
        check_task(config.task)
    else:
        check_model_and_task(config.model, config.task)


def check_offline(config: OfflineConfig) -> None:
    """Check what `vineppo offline` needs, except what can be checked only with its model.

    Args:
        config: all settings, with `run.dir` set.
    Raises:
        UserError: if a launcher started several processes, the run directory cannot be created, or the model or the
            task cannot be used.
    """
    require_one_process()
    RunDirectory.check_new(config.run.dir, resumable=False)
    check_model_and_task(config.model, config.task, needed_splits(config.eval))


def check_model_and_task(model: ModelConfig, task: TaskConfig, splits: Mapping[str, Split] | None = None) -> None:
    """Check the device, the path of the model, and the data and reward functions of the task.

    Args:
        splits: the splits that are needed, as in `check_task`.
    Raises:
        UserError: if one of them cannot be used.
    """
    check_device(model.device)
    only_local_copy(model.path)
    check_task(task, splits)


def check_resume(config: Config, checkpoint: str) -> None:
    """Check what a resumed run needs, except what can be checked only with its checkpoint and its model.

    Args:
        config: all settings, with the directory of the run as `run.dir`.
        checkpoint: the checkpoint to continue from: `newest`, `best` or the number of an iteration.
    Raises:
        UserError: if the run cannot be resumed with these settings or from this checkpoint, or if a tracker, the model
            or the task cannot be used.
    """
    require_launcher()
    if launched_ranks()[0]:  # Rank 0 checks, and may have changed the files already.
        return
    check_resumable(RunDirectory.open(config.run.dir), config, checkpoint)
    require_trackers(config.run.report_to)
    check_model_and_task(config.model, config.task, needed_splits(config.eval))


def check_new_run(config: Config, *, model: bool = True, task: bool = True) -> None:
    """Check what a new run needs, except what can be checked only with its model.

    Args:
        config: all settings, with `run.dir` set.
        model: whether the model is loaded from `config.model`. False if it is already in memory.
        task: whether the task reads its data and reward functions from `config.task`. False if they are in memory.
    Raises:
        UserError: if the run directory cannot be created, a tracker is not installed, or the model or the task cannot
            be used.
    """
    require_launcher()
    if launched_ranks()[0]:  # Rank 0 checks, and may have created the directory already.
        return
    RunDirectory.check_new(config.run.dir)
    require_trackers(config.run.report_to)
    if model:
        check_device(config.model.device)
        only_local_copy(config.model.path)
    if task:
        check_task(config.task, needed_splits(config.eval))


def needed_splits(settings: EvalConfig) -> dict[str, Split]:
    """Return the setting that selects the split of the final evaluation, and the split."""
    return {"eval.split": settings.split} if settings.final_num_problems else {}
