"""Hook of the package's build: compile the engine if there is a C++ compiler.

Without a compiler the package is built without the engine, and sampling uses PyTorch. A wheel with the engine is for
one platform and every version of Python, because the libraries do not use Python.
"""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EngineHook(BuildHookInterface):
    """Compiles the engine into the package's folder before the wheel is packed."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the engine, and mark the wheel as one for this platform."""
        script = Path(self.root) / "src/vineppo/sampling/engine/build.py"
        libraries, reason = runpy.run_path(str(script))["build"]()
        if not libraries:
            self.app.display_warning(f"vineppo is built without its compiled engine: {reason}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        if version != "editable":  # an editable installation reads the libraries where they were compiled
            folder = "vineppo/sampling/engine/libraries"
            build_data["force_include"] |= {str(path): f"{folder}/{path.name}" for path in libraries}
