"""A headless Chromium, driven over pipes by the DevTools protocol."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The program, where this machine has it."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a running browser.

    Attributes:
        problems: uncaught errors and console messages of the pages, and addresses that they loaded.
    """

    def __init__(self, sink: int, source: int):
        self._sink, self._source = sink, os.fdopen(source, "rb")
        self._ids, self._session = itertools.count(1), ""
        self.problems: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and wait for its result."""
        number = next(self._ids)
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": number, "method": method, "params": params} | session
        os.write(self._sink, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, file: Path, fragment: str = "") -> None:
        """Load a page of this machine, and wait for it."""
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=file.as_uri() + fragment)
        while self.evaluate("document.readyState") != "complete" or not self.evaluate("location.pathname"):
            pass

    def evaluate(self, script: str) -> Any:
        """Value of an expression in the page; a promise is waited for."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key where the focus is."""
        text = {"text": " "} if key == " " else {}
        code = {
            "ArrowLeft": 37,
            "ArrowUp": 38,
            "ArrowRight": 39,
            "ArrowDown": 40,
            "Home": 36,
            "End": 35,
            " ": 32,
        }
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code[key], **text)
            text = {}

    def screenshot(self, file: Path, size: tuple[int, int], dark: bool = False, scale: float = 1) -> None:
        """Write a PNG of the page in a window of a size, in one of the two colour schemes."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self("Emulation.setScrollbarsHidden", hidden=True)
        width, height = size
        self(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False},
        )
        self.evaluate("new Promise((done) => setTimeout(done, 400))")  # transitions
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def _receive(self) -> dict[str, Any]:
        """The next message; those that tell of a problem are kept."""
        content = bytearray()
        while (byte := self._source.read(1)) != b"\0":
            assert byte, "the browser has ended"
            content += byte
        message = json.loads(content)
        params = message.get("params", {})
        if message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.problems.append(json.dumps(params)[:1000])
        url = (
            params.get("request", {}).get("url", "")
            if message.get("method") == "Network.requestWillBeSent"
            else ""
        )
        if url and not url.startswith(("file:", "data:", "about:")):
            self.problems.append(f"loaded {url}")
        return message


@contextmanager
def opened(program: str) -> Iterator[Browser]:
    """Run a browser with a profile of its own."""
    to_browser, from_browser = os.pipe(), os.pipe()
    flags = [
        "--headless",
        "--remote-debugging-pipe",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol has file descriptors 3 and 4.
        shell = f'exec "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *flags, f"--user-data-dir={profile}"],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HOME": profile},
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            process.terminate()
            process.wait(30)
            os.close(to_browser[1])
