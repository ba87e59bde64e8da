"""The command `vineppo doctor`, which prints package versions and facts about the machine."""

from __future__ import annotations

import argparse
import os

from vineppo.cli.options import Command, Request
from vineppo.config.recipes import recipe_names
from vineppo.model.hardware import cpu_multiplies
from vineppo.run.environment import package_version, version_of

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow", "matplotlib", "rich")
"""Packages that vineppo requires."""
_EXTRAS = ("peft", "datasets", "math-verify", "reasoning-gym", "trl", "vllm", "ray", "tensorboard", "wandb", "trackio")
"""Packages that only some features need."""


def _options(parser: argparse.ArgumentParser) -> None:
    """Add no options. The only option of this command is `--help`."""


def _run(request: Request) -> int:
    """Print one line per package and per fact. Return the exit code 0."""
    import importlib.resources
    import platform

    rows = {"vineppo": package_version(), "python": platform.python_version(), "platform": platform.platform()}
    for name in (*_PACKAGES, *_EXTRAS):
        rows[name] = version_of(name) or "not installed" + (" (optional)" if name in _EXTRAS else "")
    rows["cores"] = str(os.cpu_count())
    rows["device"] = _devices()
    rows["engine"] = _engine()
    rows["grading"] = _sandbox()
    models = importlib.resources.files("vineppo") / "models"
    names = sorted(item.name for item in models.iterdir() if item.is_dir()) if models.is_dir() else []
    rows["models"] = ", ".join(f"embedded:{name}" for name in names) or "none installed"
    rows["recipes"] = ", ".join(recipe_names())
    for name, value in rows.items():
        print(f"{name:<14} {value}")
    return 0


def _devices() -> str:
    """Return the CPU and the CUDA devices as text, or a note that PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed"
    bfloat16 = "fast" if cpu_multiplies(torch.bfloat16) else "slow, use float32"
    cpu = f"cpu ({torch.get_num_threads()} threads; bfloat16: {bfloat16})"
    cuda = [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join([cpu, *cuda])


def _engine() -> str:
    """Return the instruction sets of the compiled engine, or a note that it is not built."""
    from vineppo.sampling.engine.library import load, why_not_loaded

    libraries = [library.instructions for library in (load(), load(bf16=True)) if library]
    return f"compiled, {', '.join(libraries)}" if libraries else why_not_loaded()


def _sandbox() -> str:
    from vineppo.tasks.grading.sandbox import landlock_version, missing_protection

    if reason := missing_protection():
        return f"no sandbox for grader processes: {reason}"
    return f"grader processes run in a sandbox (Landlock {landlock_version()}, seccomp)"


COMMAND = Command(
    purpose="Print package versions and facts about the machine, for bug reports.",
    takes="",
    usage="",
    options=_options,
    run=_run,
    examples=(
        ("print all lines", "vineppo doctor"),
        ("print one line", "vineppo doctor | grep torch"),
    ),
)
