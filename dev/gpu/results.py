"""The results of all parts, as JSON and as Markdown."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dev.gpu.part import Cells

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """The results of all parts, and the files that they are written to."""

    def __init__(self, out: Path, head: Cells):
        self.out, self.head = out, head
        self.parts: dict[str, Cells] = {}
        self.began = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write gpu.json and gpu.md."""
        found = {**self.head, "seconds": round(time.perf_counter() - self.began, 1), "parts": self.parts}
        for name, text in (("gpu.json", json.dumps(found, indent=1, default=str) + "\n"), ("gpu.md", markdown(found))):
            temporary = self.out / f".{name}"
            temporary.write_text(without_folders(text), encoding="utf-8")
            temporary.replace(self.out / name)


def without_folders(text: str) -> str:
    """Remove the folders of this machine from a text."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    text = re.sub(r"[^\s\"'(]*/(?:site|dist)-packages/", "", text)
    return text.replace(str(Path.home()), "~")


def markdown(found: Mapping[str, Any]) -> str:
    """Return the text of gpu.md."""
    lines = ["# The package on a GPU", "", f"`{found['command']}`, {found['seconds']:.0f} seconds."]
    for name, part in found["parts"].items():
        state = part["status"] + (f": {part['reason']}" if "reason" in part else "")
        lines += ["", f"## {name}", "", f"{state}, {part.get('seconds', 0):.0f} seconds."]
        lines += [""] if part["facts"] else []
        lines += [f"- {key}: {_text(value)}" for key, value in part["facts"].items()]
        for title, rows in part["tables"].items():
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += ["", f"**{title}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(_text(row.get(key, '')) for key in columns)} |" for row in rows]
        if "traceback" in part:
            lines += ["", "```", *part["traceback"], "```"]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "/").replace("\n", " ")
