"""Runs the command line: `python -m vineppo` is the same as `vineppo`."""

from __future__ import annotations

import sys

from vineppo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
