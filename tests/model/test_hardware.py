"""16-bit instructions of the processor, and the memory allocator."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from vineppo.model.hardware import cpu_multiplies

FAULTS = """
import resource, sys
from vineppo.model.hardware import keep_freed_memory
assert keep_freed_memory() if sys.argv[1] == "kept" else True
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (1 << 26)  # 64 MiB, written and freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_cpu_multiplies_is_that_of_onednn_for_16_bit_dtypes() -> None:
    assert cpu_multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert cpu_multiplies(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not cpu_multiplies(torch.float32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_reused_without_page_faults() -> None:
    def page_faults(mode: str) -> int:
        process = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        return int(process.stdout)

    assert page_faults("kept") < 100
    assert page_faults("returned") > 1000, "glibc now keeps large blocks by default: remove keep_freed_memory"
