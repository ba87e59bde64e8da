"""A sandbox for grader processes that handle the text of a model.

The math parsers and some scorers of reasoning-gym were not written for hostile text; ten scorers even evaluate the
answer as Python code. `enter_sandbox` irrevocably limits the current process: it can read files and import modules, but
it cannot write or delete files, use the network, start programs or processes, send signals to other processes, or raise
its limits. It does not protect the reward: code that runs inside a scorer can choose the reward that is returned.

The sandbox uses two mechanisms of the Linux kernel, both called directly by number:

- Landlock (Linux 5.13 or newer; https://docs.kernel.org/userspace-api/landlock.html) refuses changes to files;
- a seccomp filter (https://docs.kernel.org/userspace-api/seccomp_filter.html) refuses the other system calls.

Other systems, kernels without Landlock, and containers that refuse either mechanism have no sandbox;
`missing_protection` says why.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from typing import Literal

Protection = Literal["none", "available", "required"]
"""Whether a grader process enters the sandbox: never, if the system has one, or always (and it fails otherwise)."""

_SECCOMP = {"x86_64": 317, "aarch64": 277}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Identifier of each architecture in the data that a filter reads."""

_REFUSED = {
    "x86_64": (
        *(41, 53, 59, 322, 57, 58),  # socket, socketpair, execve, execveat, fork, vfork
        *(62, 200, 129, 297, 424, 434, 438),  # kill, tkill, rt_(tg)sigqueueinfo, pidfd_send_signal, _open, _getfd
        *(101, 310, 311, 440, 448),  # ptrace, process_vm_readv, _writev, process_madvise, process_mrelease
        *(112, 109, 272, 308),  # setsid, setpgid, unshare, setns
        *(76, 85, 90, 91, 268, 92, 93, 94, 260, 452),  # truncate, creat, chmod, fchmod, fchmodat, chown (4), fchmodat2
        *(132, 235, 261, 280),  # utime, utimes, futimesat, utimensat
        *(188, 189, 190, 197, 198, 199),  # setxattr and removexattr
        *(160, 302, 319, 447),  # setrlimit, prlimit64, memfd_create, memfd_secret
        *(29, 64, 68, 240),  # shmget, semget, msgget, mq_open
        *(425, 426, 427, 321, 298, 323, 248, 249, 250),  # io_uring, bpf, perf_event_open, userfaultfd, keys
    ),
    "aarch64": (
        *(198, 199, 221, 281),
        *(129, 130, 138, 240, 424, 434, 438),
        *(117, 270, 271, 440, 448),
        *(157, 154, 97, 268),
        *(45, 52, 53, 54, 55, 452),
        88,
        *(5, 6, 7, 14, 15, 16),
        *(164, 261, 279, 447),
        *(194, 190, 186, 180),
        *(425, 426, 427, 280, 241, 282, 217, 218, 219),
    ),
}
"""Numbers of the system calls that the filter refuses with EPERM. Both rows have the same order."""
_NOT_IMPLEMENTED = (435, 437)
"""clone3 and openat2, whose arguments a filter cannot read. With ENOSYS, libraries use clone and openat instead."""
_FIRST_UNKNOWN = 463
"""System calls from this number on are newer than the lists above; ENOSYS."""
_FIRST_X32 = 0x40000000
_CLONE = {"x86_64": 56, "aarch64": 220}
_TGKILL = {"x86_64": 234, "aarch64": 131}
_IOCTL = {"x86_64": 16, "aarch64": 29}
_OPENS = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}
"""(number, index of the argument with the flags) of open and openat."""
_TERMINAL_INPUT = (0x5412, 0x541C)
"""The ioctl commands TIOCSTI and TIOCLINUX, which type into a terminal."""

# Instructions of a filter: (code, value, jump if true, jump if false), see linux/bpf_common.h.
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
_ALLOW, _EPERM, _ENOSYS = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38
_Instruction = tuple[int, int, int, int]

_FILE_CHANGES = 0b1111111110011
"""Landlock rights of its first version, except reading files and directories."""
_RIGHTS_SINCE = ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
"""(version of Landlock, right): moving to other directories, truncating, ioctl of devices."""
_WRITE_FILE = 1 << 1
_READ_ANY_FILE = 0b110
"""The capabilities CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH. A grader process of root keeps only these, so that it can
read its modules; Landlock still refuses changes."""
_NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS


def missing_protection() -> str:
    """Return why this system has no sandbox, as part of a sentence; empty if it has one. Changes nothing."""
    if sys.platform != "linux":
        return f"{platform.system()} has neither Landlock nor seccomp"
    if _machine() not in _SECCOMP:
        return f"the sandbox supports the processors {', '.join(_SECCOMP)}, not {_machine()}"
    if landlock_version() < 1:
        return "the kernel or the container has no Landlock (it needs Linux 5.13 or newer)"
    errno_action = ctypes.c_uint32(0x00050000)
    if _libc().syscall(_SECCOMP[_machine()], 2, 0, ctypes.byref(errno_action)) != 0:
        return "the kernel or the container refuses seccomp filters"
    return ""


def landlock_version() -> int:
    """Return the version of the kernel's Landlock; 0 or less if there is none."""
    return int(_libc().syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def enter_sandbox() -> None:
    """Limit this process, irrevocably, as the module describes. Its standard streams are connected to the null device.

    Raises:
        OSError: if the system refuses. The process must then not be used, because it may be partly limited.
    """
    if reason := missing_protection():
        raise OSError(f"this system has no sandbox for grader processes: {reason}")
    if len(os.listdir("/proc/self/task")) != 1:
        # Landlock limits the calling thread and those that it starts, not the threads that exist.
        raise OSError("the grader process has more than one thread, so it cannot enter the sandbox")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    _drop_capabilities()
    _checked(_libc().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _refuse_file_changes(null)
    _install(_filter(_machine(), os.getpid()))
    os.close(null)


def _machine() -> str:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return machine if ctypes.sizeof(ctypes.c_void_p) == 8 else f"32-bit {machine}"


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"the sandbox for grader processes cannot be entered: {os.strerror(number)}")
    return result


def _drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)
    data = ctypes.create_string_buffer(24)
    _checked(_libc().capget(header, data))
    kept = [field & (_READ_ANY_FILE if i < 3 else 0) for i, field in enumerate(struct.unpack("6I", data.raw))]
    _checked(_libc().capset(header, struct.pack("6I", *kept)))


def _refuse_file_changes(null: int) -> None:
    """Refuse changes of files by Landlock, except writing to the null device, which is open as `null`."""
    version, rights = landlock_version(), _FILE_CHANGES
    for since, right in _RIGHTS_SINCE:
        rights |= right if version >= since else 0
    # The fields are the rights of files, of TCP (binding, connecting) and of signals and abstract sockets.
    fields = (rights, *([3] if version >= 4 else []), *([3] if version >= 6 else []))
    attributes = struct.pack(f"{len(fields)}Q", *fields)
    rules = _checked(_libc().syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    _checked(_libc().syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", _WRITE_FILE, null), 0))
    _checked(_libc().syscall(_LANDLOCK_RESTRICT, rules, 0))
    os.close(rules)


def _filter(machine: str, process: int) -> list[_Instruction]:
    """Return the seccomp filter of a process (its id is `process`) on a processor architecture."""
    program = [_load(4), (_JUMP_EQUAL, _ARCHITECTURES[machine], 1, 0), _answer(_EPERM), _load(0)]
    program += [(_JUMP_AT_LEAST, _FIRST_X32, 0, 1), _answer(_EPERM)]
    program += [(_JUMP_AT_LEAST, _FIRST_UNKNOWN, 0, 1), _answer(_ENOSYS)]
    for number in _REFUSED[machine]:
        program += _case(number, [_answer(_EPERM)])
    for number in _NOT_IMPLEMENTED:
        program += _case(number, [_answer(_ENOSYS)])
    # Threads are allowed (CLONE_THREAD), processes are not.
    program += _case(_CLONE[machine], _by_argument(0, 0x10000, (0,), _EPERM, _ALLOW))
    # `abort` sends a signal to its own process.
    program += _case(_TGKILL[machine], _by_argument(0, 0xFFFFFFFF, (process,), _ALLOW, _EPERM))
    program += _case(_IOCTL[machine], _by_argument(1, 0xFFFFFFFF, _TERMINAL_INPUT, _EPERM, _ALLOW))
    for number, flags in _OPENS[machine]:
        # Landlock before version 3 does not refuse O_RDONLY | O_TRUNC, which empties a file.
        program += _case(number, _by_argument(flags, os.O_TRUNC | os.O_ACCMODE, (os.O_TRUNC,), _EPERM, _ALLOW))
    return [*program, _answer(_ALLOW)]


def _load(offset: int) -> _Instruction:
    return (_LOAD, offset, 0, 0)


def _answer(action: int) -> _Instruction:
    return (_RETURN, action, 0, 0)


def _case(number: int, body: list[_Instruction]) -> list[_Instruction]:
    """Run `body`, which always returns, if the system call has this number."""
    return [(_JUMP_EQUAL, number, 0, len(body)), *body]


def _by_argument(index: int, mask: int, values: Sequence[int], matched: int, otherwise: int) -> list[_Instruction]:
    """Return `matched` if an argument of the system call, reduced by a mask, is one of the values, else `otherwise`."""
    body = [_load(16 + 8 * index), (_AND, mask, 0, 0)]
    for value in values:
        body += [(_JUMP_EQUAL, value, 0, 1), _answer(matched)]
    return [*body, _answer(otherwise)]


def _install(program: Sequence[_Instruction]) -> None:
    """Install a seccomp filter for all threads of this process."""
    code = b"".join(struct.pack("HBBI", code, yes, no, value) for code, value, yes, no in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    description = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    _checked(_libc().syscall(_SECCOMP[_machine()], 1, 1, description))
