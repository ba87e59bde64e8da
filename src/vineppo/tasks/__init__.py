"""Provide the problems of a run, and grade the responses to them. `build_task` builds the task that is configured.

The modules of this package work with text and have no tokenizer.
"""

from __future__ import annotations

from vineppo.tasks.build import build_task

__all__ = ["build_task"]
