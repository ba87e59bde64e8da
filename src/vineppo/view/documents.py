"""A document of headings, tables, images and preformatted text, as Markdown and as one HTML file.

Every text may be hostile, because models, recipes and data sets wrote parts of it: nothing of it becomes markup, and
control characters and marks that change the direction of text are escaped (`types.printable`).
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from vineppo.run.markdown import table_lines
from vineppo.types import printable


@dataclass(frozen=True)
class Heading:
    """A heading. Level 1 is the title."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of text."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table. Every row has as many cells as the header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Preformatted:
    """Lines in a fixed-width font."""

    text: str
    coloured: str = ""
    """The same as HTML, whose text is escaped already; empty: `text` without colours."""


@dataclass(frozen=True)
class Image:
    """A PNG file. Markdown links to it; HTML contains it."""

    path: Path
    text: str
    """What the image shows."""


@dataclass(frozen=True)
class Link:
    """A link to a file in the directory of the document."""

    name: str
    text: str
    fragment: str = ""
    """The place in the file, which stands behind `#` in the address; empty: its beginning."""


Block = Heading | Paragraph | Items | Table | Preformatted | Image | Link

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$])")
"""Characters that Markdown can read as markup. Before each, a backslash is written."""
_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --back: #fff; --text: #1a1a1a; --soft: #595959; --box: #f5f5f5; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --back: #161616; --text: #e8e8e8; --soft: #adadad; --box: #222; }
  img { background: #fff; }
}
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid var(--line); padding: .25rem .75rem; text-align: left; }
pre { background: var(--box); padding: 1rem; overflow-x: auto; overflow-wrap: normal; font-size: .875rem;
  line-height: 1.35; }
img { max-width: 100%; height: auto; }
.soft { color: var(--soft); }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of the HTML file: no script, and nothing from another address."""


def to_markdown(blocks: Sequence[Block], folder: Path) -> str:
    """Return a document as Markdown.

    Args:
        blocks: the content.
        folder: directory of the document, to which links are relative.
    """
    return "\n\n".join(_markdown(block, folder) for block in blocks) + "\n"


def _markdown(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _line(text)
        case Items(texts):
            return "\n".join(f"- {_line(text)}" for text in texts)
        case Table(header, rows):
            cells = [[_plain(cell) for cell in line] for line in (header, *rows)]
            return "\n".join(table_lines(cells[0], cells[1:]))
        case Preformatted(text):
            longest = max(map(len, re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{printable(text).strip(chr(10))}\n{fence}"
        case Image(path, text):
            return f"![{_plain(text)}]({_address(path, folder)})"
        case Link(name, text, fragment):
            return f"[{_plain(text)}]({_target(name, fragment)})"


def _plain(text: str) -> str:
    """Return a text as one line of Markdown without markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))


def _line(text: str) -> str:
    """Return `_plain` of a text that begins a line, where signs and numbers with a dot begin a list or a heading."""
    return re.sub(r"^(\d*)([-+=](?<!\d.)|(?<=\d)[.)](?=\s|$))", r"\1\\\2", _plain(text))


def _address(path: Path, folder: Path) -> str:
    """Return the address of a file relative to the folder of a document."""
    return quote(path.relative_to(folder).as_posix())


def _target(name: str, fragment: str) -> str:
    """Return the address of a link to a file in the directory of a document."""
    return quote(name) + (f"#{quote(fragment, safe='=&.')}" if fragment else "")


def to_html(blocks: Sequence[Block], title: str) -> str:
    """Return a document as one HTML file that needs no other file and no network.

    An image that cannot be read is replaced by a line that says so.
    """
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escaped(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_escaped(text)}</p>"
        case Items(texts):
            return "<ul>" + "".join(f"<li>{_escaped(text)}</li>" for text in texts) + "</ul>"
        case Table(header, rows):
            head = "".join(f'<th scope="col">{_escaped(cell)}</th>' for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{_escaped(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
            return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        case Preformatted(text, coloured):
            return f'<pre tabindex="0">{coloured or _escaped(text)}</pre>'
        case Image(path, text):
            try:
                data = base64.b64encode(path.read_bytes()).decode()
            except OSError:
                return f"<p>{_escaped(text)}: the image cannot be read.</p>"
            return f'<p><img src="data:image/png;base64,{data}" alt="{_escaped(text)}"></p>'
        case Link(name, text, fragment):
            return f'<p><a href="{html.escape(_target(name, fragment))}">{_escaped(text)}</a></p>'


def _escaped(text: str) -> str:
    """Return a text as it stands between tags and in attributes."""
    return html.escape(printable(text))
