"""The command `vineppo report`: the report of a run as Markdown and HTML."""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.options import Command, Request, add_note
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    add_note(
        parser,
        "RUN",
        "The directory of a run, finished or not. The command writes RUN/report.md and RUN/report.html: settings that "
        "differ from the defaults, accuracy, cost, warnings, plots and the most telling responses, with links to "
        "RUN/view.html, the page of all saved responses, which it also writes (`vineppo view`). A run writes its "
        "report when it finishes; this command writes it anew.",
    )


def _run(request: Request) -> int:
    """Make the plots, the page of responses and the report, and print their paths. Return the exit code 0."""
    if request.positional is None:
        raise UserError("no RUN is given; give the directory of a run, such as runs/demo")
    from vineppo.run.plots import plot_run
    from vineppo.view.report import write_report, write_viewer

    folder = Path(request.positional)
    try:
        plot_run(folder)
        viewer = write_viewer(folder)
        for path in (*write_report(folder), viewer):
            if path is not None:
                print(path)
    except OSError as error:
        raise UserError(
            f"the report of {folder} cannot be made: {error.filename or folder}: "
            f"{error.strerror or type(error).__name__}; make the directory writable, or free some space"
        ) from error
    return 0


COMMAND = Command(
    purpose="Write a report of a run as Markdown and HTML: accuracy, cost, settings, plots, telling responses.",
    takes="RUN",
    usage="RUN",
    options=_options,
    run=_run,
    examples=(
        ("write report.md, report.html and view.html into runs/demo", "vineppo report runs/demo"),
        ("report on a run that is still training", "vineppo report runs/judgement-vineppo-seed0"),
    ),
)
"""The command `vineppo report`."""
