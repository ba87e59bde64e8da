"""What the machine does well or badly, as far as settings and memory depend on it.

PyTorch is imported where it is asked: the door needs this module before it needs that one.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ASKED = {"torch.bfloat16": "_is_mkldnn_bf16_supported", "torch.float16": "_is_mkldnn_fp16_supported"}
"""Which operation of oneDNN says whether this processor multiplies in a dtype."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and multiplies these 16-bit numbers by vectors; False for every other dtype.

    Without (processors with AVX2 alone, for instance) PyTorch computes them one by one, far slower than float32.
    """
    import torch

    operation = getattr(torch.ops.mkldnn, _ASKED.get(str(dtype), ""), None)
    return operation is not None and torch.backends.mkldnn.is_available() and bool(operation())


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep what was freed for the rest of the process; False where there is no glibc.

    By default it returns every large block to the system, and the next one, of which a backward pass takes hundreds, is
    new memory that costs a page fault per 4 KiB: a fifth of the time of training 135M parameters. The peak of the
    process grows by a few per cent. Call it before the threads start.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Large blocks come from the heap too, and the heap never shrinks. mallopt returns 1 for success.
    return mallopt is not None and mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) == 1
