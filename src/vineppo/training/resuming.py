"""Resume a run: record changed settings, choose the checkpoint it continues from, and restore its state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vineppo.objects import message_line
from vineppo.run.checkpoint import latest_checkpoint, load_checkpoint, remove_later_checkpoints
from vineppo.run.directory import RunDirectory
from vineppo.training.changes import check_has_checkpoint, describe_changes, numbered_checkpoint
from vineppo.training.parts import Parts
from vineppo.training.progress import Progress
from vineppo.types import UserError


def record_changes(run: RunDirectory, changes: Mapping[str, list[Any]], iteration: int) -> None:
    """Write changed settings to config.yaml, and what changed to run.json, with a warning that names the changes.

    Args:
        run: the run with its new settings.
        iteration: number of completed iterations when the settings changed.
    """
    if not changes:
        return
    record = run.read_record()
    warnings.warn(f"changed settings from iteration {iteration + 1} on: {describe_changes(changes)}", stacklevel=3)
    entries = [*record.get("changes", []), {"after_iteration": iteration, "settings": dict(changes)}]
    run.write_record({**record, "changes": entries})
    run.write_config(run.config)


def chosen_checkpoint(run: RunDirectory, choice: str) -> Path | None:
    """Return the checkpoint to continue from, or None if the run has none and starts from the beginning.

    Args:
        choice: `newest`; `best`, the checkpoint with the best validation accuracy; or the number of an iteration.
    Raises:
        UserError: if there is no such checkpoint, or all checkpoints are damaged.
    """
    if not check_has_checkpoint(run, choice):
        return None
    newest = latest_checkpoint(run.checkpoints)
    if choice == "newest":
        return newest
    number: Any = load_checkpoint(newest)["progress"].get("best_checkpoint") if choice == "best" else choice
    if number is None:
        raise UserError(f"--from best: no checkpoint of {run.path} has been evaluated; leave out --from")
    return numbered_checkpoint(run, str(number), choice)


def read_progress(checkpoint: Path | None) -> tuple[Progress | None, dict[str, Any]]:
    """Return the progress in a checkpoint and the whole state; (None, {}) if there is no checkpoint."""
    if checkpoint is None:
        return None, {}
    state = load_checkpoint(checkpoint)
    known = {field.name for field in fields(Progress)}
    return Progress(**{name: value for name, value in state["progress"].items() if name in known}), state


def with_changes(progress: Progress, changes: Mapping[str, list[Any]]) -> Progress:
    """Return the progress from which a run with changed settings continues.

    Accuracies on another number of problems are not comparable, so the best one is then searched anew.
    """
    if "eval.num_problems" not in changes:
        return progress
    return replace(
        progress,
        best_validation_accuracy=None,
        evaluated_iteration=None,
        evaluated_accuracy=None,
        best_checkpoint=None,
        best_checkpoint_accuracy=None,
    )


def restore(parts: Parts, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Load a checkpoint into the parts of a run.

    Raises:
        UserError: if the checkpoint does not fit the model.
    """
    try:
        parts.learner.load(checkpoint)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = message_line(error)
        raise UserError(
            f"checkpoint {checkpoint} does not fit the model or the settings of the run: {reason}; restore the model "
            "that the run started from, or start a new run"
        ) from error
    parts.update_sampler()
    set_random_state(state)


def go_back(run: RunDirectory, progress: Progress) -> None:
    """Remove what a run wrote after its checkpoint, because the resumed run repeats it.

    These are later checkpoints, metrics, rollouts, the summary and temporary files. Only a process that holds the lock
    may call this function.
    """
    remove_later_checkpoints(run.checkpoints, progress.iteration)
    run.remove_leftovers()
    run.summary.unlink(missing_ok=True)
    # Without `accuracy_before`, the run also repeats the measurement before training. Its metrics have the iteration 0.
    run.truncate_metrics(progress.iteration if progress.accuracy_before else -1)
    run.remove_rollouts(progress.iteration)


def random_state() -> dict[str, Any]:
    """Return the states of PyTorch's random number generators: of the CPU and of every GPU."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch_rng": torch.get_rng_state(), "cuda_rng": on_gpus}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned. The states of GPUs are left out if this machine has another number."""
    torch.set_rng_state(state["torch_rng"])
    on_gpus = state.get("cuda_rng", [])
    if on_gpus and torch.cuda.is_available() and torch.cuda.device_count() == len(on_gpus):
        torch.cuda.set_rng_state_all(on_gpus)
