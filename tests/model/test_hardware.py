"""What the machine does well or badly: its 16-bit instructions, its allocator."""

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


def test_the_processor_is_asked_about_16_bits_alone() -> None:
    assert cpu_multiplies(torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert cpu_multiplies(torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not cpu_multiplies(torch.float32)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another one than glibc's")
def test_memory_that_was_freed_is_used_again_without_new_pages() -> None:
    def second(mode: str) -> int:
        done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert second("kept") < 100
    assert second("returned") > 1000, "glibc keeps large blocks by itself now: keep_freed_memory has no use any more"
