"""Tables in Markdown, written out by hand."""

from __future__ import annotations

from vineppo.run.markdown import table_lines


def test_plain_and_padded_tables() -> None:
    header, rows = ("steps", "K"), (("settled", "10"), ("-", "1"))
    assert table_lines(header, rows) == ["| steps | K |", "| --- | --- |", "| settled | 10 |", "| - | 1 |"]
    assert table_lines(header, rows, padded=True) == [
        "| steps   | K  |",
        "|---------|----|",
        "| settled | 10 |",
        "| -       | 1  |",
    ]
    assert table_lines(("a", ""), ()) == ["| a |  |", "| --- | --- |"]
