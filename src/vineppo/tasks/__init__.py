"""Tasks, which provide problems and grade responses. This package works with text; it does not use a tokenizer."""

from __future__ import annotations

from vineppo.tasks.build import build_task

__all__ = ["build_task"]
