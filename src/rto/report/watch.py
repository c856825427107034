"""`rto watch`: the report of a run in progress, served to this machine alone and drawn again as its files grow.

The page asks again every few seconds and is answered "not modified" until a file of the run has changed. Nothing of
the run is written or locked: it may be watched from another process, started or ended at any time.
"""

import argparse
import sys
import threading
from collections.abc import Callable
from dataclasses import fields
from hashlib import blake2b
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rto.alarms import Bounds
from rto.flags import OneLine
from rto.report.folder import read_run
from rto.report.page import render

HOME = "127.0.0.1"
STAGES = ("*/log.jsonl", "*/completions.jsonl", "round-*/*/log.jsonl", "round-*/*/completions.jsonl")
FILES = ("recipe.yaml", "log.jsonl", "completions.jsonl", *STAGES, "evaluation/*.json*")


class Watched:
    """The page of a folder, drawn when it is asked for and something has changed since.

    Args:
        folder: of a run or of one stage.
        bounds: of the alarms.
        every: seconds after which a page asks again.

    Raises:
        NotADirectoryError: there is no such folder.
    """

    def __init__(self, folder: Path, bounds: Bounds | None = None, every: float = 5.0) -> None:
        self.folder, self.bounds, self.every = Path(folder), bounds, every
        self._lock = threading.Lock()  # one drawing at a time: it costs seconds of processor time
        self._drawn: tuple[str, bytes] | None = None
        read_run(self.folder)

    def tag(self) -> str:
        """A name for the state of the folder's files."""
        stats = [(p.name, p.parent.name, p.stat()) for pattern in FILES for p in sorted(self.folder.glob(pattern))]
        state = repr([(name, parent, s.st_size, s.st_mtime_ns) for name, parent, s in stats])
        return f'"{blake2b(state.encode(), digest_size=12).hexdigest()}"'

    def page(self) -> tuple[str, bytes]:
        """The tag and the page."""
        with self._lock:
            tag = self.tag()
            if self._drawn is None or self._drawn[0] != tag:
                text = render(read_run(self.folder), every=self.every, bounds=self.bounds)
                self._drawn = tag, text.encode("utf-8", "replace")
            return self._drawn


def serve(watched: Watched, port: int = 0) -> ThreadingHTTPServer:
    """A server of the page on the loopback interface, not yet serving; port 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        """Answers GET / and nothing else."""

        def do_GET(self) -> None:
            """The page, or that it has not changed."""
            if not _is_home(self.headers.get("Host", "")):  # a name that leads here is how other sites would read it
                return self._answer(HTTPStatus.FORBIDDEN, b"Ask for localhost.")
            if urlsplit(self.path).path != "/":
                return self._answer(HTTPStatus.NOT_FOUND, b"There is one page: /")
            try:
                if self.headers.get("If-None-Match") == watched.tag():
                    return self._answer(HTTPStatus.NOT_MODIFIED, b"")
                tag, page = watched.page()
            except OSError as error:  # the folder is gone, or a file of it went as it was read
                return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, str(error).encode())
            return self._answer(HTTPStatus.OK, page, kind="text/html", tag=tag)

        def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain", tag: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are nobody's news."""

    return _Server((HOME, port), Handler)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle of an answer is nobody's news either."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _is_home(host: str) -> bool:
    return urlsplit(f"//{host}").hostname in (HOME, "localhost")


def main(args: list[str]) -> int:
    """`rto watch RUN`.

    Raises:
        ValueError: a flag is not known, or the port is taken.
    """
    parser = OneLine(prog="rto watch", description="Show the report of a run in progress in the browser.")
    parser.add_argument("folder", type=Path, help="Of a run, or of one stage.")
    parser.add_argument("--port", type=int, default=0, help="Of 127.0.0.1; 0 takes a free one.")
    parser.add_argument("--every", type=_above_zero, default=5.0, help="Seconds after which the page asks again.")
    alarms = parser.add_argument_group("bounds of the alarms; none turns one off")
    for field in fields(Bounds):
        kind: Callable[[str], float | None] = int if isinstance(field.default, int) else _bound
        alarms.add_argument(f"--{field.name}", type=kind, default=field.default, help=f"{field.default:g}")
    given = vars(parser.parse_args(args))
    bounds = Bounds(**{field.name: given[field.name] for field in fields(Bounds)})
    watched = Watched(given["folder"], bounds, given["every"])
    try:
        server = serve(watched, given["port"])
    except OSError as error:
        raise ValueError(f"--port {given['port']}: {error.strerror}: choose another, or 0 for a free one") from error
    sys.stdout.write(f"watching {watched.folder} at http://localhost:{server.server_port}/ (Ctrl-C ends it)\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    finally:
        server.server_close()
    return 0


def _bound(text: str) -> float | None:
    return None if text == "none" else float(text)


def _above_zero(text: str) -> float:
    if not (seconds := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return seconds
