"""The command `vineppo plot`: plot the metrics of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from vineppo.cli.options import Command, Request, add_note
from vineppo.types import UserError


def _options(parser: argparse.ArgumentParser) -> None:
    add_note(
        parser,
        "RUN",
        "The directory of a run, finished or not. Existing plots in RUN/plots are replaced. A run makes its plots when "
        "it finishes; this command is for runs that are not finished, or that were stopped before their plots.",
    )


def _run(request: Request) -> int:
    if request.positional is None:
        raise UserError("no RUN is given; give the directory of a run, such as runs/demo")
    from vineppo.run.plots import plot_run

    try:
        paths = plot_run(Path(request.positional))
    except OSError as error:
        raise UserError(
            f"the plots of {request.positional} cannot be made: {error.filename or request.positional}: "
            f"{error.strerror or type(error).__name__}; make the directory writable, or free some space"
        ) from error
    if not paths:
        raise UserError(f"{request.positional} has no finished iteration yet, so there is nothing to plot")
    for path in paths:
        print(path)
    return 0


COMMAND = Command(
    purpose="Plot accuracy, tokens and seconds of a run, also of one that has not finished.",
    takes="RUN",
    usage="RUN",
    options=_options,
    run=_run,
    examples=(
        ("replace the plots of a finished run", "vineppo plot runs/demo"),
        ("plot the iterations so far of a run that is still training", "vineppo plot runs/judgement-vineppo-seed0"),
    ),
)
