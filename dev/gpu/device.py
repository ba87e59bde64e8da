"""The device: its name, memory and versions, and the speed of matrix products."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import torch
from dev.gpu.part import GIB, Part
from dev.gpu.policies import DTYPES

import vineppo
from vineppo.plan.memory import available_memory
from vineppo.run.environment import version_of


def check_device(part: Part) -> None:
    """Record the name, the memory and the versions of the device, and the speed of its matrix products."""
    part.facts |= {
        "device": torch.cuda.get_device_name(part.device) if part.cuda else platform.machine(),
        "memory in GiB": round(available_memory(part.device) / GIB, 1),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "bfloat16": torch.cuda.is_bf16_supported() if part.cuda else None,
        "matrix products in float32": torch.get_float32_matmul_precision(),
        **{name: version_of(name) for name in ("transformers", "peft", "numpy", "pyarrow")},
        "vineppo": vineppo.__version__,
    }
    size = 256 if part.small else 4096
    for name, dtype in DTYPES.items():
        part.check()
        part.row("matrix products", {"dtype": name, "size": size, "TFLOP/s": _tflops(part, size, dtype)})


def _driver() -> str | None:
    """Return the version of the GPU's driver, or None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() or None


def _tflops(part: Part, size: int, dtype: torch.dtype) -> float:
    """Return the speed of the product of two square matrices in 10^12 operations per second."""
    left = torch.randn(size, size, device=part.device, dtype=dtype)

    def multiply(times: int) -> None:
        for _ in range(times):
            left @ left

    multiply(3)
    times = 3 if part.small else 20
    return round(2 * size**3 * times / part.timed(lambda: multiply(times))[1] / 1e12, 3)
