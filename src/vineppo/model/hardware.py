"""Query which dtypes the processor multiplies fast, and configure the memory allocator of the C library.

PyTorch is imported inside the functions, so that an import of this module does not import PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPE_CHECKS = {"torch.bfloat16": "_is_mkldnn_bf16_supported", "torch.float16": "_is_mkldnn_fp16_supported"}
"""dtype -> name of the oneDNN operation in `torch.ops.mkldnn` that returns whether this processor has instructions for
the dtype."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers of two parameters of mallopt(3) in glibc."""


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
