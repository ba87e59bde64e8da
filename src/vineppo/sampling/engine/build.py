"""Compile the engine: one library per instruction set, into the folder `libraries` beside this file.

    python src/vineppo/sampling/engine/build.py     # make engine

The build of the package calls `build`, too (hatch_build.py). This file uses the standard library only, because the
package is not installed at that time. A compiler for C++17 is needed: GCC or Clang. The environment variable CXX names
it; without it, c++, g++ and clang++ are tried. VINEPPO_ENGINE=0 switches compiling off.
"""

from __future__ import annotations

import os
import platform
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
_INSTRUCTIONS = {
    "generic": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"),
}
"""Compiler flags of each instruction set. Every 64-bit ARM processor has NEON, so the generic set contains it."""


def compiler() -> str:
    """Return the C++ compiler, or an empty text if there is none."""
    named = os.environ.get("CXX")
    return next(
        (found for name in ([named] if named else ["c++", "g++", "clang++"]) if (found := shutil.which(name))), ""
    )


def build(target: Path = FOLDER / "libraries", extra_flags: Sequence[str] = ()) -> tuple[list[Path], str]:
    """Compile the libraries that do not exist or are older than the sources.

    Args:
        target: the folder of the libraries.
        extra_flags: further flags for the compiler.
    Returns:
        (paths of the libraries, reason if there are none).
    """
    if os.environ.get("VINEPPO_ENGINE") == "0":
        return [], "VINEPPO_ENGINE is 0"
    if os.name != "posix":
        return [], f"the engine is not built on {platform.system()}"
    if not (command := compiler()):
        return [], "no C++ compiler was found (set CXX, or install g++ or clang++)"
    names = list(_INSTRUCTIONS) if platform.machine() in ("x86_64", "AMD64") else ["generic"]
    target.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda name: _compile(command, name, target, extra_flags), names))
    errors = [error for _, error in results if error]
    if errors:
        return [], errors[0]
    return [path for path, _ in results], ""


def _compile(command: str, name: str, target: Path, extra_flags: Sequence[str]) -> tuple[Path, str]:
    """Compile one library, and return its path and the compiler's first error, if any."""
    native = FOLDER / "native"
    library = target / f"libvineppo_{name}.so"
    newest = max(path.stat().st_mtime for path in (*native.iterdir(), Path(__file__)))
    if library.exists() and library.stat().st_mtime >= newest:
        return library, ""
    # The library gets its name when it is complete, so an interrupted build leaves no part of one.
    unfinished = library.with_suffix(f".{os.getpid()}.tmp")
    sources = [str(native / source) for source in SOURCES]
    arguments = [command, *_FLAGS, *_INSTRUCTIONS[name], *extra_flags, "-shared", *sources, "-o", str(unfinished)]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return library, f"{command} failed: {(lines or ['no message'])[0]}"
        unfinished.replace(library)
    except OSError as error:
        return library, f"{command} failed: {error}"
    finally:
        unfinished.unlink(missing_ok=True)
    return library, ""


if __name__ == "__main__":
    made, reason = build()
    print("\n".join(map(str, made)) if made else f"the engine was not built: {reason}")
    sys.exit(not made)
