"""The command `vineppo view`: the responses of a run with their credit, as a page in the browser."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from vineppo.cli.options import Command, Request, add_note, int_option
from vineppo.types import UserError

_PORT = 8711


def _options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `vineppo view` to its parser."""
    add_note(
        parser, "RUN", "The directory of a run, finished or not; or a file of another trainer, as for `vineppo show`."
    )
    add_note(
        parser,
        "PAGE",
        "One HTML file that needs no network: responses coloured by the advantage of their steps, the values of their "
        "states, the continuations behind a value, and lists of the responses that are worth reading first.",
    )
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: RUN/view.html, or FILE.html)")
    parser.add_argument("--compare", metavar="RUN2", help="a second run, which the page compares with the first one")
    parser.add_argument(
        "--max_mb", metavar="X", help="largest size of the file in MB (default: 5); the page says what was left out"
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        default=None,
        help="write no file, but serve the page on this machine, and follow a run that is going on",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="as for `vineppo show`, for files without text")
    parser.add_argument("--port", metavar="N", help=f"port of --serve (default: {_PORT}; 0 chooses a free one)")


def _run(request: Request) -> int:
    """Write or serve the page. Return the exit code 0."""
    if request.positional is None:
        raise UserError("no RUN is given; give the directory of a run, such as runs/demo")
    options = request.options
    runs = [request.positional, *([options["compare"]] if options["compare"] is not None else [])]
    tokenizer = _tokenizer(options["tokenizer"], runs)
    if options["serve"]:
        for name in ("out", "max_mb"):
            if options[name] is not None:
                raise UserError(f"--{name} is for a file, and --serve writes none; remove one of the two")
        _serve(runs, int_option(request, "port", _PORT), tokenizer)
        return 0
    if options["port"] is not None:
        raise UserError("--port is for --serve; add --serve, or remove --port")
    from vineppo.view.page import write_page

    run = Path(request.positional)
    out = Path(options["out"] or (run.with_suffix(".html") if run.is_file() else run / "view.html"))
    if out.is_dir():
        raise UserError(f"--out is {out}, which is a directory; give the name of a file, such as {out / 'view.html'}")
    contents = write_page(out, runs, _max_bytes(options["max_mb"]), tokenizer)
    print(f"{out} ({out.stat().st_size / 1e6:.2f} MB)")
    for text in contents.meta["left_out"]:
        print(f"left out: {text}")
    return 0


def _max_bytes(text: str | None) -> int:
    """Return the limit of the size of the file in bytes."""
    from vineppo.view.page import MAX_BYTES

    if text is None:
        return MAX_BYTES
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0 < megabytes <= 1000:
        raise UserError(f"--max_mb is {text!r}; it must be a number above 0 and at most 1000")
    return int(megabytes * 1e6)


def _tokenizer(given: str | None, runs: list[str]) -> str | None:
    """Return the tokenizer that is given.

    Raises:
        UserError: if none of the runs needs one.
    """
    if given is not None:
        from vineppo.view.foreign import lacks_text

        if not any(lacks_text(run) for run in runs):
            raise UserError(f"{runs[0]} has the texts of its responses, so --tokenizer has no meaning; remove it")
    return given


def _serve(runs: list[str], port: int, tokenizer: str | None) -> None:
    """Serve the page until the user interrupts the command."""
    from vineppo.view.serve import RunServer

    with RunServer(runs, port, tokenizer) as server:
        print(f"{server.address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


COMMAND = Command(
    purpose="Write a page that shows the responses of a run with the credit of their steps, or serve it.",
    takes="RUN",
    usage="RUN [--out FILE | --serve] [--compare RUN2]",
    options=_options,
    run=_run,
    examples=(
        ("write runs/demo/view.html, which any browser opens", "vineppo view runs/demo"),
        ("follow a run that is going on", "vineppo view runs/judgement-vineppo-seed0 --serve"),
        ("compare two runs in one file", "vineppo view runs/a --compare runs/b --out a-b.html"),
    ),
)
"""The command `vineppo view`."""
