"""Compile the engine: one library per instruction set, into the folder `libraries` beside this file.

    python src/vineppo/sampling/engine/build.py     # make engine

The name of a library contains a hash of the sources, so that a library of other sources is never used.

The build of the package calls `build`, too (hatch_build.py). This file uses the standard library only, because the
package is not installed at that time. A compiler for C++17 is needed: GCC or Clang. The environment variable CXX names
it; without it, c++, g++ and clang++ are tried. VINEPPO_ENGINE=0 switches compiling off.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = ("kernels.cpp", "decode.cpp", "interface.cpp")
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-pthread",
)
_AVX512 = ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512")
_INSTRUCTIONS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-DVINEPPO_BF16"),
    "amx_bf16": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DVINEPPO_BF16"),
}
"""Compiler flags of each instruction set. Every 64-bit ARM processor has NEON, so the generic set contains it."""


def library_name(instructions: str) -> str:
    """Return the file name of the library for an instruction set, with a hash of the sources and of this file."""
    digest = hashlib.sha256()
    for path in (*sorted((FOLDER / "native").iterdir()), Path(__file__)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return f"libvineppo_{instructions}-{platform.machine()}-{digest.hexdigest()[:12]}.so"


def compiler() -> list[str]:
    """Return the command of the C++ compiler, or an empty list if there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else []
    return [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]


def build(target: Path = FOLDER / "libraries", extra_flags: Sequence[str] = ()) -> tuple[list[Path], str]:
    """Compile the libraries that do not exist, and remove those of other sources.

    Args:
        target: the folder of the libraries.
        extra_flags: further flags for the compiler.
    Returns:
        (paths of the libraries, reason if there are none). A library is left out if the compiler does not know its
        instruction set.
    """
    if os.environ.get("VINEPPO_ENGINE") == "0":
        return [], "VINEPPO_ENGINE is 0"
    if os.name != "posix":
        return [], f"the engine is not built on {platform.system()}"
    if not (command := compiler()):
        return [], "no C++ compiler was found (set CXX, or install g++ or clang++)"
    names = list(_INSTRUCTIONS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    try:
        target.mkdir(parents=True, exist_ok=True)
        current = {library_name(name) for name in names}
        for old in target.glob("libvineppo_*"):
            if old.name not in current:
                old.unlink()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = list(pool.map(lambda name: _compile(command, name, target, extra_flags), names))
    except OSError as error:
        return [], str(error)
    if errors[names.index("generic")]:
        return [], errors[names.index("generic")]
    return [target / library_name(name) for name, error in zip(names, errors) if not error], ""


def _compile(command: list[str], name: str, target: Path, extra_flags: Sequence[str]) -> str:
    """Compile one library if it does not exist. Return the compiler's first error, or an empty text."""
    library = target / library_name(name)
    if library.exists():
        return ""
    # The library gets its name when it is complete, so an interrupted build leaves no part of one.
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    sources = [str(FOLDER / "native" / source) for source in SOURCES]
    arguments = [*command, *_FLAGS, *_INSTRUCTIONS[name], *extra_flags, "-shared", *sources, "-o", str(unfinished)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return f"{' '.join(command)} failed: {(lines or ['no message'])[0]}"
        unfinished.replace(library)
    finally:
        unfinished.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    made, reason = build()
    print("\n".join(map(str, made)) if made else f"the engine was not built: {reason}")
    sys.exit(not made)
