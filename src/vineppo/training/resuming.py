"""Resume a run: which settings may change, which checkpoint it continues from, and its state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vineppo.config.load import config_to_dict, diff_configs, settings_of
from vineppo.config.schema import Config
from vineppo.config.settings import replace as with_values
from vineppo.credit import find_algorithm
from vineppo.run.checkpoint import (
    has_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    remove_later_checkpoints,
)
from vineppo.run.directory import RunDirectory
from vineppo.training.configure import config_from_layers
from vineppo.training.parts import Parts
from vineppo.training.progress import Progress
from vineppo.types import UserError

CHANGEABLE = (
    "learner.lr",
    "learner.warmup_updates",
    "learner.decay",
    "learner.max_grad_norm",
    "learner.micro_batch_tokens",
    "learner.clip_low",
    "learner.clip_high",
    "learner.entropy_coefficient",
    "learner.kl.coefficient",
    "model.device",
    "model.gradient_checkpointing",
    "model.attn_implementation",
    "rollouts.max_rows",
    "rollouts.kv_memory",
    "sampler.engine",
    "task.grading.workers",
    "task.grading.seconds",
    "task.grading.memory",
    "task.grading.max_error_share",
    "guards.max_logprob_gap",
    "guards.probe_every",
    "eval.every",
    "eval.num_problems",
    "run.iterations",
    "run.max_updates",
    "run.max_tokens",
    "run.max_seconds",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.save_rollouts",
    "run.report_to",
)
"""Settings that a resumed run may change. They act on later iterations only: with another value, the iterations before
the checkpoint remain valid."""
CHANGEABLE_OF_ALGORITHMS = ("value_lr", "value_warmup_updates", "value_clip")
"""Settings in the section of an algorithm that may change too."""

_LIMITS = {"updates": "run.max_updates", "tokens": "run.max_tokens", "seconds": "run.max_seconds"}


def changed_settings(run: RunDirectory, config: Config) -> dict[str, list[Any]]:
    """Return the settings that differ from those recorded in the run: dotted key -> [old value, new value].

    `run.dir` is left out, because the directory may have been moved.

    Raises:
        UserError: if a setting differs that a resumed run must not change.
    """
    recorded = config_from_layers([(run.config, f"in {run.path}/config.yaml")])
    config = with_values(config, run=with_values(config.run, dir=recorded.run.dir))
    section = find_algorithm(config.algorithm).name
    allowed = {*CHANGEABLE, *(f"{section}.{name}" for name in CHANGEABLE_OF_ALGORITHMS)}
    changes = diff_configs(recorded, config)
    refused = [change for change in changes if change.partition(":")[0] not in allowed]
    if refused:
        raise UserError(
            f"--resume {run.path} cannot change the settings of the run ({'; '.join(refused)}), because its earlier "
            "iterations depend on them; remove those options, or start a new run with them (settings that may change: "
            "learning rate, limits, memory, evaluation and checkpoint intervals, limits of grading, trackers)"
        )
    old, new = ({key: _at(config_to_dict(settings), key) for key in allowed} for settings in (recorded, config))
    return {key: [old[key], new[key]] for key in settings_of(type(config)) if key in allowed and old[key] != new[key]}


def describe_changes(changes: Mapping[str, list[Any]]) -> str:
    """Return a text such as `learner.lr: 0.001 -> 1e-05`."""
    return "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


def record_changes(run: RunDirectory, config: Config, changes: Mapping[str, list[Any]], iteration: int) -> RunDirectory:
    """Write changed settings to config.yaml, and what changed to run.json, with a warning that names the changes.

    Returns the run with its new settings.

    Args:
        iteration: number of completed iterations when the settings changed.
    """
    if not changes:
        return run
    record = run.read_record()
    warnings.warn(f"changed settings from iteration {iteration + 1} on: {describe_changes(changes)}", stacklevel=3)
    entries = [*record.get("changes", []), {"after_iteration": iteration, "settings": dict(changes)}]
    run.write_record({**record, "changes": entries})
    run.write_config(config_to_dict(config))
    return RunDirectory.open(run.path)


def chosen_checkpoint(run: RunDirectory, choice: str) -> Path | None:
    """Return the checkpoint to continue from, or None if the run has none and starts from the beginning.

    Args:
        choice: `newest`; `best`, the checkpoint with the best validation accuracy; or the number of an iteration.
    Raises:
        UserError: if there is no such checkpoint, or all checkpoints are damaged.
    """
    if not has_checkpoint(run.checkpoints):
        if choice != "newest":
            raise UserError(f"--from {choice}: {run.path} has no checkpoint yet; leave out --from")
        return None
    newest = latest_checkpoint(run.checkpoints)
    if choice == "newest":
        return newest
    number: Any = load_checkpoint(newest)["progress"].get("best_checkpoint") if choice == "best" else choice
    if number is None:
        raise UserError(f"--from best: no checkpoint of {run.path} has been evaluated; leave out --from")
    path = run.checkpoints / f"{int(number):06d}" if str(number).isdigit() else None
    if path is None or not path.is_dir():
        present = ", ".join(str(int(entry.name)) for entry in sorted(run.checkpoints.iterdir()) if entry.name.isdigit())
        raise UserError(f"--from {choice}: allowed: newest, best, or the iteration of a checkpoint ({present})")
    return path


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


def check_goes_on(run: RunDirectory, limit: str) -> None:
    """Raise UserError if the run is finished and its limits do not allow a further iteration.

    Args:
        limit: the limit that the run has reached, or an empty string.
    """
    if limit and run.is_finished:
        setting = _LIMITS.get(limit, "run.iterations")
        reason = run.read_summary()["finish_reason"]
        raise UserError(
            f"run {run.path} is finished (finish_reason: {reason}) and cannot be resumed; to train it for longer, "
            f"raise its limit with --{setting} N, or start a new run with --model.path {run.path} and another run.dir"
        )


def restore(run: RunDirectory, parts: Parts, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Load a checkpoint into the parts of a run. Later checkpoints are removed.

    Raises:
        UserError: if the checkpoint does not fit the model.
    """
    try:
        parts.learner.load(checkpoint)
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"checkpoint {checkpoint} does not fit the model or the settings of the run: {reason}; restore the model "
            "that the run started from, or start a new run"
        ) from error
    parts.update_sampler()
    set_random_state(state)
    remove_later_checkpoints(run.checkpoints, state["progress"]["iteration"])


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


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
