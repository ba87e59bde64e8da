"""Print the output of grader processes, with control characters escaped."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import threading

from vineppo.types import printable

_CHUNK = 1 << 16
"""Maximum number of bytes that are read at once."""
_LONGEST_LINE = 1 << 14
"""A longer line is printed in parts. A shorter one is printed when it is complete."""
_DRAIN_SECONDS = 1.0
"""Time limit for printing the rest of the output of a process that has ended."""


class Output:
    """Prints to stderr what processes write into a pipe, line by line, with control characters escaped.

    A thread reads the pipe, so the processes never wait for the trainer, and at most one line is kept in memory. The
    thread ends when no process has the pipe open for writing.
    """

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe()
        """`write_end` is the file descriptor for the processes."""
        self._thread = threading.Thread(target=_print_lines, args=(self._read_end,), daemon=True)

    def start(self) -> None:
        """Close the write end in this process, and start printing. Call this after the process was started."""
        os.close(self.write_end)
        self._thread.start()

    def drain(self) -> None:
        """Wait until all output was printed. Call this after the processes have ended."""
        if not sys.is_finalizing():  # when the interpreter ends, the thread no longer runs
            self._thread.join(_DRAIN_SECONDS)  # a process that left its process group may keep the pipe open


def _print_lines(descriptor: int) -> None:
    """Print what is read from a file descriptor until its end, then close it."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("backslashreplace"), ""
    while data := os.read(descriptor, _CHUNK):
        lines, newline, rest = (rest + decoder.decode(data)).rpartition("\n")
        _print(lines + newline)
        if len(rest) > _LONGEST_LINE:
            _print(rest)
            rest = ""
    _print(rest + decoder.decode(b"", True))
    os.close(descriptor)


def _print(text: str) -> None:
    """Write printable text to stderr. Errors are ignored, because the pipe must be read in any case."""
    # sys.stderr has a lock, which a thread must not hold when the interpreter ends.
    data = printable(text).encode(errors="backslashreplace")
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(2, data) :]
