"""Check whether a run can be resumed: which settings may change, and which checkpoints it can continue from.

This module does not import PyTorch, so that a command can report a mistake at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vineppo.config.load import config_to_dict, diff_configs, settings_of
from vineppo.config.schema import Config
from vineppo.config.settings import replace as with_values
from vineppo.credit import find_algorithm
from vineppo.run.checkpoint import has_checkpoint
from vineppo.run.directory import RunDirectory
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
    "learner.importance_sampling_cap",
    "learner.entropy_coefficient",
    "learner.kl.coefficient",
    "model.device",
    "model.gradient_checkpointing",
    "model.attn_implementation",
    "rollouts.max_rows",
    "rollouts.kv_memory",
    "sampler.engine",
    "sampler.check_every",
    "sampler.graph",
    "sampler.vllm.dtype",
    "sampler.vllm.gpu_memory_share",
    "sampler.vllm.devices",
    "sampler.vllm.sleep",
    "sampler.vllm.max_length",
    "sampler.vllm.enforce_eager",
    "sampler.vllm.transfer",
    "sampler.vllm.max_gap",
    "sampler.pool",
    "sampler.workers",
    "sampler.address",
    "task.grading.workers",
    "task.grading.pool",
    "task.grading.seconds",
    "task.grading.memory",
    "task.grading.max_error_share",
    "guards.max_logprob_gap",
    "guards.max_logprob_excess",
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
    "run.save_continuations",
    "run.report_to",
)
"""Settings that a resumed run may change. They act on later iterations only: with another value, the iterations before
the checkpoint remain valid."""
CHANGEABLE_OF_ALGORITHMS = ("value_lr", "value_warmup_updates", "value_clip")
"""Settings in the section of an algorithm that may change too."""

_LIMITS = {"updates": "run.max_updates", "tokens": "run.max_tokens", "seconds": "run.max_seconds"}


def changed_settings(run: RunDirectory, config: Config, *, any_change: bool = False) -> dict[str, list[Any]]:
    """Return the settings that differ from those recorded in the run: dotted key -> [old value, new value].

    `run.dir` is left out, because the directory may have been moved.

    Args:
        any_change: whether every setting may change, because no iteration depends on the settings yet.
    Raises:
        UserError: if a setting differs that a resumed run must not change.
    """
    recorded = config_from_layers([(run.config, run.source)])
    config = with_values(config, run=with_values(config.run, dir=recorded.run.dir))
    section = find_algorithm(config.algorithm).name
    allowed = {*CHANGEABLE, *(f"{section}.{name}" for name in CHANGEABLE_OF_ALGORITHMS)}
    if any_change:
        allowed = {*settings_of(type(recorded)), *settings_of(type(config))}
    changes = diff_configs(recorded, config)
    refused = [change for change in changes if change.partition(":")[0] not in allowed]
    if refused:
        raise UserError(
            f"--resume {run.path} cannot change the settings of the run ({'; '.join(refused)}), because its earlier "
            "iterations depend on them; remove those options, or start a new run with them (settings that may change: "
            "learning rate, limits, memory, evaluation and checkpoint intervals, limits of grading, trackers)"
        )
    old, new = ({key: _at(config_to_dict(settings), key) for key in allowed} for settings in (recorded, config))
    keys = dict.fromkeys([*settings_of(type(config)), *settings_of(type(recorded))])
    return {key: [old[key], new[key]] for key in keys if key in allowed and old[key] != new[key]}


def describe_changes(changes: Mapping[str, list[Any]]) -> str:
    """Return a text such as `learner.lr: 0.001 -> 1e-05`."""
    return "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


def check_resumable(run: RunDirectory, config: Config, choice: str) -> None:
    """Check what can be checked before a checkpoint is loaded.

    Args:
        choice: the checkpoint to continue from, as in `resuming.chosen_checkpoint`.
    Raises:
        UserError: if a setting differs that must not change, if there is no such checkpoint, or if the run is finished
            and continues from its newest checkpoint without a change of its limits.
    """
    changes = changed_settings(run, config, any_change=not has_checkpoint(run.checkpoints))
    check_has_checkpoint(run, choice)
    if choice not in ("newest", "best"):
        numbered_checkpoint(run, choice, choice)
    reason = str(run.read_summary().get("finish_reason"))
    limits = {"iterations": "run.iterations", **_LIMITS}
    if choice == "newest" and reason in limits and not set(changes) & set(limits.values()):
        check_goes_on(run, reason)


def check_has_checkpoint(run: RunDirectory, choice: str) -> bool:
    """Return whether the run has a checkpoint.

    Raises:
        UserError: if it has none and is finished, because starting it again would overwrite its results, or if it has
            none and `choice` is not `newest`.
    """
    if has_checkpoint(run.checkpoints):
        return True
    if run.is_finished:
        raise UserError(
            f"run {run.path} is finished and has no checkpoint (`vineppo compare` removes those of finished runs "
            "unless run.keep_checkpoints is set), so it cannot be continued; start a new run with "
            f"--model.path {run.path} and another run.dir"
        )
    if choice != "newest":
        raise UserError(f"--from {choice}: {run.path} has no checkpoint yet; leave out --from")
    return False


def numbered_checkpoint(run: RunDirectory, number: str, choice: str) -> Path:
    """Return the checkpoint of an iteration.

    Args:
        number: the number of the iteration, as text.
        choice: the value of `--from`, for the error message.
    Raises:
        UserError: if there is no such checkpoint.
    """
    paths = {str(int(path.name)): path for path in sorted(run.checkpoints.iterdir()) if path.name.isdecimal()}
    path = paths.get(number.lstrip("0") or "0")
    if path is None or not path.is_dir():
        raise UserError(
            f"--from {choice}: allowed: newest, best, or the iteration of a checkpoint ({', '.join(paths)})"
        )
    return path


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


def _at(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
