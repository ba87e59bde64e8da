"""Write the credit viewer: one HTML file that shows the responses of a run with their credit, without a network.

The file contains the style, the script and the data (`data.py`). Its Content-Security-Policy allows exactly this style
and this script, by their hashes, and no connection. What a model wrote is data only: the script puts it on the page as
text, never as markup.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vineppo.run.environment import package_version
from vineppo.run.files import written_aside
from vineppo.types import UserError
from vineppo.view.data import compressed, iteration_data, ranges, run_meta, spread_order, to_json
from vineppo.view.records import read_each

MAX_BYTES = 5_000_000
"""Default limit of the size of the file, in bytes."""
SCRIPTS = ("core.js", "store.js", "list.js", "text.js", "curve.js", "why.js", "group.js", "compare.js", "main.js")
"""Files of the script in their order. They share one scope."""
_OPTIONAL = {
    "core": "texts, steps and advantages",
    "more": "continuations",
    "tokens": "probabilities and entropies of tokens",
}
"""Parts of an iteration that are left out if the page would be too large, the most important first -> their content."""


@dataclass
class Contents:
    """What a page contains."""

    meta: dict[str, Any]
    chunks: dict[str, str] = field(default_factory=dict)
    """Name of each part, such as `0/12/core` (run, iteration, part) -> its compressed JSON in base64."""


def asset(name: str) -> str:
    """Return the text of a file of the viewer (`view/assets`)."""
    return (importlib.resources.files("vineppo") / "view" / "assets" / name).read_text(encoding="utf-8")


def write_page(
    path: Path, runs: Sequence[str | Path], max_bytes: int = MAX_BYTES, tokenizer: str | Path | None = None
) -> Contents:
    """Write the page of one run, or of two runs that are compared, to a file, atomically.

    Args:
        path: the HTML file.
        runs: one or two run directories, or files of other trainers (`foreign.py`).
        max_bytes: limit of the size of the file. Details of some iterations are left out to stay below it.
        tokenizer: see `records.responses_of`.
    Returns:
        The contents. `meta["left_out"]` says what was left out.
    Raises:
        UserError: if a run has no responses, the limit is too small for the lists alone, or the file cannot be written.
    """
    contents = contents_of(runs, max_bytes, tokenizer)
    text = html(contents.meta, contents.chunks)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{path} cannot be written ({reason}); give another file with --out") from error
    return contents


def contents_of(
    runs: Sequence[str | Path], max_bytes: int = MAX_BYTES, tokenizer: str | Path | None = None
) -> Contents:
    """Return the contents of a page that has at most `max_bytes` bytes.

    The lists of all responses are always complete. Then the texts of as many iterations as possible are kept, then
    their continuations, then the numbers of their tokens. If some must be left out, those that are kept are spread
    evenly over the run.

    Raises:
        UserError: as `write_page`.
    """
    contents = Contents({"format": 1, "version": package_version(), "live": False, "runs": []})
    offers: dict[str, dict[tuple[int, int], str]] = {part: {} for part in _OPTIONAL}
    damaged: list[str] = []
    for r, run in enumerate(runs):
        meta, rows, unread = run_meta(run), [], dict[int, str]()
        contents.meta["runs"].append(meta)
        read = functools.partial(iteration_data, run, tokenizer=tokenizer)
        for iteration, parts in read_each(run, meta["iterations"], read, unread):
            rows.append(parts["rows"])
            for part in _OPTIONAL:
                offers[part][r, iteration] = _base64(parts[part])
        meta["iterations"] = [iteration for iteration in meta["iterations"] if iteration not in unread]
        damaged += unread.values()
        contents.chunks[f"{r}/rows"] = _base64(rows)
    _fill(contents, offers, max_bytes)
    contents.meta["left_out"] = damaged + _left_out(contents, offers)
    return contents


def _base64(data: Any) -> str:
    return base64.b64encode(compressed(data)).decode("ascii")


def _fill(contents: Contents, offers: Mapping[str, Mapping[tuple[int, int], str]], max_bytes: int) -> None:
    """Add as many parts as fit, those of `core` first, each part for iterations that are spread over the runs."""
    margin = 2000  # what the page says about the parts that were left out
    size = len(html(contents.meta, contents.chunks).encode()) + margin
    if size > max_bytes:
        raise UserError(
            f"the page needs {size / 1e6:.2f} MB for its script and the lists of all responses, and --max_mb allows "
            f"{max_bytes / 1e6:g}; allow more"
        )
    for part, texts in offers.items():
        for iteration in spread_order(sorted({iteration for _, iteration in texts})):
            for r in range(len(contents.meta["runs"])):
                name, text = f"{r}/{iteration}/{part}", texts.get((r, iteration))
                if text is None or (part != "core" and f"{r}/{iteration}/core" not in contents.chunks):
                    continue
                cost = len(text) + len(_chunk(name, ""))
                if size + cost <= max_bytes:
                    contents.chunks[name] = text
                    size += cost


def _left_out(contents: Contents, offers: Mapping[str, Mapping[tuple[int, int], str]]) -> list[str]:
    """Return one sentence per run and part that is not complete, for example `continuations of iterations 2-4, 6`."""
    sentences = []
    for r, meta in enumerate(contents.meta["runs"]):
        for part, what in _OPTIONAL.items():
            missing = [i for run, i in offers[part] if run == r and f"{r}/{i}/{part}" not in contents.chunks]
            if missing:
                where = f"{what} of iterations {ranges(missing)}"
                sentences.append(where if len(contents.meta["runs"]) == 1 else f"{meta['name']}: {where}")
    return sentences


def html(meta: Mapping[str, Any], chunks: Mapping[str, str]) -> str:
    """Return the page as HTML.

    Args:
        meta: what the page says about the runs (`run_meta`), whether it is `live`, and what was left out.
        chunks: name of each part -> compressed JSON in base64.
    """
    style = asset("style.css")
    script = '"use strict";\n' + "\n".join(asset(name) for name in SCRIPTS)
    names = " and ".join(run["name"] for run in meta["runs"])
    pieces = {
        "policy": policy(style, script, live=bool(meta["live"])),
        "title": _escaped(f"{names} - vineppo"),
        "style": style,
        "meta": to_json(meta),
        "chunks": "\n".join(_chunk(name, text) for name, text in chunks.items()),
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: pieces[match[1]], asset("page.html"))


def _chunk(name: str, text: str) -> str:
    return f'<script type="text/plain" id="chunk/{name}">{text}</script>'


def _escaped(text: str) -> str:
    """Return text for the content of an HTML element; control characters and unpaired surrogates are replaced."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def policy(style: str, script: str, live: bool) -> str:
    """Return the Content-Security-Policy: this style and this script only; connections to the own server if live."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "connect-src 'self'" if live else "connect-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
