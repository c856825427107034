"""A chat endpoint on loopback that behaves as a test says: answers, errors, garbage, silence, half an answer."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LOGPROBS = {"m": -0.1, "M": -2.4}


def completion(text: str = "m", logprobs: dict[str, float] | None = None, usage: Any = (7, 3)) -> dict[str, Any]:
    """A chat completion as OpenAI's endpoint writes it."""
    top = [{"token": token, "logprob": x, "bytes": None} for token, x in (logprobs or {}).items()]
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": top}]} if logprobs else None
    body = {"id": "1", "object": "chat.completion", "model": "judge", "choices": [choice]}
    return body | ({"usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}} if usage else {})


class JudgeServer:
    """``behave(handler, body, n)`` serves the n-th request; it uses the methods of `Handler`."""

    def __init__(self, behave: Callable[["Handler", dict, int], None]) -> None:
        self.behave = behave
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        handler = type("Bound", (Handler,), {"owner": self})
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "JudgeServer":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    owner: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        owner = self.owner
        with owner.lock:
            n = len(owner.bodies)
            owner.bodies.append(body)
            owner.keys.append(self.headers.get("Authorization"))
            owner.under_way += 1
            owner.most = max(owner.most, owner.under_way)
        try:
            assert self.path == "/v1/chat/completions"
            owner.behave(self, body, n)
        except (BrokenPipeError, ConnectionResetError):  # the client has given up: some tests want that
            self.close_connection = True
        finally:
            with owner.lock:
                owner.under_way -= 1

    def say(self, body: Any, status: int = 200, **headers: str) -> None:
        """Anything but bytes is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.owner.lock:  # before the client can know: it may ask again at once
            self.owner.under_way -= 1
        try:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)
        finally:
            with self.owner.lock:
                self.owner.under_way += 1

    def half(self) -> None:
        """A length is promised and not kept."""
        data = json.dumps(completion()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def hang_up(self) -> None:
        """No answer at all."""
        self.close_connection = True

    def drip(self, seconds: float) -> None:
        """Now and then a byte, so that the connection never looks dead."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.02)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        """Nothing to the terminal."""
