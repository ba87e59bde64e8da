"""Run the command `vineppo` when the package is started with `python -m vineppo`."""

from __future__ import annotations

import sys

from vineppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
