"""A headless Chromium for tests, spoken to over its debugging pipe: JSON objects, each ended by a zero byte.

The protocol is documented at chromedevtools.github.io/devtools-protocol. Nothing but the browser itself is needed.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 60.0  # seconds for any answer


def chromium() -> str | None:
    """The browser's path, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. Use as a context manager; it ends the process that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.buffer, self.messages, self.count = folder, b"", [], 0

    def __enter__(self) -> "Browser":
        path = chromium()
        assert path is not None
        theirs_in, self.into = os.pipe()
        self.out, theirs_out = os.pipe()

        # the browser reads commands from descriptor 3 and answers on 4, through copies above them
        low = [os.dup2(theirs_in, 103), os.dup2(theirs_out, 104)]
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        command = [path, *flags, "--remote-debugging-pipe", f"--user-data-dir={self.folder}", "about:blank"]
        shell = f'exec 3<&{low[0]} 4>&{low[1]}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=low, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for descriptor in (theirs_in, theirs_out, *low):
            os.close(descriptor)
        self.session = None
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.into)
        os.close(self.out)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self.count += 1
        number = self.count
        message = {"id": number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        return self._wait(lambda m: m.get("id") == number, method)["result"]

    def _wait(self, wanted: Any, what: str) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while True:
            for message in [m for m in self.messages if wanted(m)][:1]:
                self.messages.remove(message)
                assert "error" not in message, (what, message["error"])
                return message
            assert select.select([self.out], [], [], end - time.monotonic())[0], f"no answer to {what}"
            got = os.read(self.out, 1 << 20)
            assert got, f"the browser ended before it answered {what}"
            *whole, self.buffer = (self.buffer + got).split(b"\0")
            self.messages += map(json.loads, whole)

    def open(self, url: str, *, width: int = 1200, dark: bool = False) -> None:
        """Show a page at a width in CSS pixels, to a reader who prefers light or dark, and wait until it is loaded."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=url)
        self._wait(lambda m: m.get("method") == "Page.loadEventFired", url)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key of the keyboard, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key)

    def until(self, expression: str, seconds: float = PATIENCE) -> Any:
        """Wait until an expression is true, and return its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.js(expression):
                return found
            time.sleep(0.1)
        raise AssertionError(f"never true: {expression}")

    @property
    def complaints(self) -> list[str]:
        """What the page wrote to the console as errors: refused scripts and failed requests among them."""
        entries = [m["params"]["entry"] for m in self.messages if m.get("method") == "Log.entryAdded"]
        return [f"{e['level']}: {e['text']}" for e in entries if e["level"] == "error"]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12000), "scale": 1}
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))
