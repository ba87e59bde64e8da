"""Load a causal language model and its tokenizer from a directory, a run, the Hugging Face hub or the package."""

from __future__ import annotations

import contextlib
import importlib.resources
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vineppo.config.schema import ModelConfig
from vineppo.config.settings import replace
from vineppo.model.hardware import cpu_multiplies
from vineppo.model.lora import load_trained_state, with_adapters
from vineppo.model.modes import with_checkpointing
from vineppo.model.of_run import base_of_checkpoint, is_run, model_of_run, run_of_checkpoint
from vineppo.run.checkpoint import read_state, verify_checkpoint
from vineppo.types import UserError

EMBEDDED = "embedded:"
"""Beginning of a `model.path` that names a small model included in the package."""


def resolve_model_path(path: str) -> str:
    """Return the directory or hub id of a model from the setting `model.path`.

    A path of the form `embedded:NAME` names a small model included in the package. The result is then the directory of
    this model. For the directory of a run, the result is its final model or its newest checkpoint.

    Raises:
        UserError: if the package has no model NAME, or a local path is not a model directory.
    """
    if path.startswith(EMBEDDED):
        root = Path(str(importlib.resources.files("vineppo") / "models"))
        names = sorted(p.name for p in root.glob("*/") if (p / "config.json").exists())
        name = path[len(EMBEDDED) :]
        if name not in names:
            known = ", ".join(EMBEDDED + n for n in names) or "none, the package contains no models"
            raise UserError(f"model.path is {path!r}, but the package does not include this model; allowed: {known}")
        return str(root / name)
    local = Path(path).expanduser()
    if path and is_run(local):
        return str(model_of_run(local))
    if run_of_checkpoint(local):
        if not local.is_dir():
            raise UserError(
                f"model.path {path!r} does not exist any more: its run has removed that checkpoint; give another one, "
                "and keep it with run.keep_checkpoints or copy it"
            )
    elif path and local.is_dir():
        if not (local / "config.json").exists():
            raise UserError(f"model.path {path!r} has no config.json; give a directory written by save_pretrained")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise UserError(f"model.path {path!r} does not exist; give a model directory or a hub id such as org/name")
    return str(local) if local.is_dir() else path


def configuration_path(config: ModelConfig) -> str:
    """Return the directory or hub id with the configuration of a model. A checkpoint has that of its starting model."""
    path = resolve_model_path(config.path)
    if run_of_checkpoint(Path(path)):
        return configuration_path(base_of_checkpoint(replace(config, path=path)))
    return path


def load_pretrained(config: ModelConfig) -> tuple[Any, Any]:
    """Load a model with the configured dtype and device, and its tokenizer. Return (model, tokenizer).

    Raises:
        UserError: if the model or the tokenizer cannot be loaded, or the device is not available.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    _warn_of_slow_dtype(config)
    path = resolve_model_path(config.path)
    if run_of_checkpoint(Path(path)):
        return _load_checkpoint(replace(config, path=path))
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **options, **attention)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model.path {config.path!r} could not be loaded: {reason}") from error
    with device_errors_in_one_line(config.device):
        model = model.to(config.device)
    return with_checkpointing(model) if config.gradient_checkpointing else model, tokenizer


def _load_checkpoint(config: ModelConfig) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a checkpoint of a run, with adapters merged."""
    folder, base = Path(config.path), base_of_checkpoint(config)
    verify_checkpoint(folder)
    weights = read_state(folder / "learner.pt")["policy"]
    model, tokenizer = load_pretrained(base)
    adapters = with_adapters(model, base.lora) if base.lora.r else None
    try:
        load_trained_state(model, weights)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"checkpoint {folder} does not fit the model {base.path!r} of its run: {reason}") from error
    return (model if adapters is None else adapters.merge_and_unload()).requires_grad_(True), tokenizer


@contextlib.contextmanager
def device_errors_in_one_line(device: str) -> Iterator[None]:
    """Context manager that converts errors of PyTorch about an unavailable device to a message of one line.

    Args:
        device: the device, as in the setting `model.device`.
    Raises:
        UserError: with the device and the reason that PyTorch gives.
    """
    try:
        yield
    except (AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or "not available").splitlines()[0]
        raise UserError(
            f"model.device is {device!r}: {reason}; `vineppo doctor` lists the available devices"
        ) from error


def _warn_of_slow_dtype(config: ModelConfig) -> None:
    """Warn if the model is to run on a CPU that has no instructions for the configured 16-bit dtype."""
    dtype = getattr(torch, config.dtype)
    if dtype.itemsize == 2 and config.device.startswith("cpu") and not cpu_multiplies(dtype):
        warnings.warn(
            f"model.dtype is {config.dtype}, but this CPU has no instructions for {config.dtype} and computes several "
            "times slower than with float32; use model.dtype float32 unless memory is short",
            stacklevel=3,
        )
