"""Serve the credit viewer on this machine only, and follow a run that is going on (`vineppo view --serve`)."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from vineppo.run.directory import RunDirectory
from vineppo.run.environment import package_version
from vineppo.types import UserError
from vineppo.view.data import PARTS, compressed, iteration_data, run_meta, to_json
from vineppo.view.foreign import is_foreign
from vineppo.view.page import html

ADDRESS = "127.0.0.1"
"""The only address that the server listens on; other machines cannot reach it."""
_KEPT = 40
"""Number of iterations whose parts are kept in memory."""


class RunServer(ThreadingHTTPServer):
    """An HTTP server that answers with the page of one or two runs and with the parts of their iterations.

    - `/` is the page; `/meta` describes the runs as they are now;
    - `/data/0/rows` has the lists of all iterations of run 0; `/data/0/12/core` has a part of iteration 12.

    Data are compressed JSON. The page asks for `/meta` every few seconds and loads what is new.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[str | Path], port: int = 0, tokenizer: str | Path | None = None) -> None:
        """Listen on a port.

        Args:
            runs: one or two run directories, or files of other trainers.
            port: number of the port; 0 chooses a free one.
            tokenizer: see `records.responses_of`.
        Raises:
            UserError: if a run has no responses, or the port cannot be used.
        """
        self.runs = [Path(run) for run in runs]
        self.tokenizer = tokenizer
        self._parts: OrderedDict[tuple[int, int, int], dict[str, bytes]] = OrderedDict()
        self._rows: dict[tuple[int, int, int], Any] = {}
        self._lock = Lock()
        self.meta()  # raises UserError now and not for the first request
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"port {port} cannot be used ({reason}); give another one with --port") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing if a browser closes its connection early; print other errors."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """The address of the page, such as `http://127.0.0.1:8711/`."""
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def allowed_hosts(self) -> frozenset[str]:
        """Return the values of the header `Host` that are answered.

        A page of another site whose name was made to point to this machine sends its own name, and is refused.
        """
        port = self.server_address[1]
        return frozenset(f"{name}:{port}" for name in (ADDRESS, "localhost"))

    def meta(self) -> dict[str, Any]:
        """Return the description of the runs, with the time at which the file of each iteration was written."""
        runs = []
        for r, run in enumerate(self.runs):
            meta = run_meta(run)
            meta["stamps"] = [self._stamp(r, iteration) for iteration in meta["iterations"]]
            meta["finished"] = RunDirectory(run, {}).is_finished
            runs.append(meta)
        return {"format": 1, "version": package_version(), "live": True, "runs": runs, "left_out": []}

    def part(self, r: int, iteration: int, part: str) -> bytes:
        """Return a part of an iteration as compressed JSON.

        Raises:
            UserError: if there is no such iteration, or its file cannot be read.
        """
        key = (r, iteration, self._stamp(r, iteration))
        with self._lock:
            if key not in self._parts:
                data = iteration_data(self.runs[r], iteration, self.tokenizer)
                self._rows[key] = data["rows"]
                self._parts[key] = {name: compressed(data[name]) for name in PARTS}
                while len(self._parts) > _KEPT:
                    self._parts.popitem(last=False)
            return self._parts[key][part]

    def rows(self, r: int) -> bytes:
        """Return the lists of all iterations of a run as compressed JSON. One that cannot be read is left out."""
        found = []
        for iteration in run_meta(self.runs[r])["iterations"]:
            key = (r, iteration, self._stamp(r, iteration))
            try:
                if key not in self._rows:
                    self.part(r, iteration, "rows")
                found.append(self._rows[key])
            except UserError:
                continue
        return compressed(found)

    def _stamp(self, r: int, iteration: int) -> int:
        """Return the time at which the file of an iteration was written, in ms; 0 if it is gone."""
        try:
            run = self.runs[r]
            file = run if is_foreign(run) else RunDirectory(run, {}).rollouts_of(iteration)
            return file.stat().st_mtime_ns // 1_000_000
        except OSError:
            return 0


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    timeout = 30  # seconds that a connection may be silent
    server_version = "vineppo"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer a request."""
        if self.headers.get("Host") not in self.server.allowed_hosts():
            self._send(HTTPStatus.FORBIDDEN, b"this server answers only requests to its own address", "text/plain")
            return
        try:
            found = self._content(self.path.partition("?")[0])
        except UserError as error:
            self._send(HTTPStatus.NOT_FOUND, str(error).encode(), "text/plain; charset=utf-8")
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, b"no such page", "text/plain")
        else:
            self._send(HTTPStatus.OK, *found)

    def _content(self, path: str) -> tuple[bytes, str] | None:
        """Return (body, type) of the answer to a path, or None if there is no such path."""
        if path == "/":
            return html(self.server.meta(), {}).encode(), "text/html; charset=utf-8"
        if path == "/meta":
            return to_json(self.server.meta()).encode(), "application/json"
        match = re.fullmatch(r"/data/([01])/(?:([0-9]{1,9})/(" + "|".join(PARTS) + r")|rows)", path)
        if match is None or int(match[1]) >= len(self.server.runs):
            return None
        if match[2] is None:
            return self.server.rows(int(match[1])), "application/gzip"
        return self.server.part(int(match[1]), int(match[2]), match[3]), "application/gzip"

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing for each request."""
