"""Load a causal language model and its tokenizer from a directory, a run, the Hugging Face hub or the package."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vineppo.config.schema import ModelConfig
from vineppo.config.settings import replace
from vineppo.model.hardware import cpu_multiplies
from vineppo.model.location import only_local_copy, resolve_model_path, run_of_checkpoint
from vineppo.model.lora import load_trained_state, merged_model, with_adapters
from vineppo.model.modes import with_checkpointing
from vineppo.model.of_run import base_of_checkpoint, dtype_of_checkpoint
from vineppo.objects import message_line
from vineppo.run.checkpoint import verify_checkpoint
from vineppo.run.shards import read_networks
from vineppo.types import UserError


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
    path, local = resolve_model_path(config.path), only_local_copy(config.path)
    with device_errors_in_one_line(config.device):
        torch.empty(0, device=config.device)
    _warn_of_slow_dtype(config)
    if run_of_checkpoint(Path(path)):
        return _load_checkpoint(replace(config, path=path))
    if (Path(path) / "adapter").is_dir():
        _warn_of_lost_adapters(config)
    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, "local_files_only": local}
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.dtype), **options, **attention)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = message_line(error)
        raise UserError(f"model.path {config.path!r} could not be loaded: {reason}") from error
    with device_errors_in_one_line(config.device):
        model = model.to(config.device)
    return with_checkpointing(model) if config.gradient_checkpointing else model, tokenizer


def _load_checkpoint(config: ModelConfig) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a checkpoint of a run, with adapters merged in float32.

    In float32, this is the model that the run trained, also if the weights under its adapters have 16 bits.
    """
    folder, base = Path(config.path), base_of_checkpoint(config)
    verify_checkpoint(folder)
    if base.lora.r:
        _warn_of_lost_adapters(config)
    weights = read_networks(folder)["policy"]
    model, tokenizer = load_pretrained(base)
    adapters = None
    if base.lora.r:
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.to(getattr(torch, dtype_of_checkpoint(config))))
        adapters = with_adapters(model, base.lora)
    try:
        load_trained_state(model, weights)
    except RuntimeError as error:
        reason = message_line(error)
        raise UserError(f"checkpoint {folder} does not fit the model {base.path!r} of its run: {reason}") from error
    if adapters is not None:
        model = merged_model(adapters, getattr(torch, base.dtype))
    return model.requires_grad_(True), tokenizer


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


def _warn_of_lost_adapters(config: ModelConfig) -> None:
    """Warn if a model with merged adapters is to be loaded in 16 bits."""
    if getattr(torch, config.dtype).itemsize == 2:
        warnings.warn(
            f"model.path {config.path!r} has merged adapters, and model.dtype is {config.dtype}: rounding to 16 bits "
            "removes most of what small adapters change; use model.dtype float32",
            stacklevel=3,
        )


def _warn_of_slow_dtype(config: ModelConfig) -> None:
    """Warn if the model is to run on a CPU that has no instructions for the configured 16-bit dtype."""
    dtype = getattr(torch, config.dtype)
    if dtype.itemsize == 2 and config.device.startswith("cpu") and not cpu_multiplies(dtype):
        warnings.warn(
            f"model.dtype is {config.dtype}, but this CPU has no instructions for {config.dtype} and computes several "
            "times slower than with float32; use model.dtype float32 unless memory is short",
            stacklevel=3,
        )
