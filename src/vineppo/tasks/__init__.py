"""Tasks: problems, prompts and graders. They work with text only, not with token ids."""

from __future__ import annotations

from vineppo.tasks.build import build_task

__all__ = ["build_task"]
