"""Tasks: problems, prompts and graders, as text only."""

from __future__ import annotations

from vineppo.tasks.build import build_task

__all__ = ["build_task"]
