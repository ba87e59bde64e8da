"""Find the model that the setting `model.path` names: a directory, a model of the package or a name on the hub.

This module does not import PyTorch, so that a wrong path is reported at once.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from vineppo.config.hub import is_repository_name, needs_local_copy
from vineppo.config.messages import did_you_mean
from vineppo.types import UserError

EMBEDDED = "embedded:"
"""Beginning of a `model.path` that names a small model included in the package."""
NEW_TINY = "new:tiny"
"""The `model.path` with which `vineppo sft` starts from a tiny model with random weights."""
_CHECKPOINTS = "checkpoints"
_ENDINGS = (".yaml", ".yml", ".json", ".jsonl", ".safetensors", ".bin", ".pt", ".gguf")
"""Endings of names of files, which are not names of models on the hub."""


def resolve_model_path(path: str) -> str:
    """Return the directory or hub id of a model from the setting `model.path`. The hub is not asked.

    A path of the form `embedded:NAME` names a small model included in the package. The result is then the directory of
    this model. For the directory of a run, the result is its final model or its newest checkpoint.

    Raises:
        UserError: if the package has no model NAME, a local path is not a model directory, or the text looks like a
            path that does not exist.
    """
    if path.startswith(EMBEDDED):
        names, name = _embedded_names(), path[len(EMBEDDED) :]
        if name not in names:
            known = ", ".join(EMBEDDED + n for n in names) or "none, the package contains no models"
            raise UserError(f"model.path is {path!r}, but the package does not include this model; allowed: {known}")
        return str(_models() / name)
    local = Path(path).expanduser()
    if path and is_run(local):
        from vineppo.model.of_run import model_of_run  # imports PyTorch

        return str(model_of_run(local))
    if run_of_checkpoint(local):
        if not local.is_dir():
            raise UserError(
                f"model.path {path!r} does not exist any more: its run has removed that checkpoint; give another one, "
                "and keep it with run.keep_checkpoints or copy it"
            )
        return str(local)
    if path and local.is_dir():
        if not (local / "config.json").exists():
            raise UserError(f"model.path {path!r} has no config.json; give a directory written by save_pretrained")
        return str(local)
    if path and local.is_file():
        raise UserError(f"model.path {path!r} is a file; give a directory written by save_pretrained")
    if _looks_like_a_path(path) or not is_repository_name(path):
        raise UserError(f"model.path {path!r} does not exist; give a model directory or a hub id such as org/name")
    return path


def only_local_copy(path: str) -> bool:
    """Check that the model with this `model.path` can be loaded. Return whether hub requests would fail.

    Raises:
        UserError: if `resolve_model_path` raises it, or if the hub does not have the model or cannot be reached and the
            model has not been downloaded before.
    """
    resolved = resolve_model_path(path)
    if Path(resolved).is_dir():
        return False
    hint = did_you_mean(path, _embedded_names(), EMBEDDED)
    advice = "give an existing model directory, or a hub id such as org/name while the hub can be reached"
    return needs_local_copy(f"model.path {path!r}", path, "model", hint or advice)


def is_run(path: Path) -> bool:
    """Return whether a path is the directory of a run, and not a model directory."""
    return (path / "config.yaml").is_file() and not (path / "config.json").exists()


def run_of_checkpoint(path: Path) -> Path | None:
    """Return the directory of the run if `path` is a checkpoint in it, such as `runs/a/checkpoints/000020`."""
    return path.parents[1] if path.parent.name == _CHECKPOINTS and is_run(path.parents[1]) else None


def _looks_like_a_path(path: str) -> bool:
    """Return whether a text that is no existing directory was meant as a path and not as a hub id.

    `runs/` is the folder of run directories, and `final` is the model in one of them.
    """
    return (
        path.startswith((".", "/", "~", "runs/"))
        or path.endswith(("/", "/final", *_ENDINGS))
        or path.count("/") > 1
        or not path
    )


def _models() -> Path:
    return Path(str(importlib.resources.files("vineppo") / "models"))


def _embedded_names() -> list[str]:
    """Return the sorted names of the models that are included in the package."""
    return sorted(path.name for path in _models().glob("*/") if (path / "config.json").exists())
