"""Facts about processor and GPU: fast dtypes, memory for keys and values, the allocator of the C library, devices.

PyTorch is imported inside the functions, so that an import of this module does not import PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING

from vineppo.run.environment import version_of
from vineppo.types import UserError

if TYPE_CHECKING:
    import torch

_DTYPE_CHECKS = {"torch.bfloat16": "_is_mkldnn_bf16_supported", "torch.float16": "_is_mkldnn_fp16_supported"}
"""dtype -> name of the oneDNN operation in `torch.ops.mkldnn` that returns whether this processor has instructions for
the dtype."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of two parameters of mallopt(3) in glibc."""


KV_MEMORY_ON_CPU = 4 << 30
"""Default of `rollouts.kv_memory` on a CPU, in bytes."""


def kv_memory_in(room: float) -> int:
    """Return the default of `rollouts.kv_memory` on a GPU, in bytes: half of the room, rounded down to a power of two.

    The other half is for logits and activations. Because of the rounding, small differences of the room do not change
    how sequences are divided into batches, which would change results by rounding. The result is at least 1 GiB.

    Args:
        room: bytes of the GPU's memory that weights and optimizer states leave.
    """
    return 1 << max(30, int(room / 2).bit_length() - 1) if room > 0 else 1 << 30


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor has vector instructions for a 16-bit dtype and oneDNN is available to use them.

    The result is False for dtypes that do not have 16 bits. Without such instructions (for example on processors with
    AVX2 only), PyTorch multiplies 16-bit numbers one at a time, which is much slower than float32.
    """
    import torch

    operation = getattr(torch.ops.mkldnn, _DTYPE_CHECKS.get(str(dtype), ""), None)
    return operation is not None and torch.backends.mkldnn.is_available() and bool(operation())


def keep_freed_memory() -> bool:
    """Make the memory allocator of glibc keep freed memory, which speeds up training on the CPU.

    By default, glibc returns every freed large block to the operating system. The next large block is then new memory,
    which costs one page fault per 4 KiB. A backward pass allocates hundreds of large blocks, and the page faults took a
    fifth of the training time of a model with 135M parameters. Keeping the memory raises the peak memory of the process
    by a few per cent. The setting holds for the rest of the process. Call this function before threads start.

    Returns:
        Whether the setting was changed. The result is False if the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # With these settings, glibc allocates large blocks on the heap, too, and shrinks the heap only if 2 GiB at its end
    # are free. mallopt returns 1 on success.
    return mallopt is not None and mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1


def check_device(device: str) -> None:
    """Check that the installed version of PyTorch can use a device, without importing PyTorch.

    Whether the machine has the device is checked when the model is loaded.

    Args:
        device: the device, as in the setting `model.device`.
    Raises:
        UserError: if the device is a GPU and the installed PyTorch supports only the CPU.
    """
    if device.startswith(("cuda", "xpu")) and (version_of("torch") or "").endswith("+cpu"):
        raise UserError(
            f"model.device is {device!r}, but the installed PyTorch ({version_of('torch')}) supports only the CPU; set "
            "model.device to cpu, or install PyTorch with CUDA"
        )
