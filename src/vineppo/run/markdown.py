"""Write tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]], *, padded: bool = False) -> list[str]:
    """Return the lines of a table in Markdown.

    Args:
        header: names of the columns.
        rows: cells of each row, as many as the header has. A `|` in a cell must be escaped already.
        padded: whether all cells of a column get the same width, so that the table is readable in a terminal too.
    """
    lines, rule = [header, *rows], ["---"] * len(header)
    if padded:
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        rule = ["-" * width for width in widths]
    text = [f"| {' | '.join(line)} |" for line in lines]
    return [text[0], f"|-{'-|-'.join(rule)}-|" if padded else f"| {' | '.join(rule)} |", *text[1:]]
