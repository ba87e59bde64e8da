"""Properties of the machine that affect settings and memory.

PyTorch is imported inside the functions, because the command line imports this module before it needs PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DTYPE_CHECKS = {"torch.bfloat16": "_is_mkldnn_bf16_supported", "torch.float16": "_is_mkldnn_fp16_supported"}
"""Operations of oneDNN that return whether this processor multiplies in a dtype."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN is available and has vector instructions for this 16-bit dtype; False for other dtypes.

    Without them (for example on processors with AVX2 only), PyTorch multiplies 16-bit numbers one at a time, which is
    much slower than float32.
    """
    import torch

    operation = getattr(torch.ops.mkldnn, _DTYPE_CHECKS.get(str(dtype), ""), None)
    return operation is not None and torch.backends.mkldnn.is_available() and bool(operation())


def keep_freed_memory() -> bool:
    """Make glibc's allocator keep freed memory for the rest of the process; returns False without glibc.

    By default glibc returns every freed large block to the system. The next large block is then new memory, which costs
    one page fault per 4 KiB, and a backward pass allocates hundreds of them: a fifth of the time of training 135M
    parameters. Keeping the memory raises the peak of the process by a few per cent. Call this before threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # These settings take large blocks from the heap too, and never shrink the heap. mallopt returns 1 on success.
    return mallopt is not None and mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
