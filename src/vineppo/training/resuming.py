"""Resume a run: which settings may change, and which checkpoint it continues from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vineppo.config.load import config_to_dict, diff_configs, settings_of
from vineppo.config.schema import Config
from vineppo.config.settings import replace
from vineppo.credit import find_algorithm
from vineppo.run.checkpoint import has_checkpoint, latest_checkpoint
from vineppo.run.directory import RunDirectory
from vineppo.run.files import write_text
from vineppo.training.configure import config_from_layers
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
    "task.grading.workers",
    "task.grading.seconds",
    "task.grading.memory",
    "task.grading.max_error_share",
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
    config = replace(config, run=replace(config.run, dir=recorded.run.dir))
    section = find_algorithm(config.algorithm).name
    allowed = {*CHANGEABLE, *(f"{section}.{name}" for name in CHANGEABLE_OF_ALGORITHMS)}
    refused = [change for change in diff_configs(recorded, config) if change.partition(":")[0] not in allowed]
    if refused:
        raise UserError(
            f"--resume {run.path} cannot change the settings of the run ({'; '.join(refused)}), because its earlier "
            "iterations depend on them; remove those options, or start a new run with them (settings that may change: "
            "learning rate, limits, memory, evaluation and checkpoint intervals, limits of grading, trackers)"
        )
    old, new = ({key: _at(config_to_dict(settings), key) for key in allowed} for settings in (recorded, config))
    return {key: [old[key], new[key]] for key in settings_of(type(config)) if key in allowed and old[key] != new[key]}


def record_changes(run: RunDirectory, config: Config, changes: Mapping[str, list[Any]], iteration: int) -> RunDirectory:
    """Write changed settings to config.yaml, with a warning that names the changes.

    Returns the run with its new settings.

    Args:
        iteration: number of completed iterations when the settings changed.
    """
    if not changes:
        return run
    texts = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())
    warnings.warn(f"changed settings from iteration {iteration + 1} on: {texts}", stacklevel=3)
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    write_text(run.path / "config.yaml", text)
    return RunDirectory.open(run.path)


def chosen_checkpoint(run: RunDirectory, choice: str) -> Path | None:
    """Return the checkpoint to continue from, or None if the run has none and starts from the beginning.

    Args:
        choice: `newest`, or the number of an iteration.
    Raises:
        UserError: if there is no such checkpoint, or all checkpoints are damaged.
    """
    if choice == "newest":
        return latest_checkpoint(run.checkpoints) if has_checkpoint(run.checkpoints) else None
    path = run.checkpoints / f"{int(choice):06d}"
    if not path.is_dir():
        raise UserError(f"{path} does not exist; allowed: newest, or the iteration of a checkpoint of {run.path}")
    return path


def check_goes_on(run: RunDirectory, limit: str) -> None:
    """Raise UserError if the run is finished and its limits do not allow a further iteration.

    Args:
        limit: the limit that the run has reached, or an empty string.
    """
    reason = json.loads(run.summary.read_text())["finish_reason"] if run.summary.exists() else "interrupted"
    if limit and reason != "interrupted":
        setting = _LIMITS.get(limit, "run.iterations")
        raise UserError(
            f"run {run.path} is finished (finish_reason: {reason}) and cannot be resumed; to train it for longer, "
            f"raise its limit with --{setting} N, or start a new run with --model.path {run.final} and another run.dir"
        )


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
