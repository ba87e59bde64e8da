"""Show the output of grader processes; on stderr, with control characters escaped."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import threading
from collections.abc import Callable

from vineppo.types import printable

_CHUNK = 1 << 16
"""Maximum number of bytes that are read at once."""
_LONGEST_LINE = 1 << 14
"""A longer line is printed in parts. A shorter one is printed when it is complete."""
_DRAIN_SECONDS = 1.0
"""Time limit for printing the rest of the output of a process that has ended."""


def print_to_stderr(text: str) -> None:
    """Write printable text to stderr. Errors are ignored, because the pipe must be read in any case."""
    # sys.stderr has a lock, which a thread must not hold when the interpreter ends.
    data = printable(text).encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


class Output:
    """Shows what processes write into a pipe, line by line.

    A thread reads the pipe, so the processes never wait for the trainer, and at most one line is kept in memory. The
    thread ends when no process has the pipe open for writing.

    Args:
        show: called in the thread with whole lines, or with parts of long lines.
    """

    def __init__(self, show: Callable[[str], None] = print_to_stderr) -> None:
        self._read_end, self.write_end = os.pipe()
        """`write_end` is the file descriptor for the processes."""
        self._thread = threading.Thread(target=_show_lines, args=(self._read_end, show), daemon=True)

    def start(self) -> None:
        """Close the write end in this process, and start printing. Call this after the process was started."""
        os.close(self.write_end)
        self._thread.start()

    def drain(self) -> None:
        """Wait until all output was printed. Call this after the processes have ended."""
        if not sys.is_finalizing():  # when the interpreter ends, the thread no longer runs
            self._thread.join(_DRAIN_SECONDS)  # a process that left its process group may keep the pipe open


def _show_lines(descriptor: int, show: Callable[[str], None]) -> None:
    """Show what is read from a file descriptor until its end, then close it."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("backslashreplace"), ""
    while data := os.read(descriptor, _CHUNK):
        lines, newline, rest = (rest + decoder.decode(data)).rpartition("\n")
        show(lines + newline)
        if len(rest) > _LONGEST_LINE:
            show(rest)
            rest = ""
    show(rest + decoder.decode(b"", True))
    os.close(descriptor)
