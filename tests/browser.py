"""Headless chromium driven over its debugging port, with the standard library alone: real pointer, keys, screenshots.

with Browser(tmp_path) as browser:
    browser.open(page, "#step=3")
    browser.hover(".tok.inbox")
    assert browser.value("document.title") == "..."
"""

import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27, "Tab": 9, "End": 35}


class Browser:
    """One page of one browser process; `profile` is a folder it may fill."""

    def __init__(self, profile: Path, size: tuple[int, int] = (1400, 1000), timeout: float = 120.0) -> None:
        assert CHROMIUM is not None, "no chromium"
        self.profile, self.timeout, self.count = Path(profile), timeout, 0
        self.problems: list[str] = []  # exceptions and errors that the page's console saw
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", f"--window-size={size[0]},{size[1]}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self.socket = _connect(self._page_address(), timeout)
            for domain in ("Page", "Runtime", "Log"):
                self.call(f"{domain}.enable")
            self.call("Emulation.setFocusEmulationEnabled", enabled=True)  # else focus() fires no events
        except BaseException:
            self.process.kill()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # ---- what a user does
    def open(self, page: Path, hash_: str = "") -> None:
        """Load a local file and wait for it."""
        self.call("Page.navigate", url="about:blank")  # else a new hash alone would not load the page again
        self.call("Page.navigate", url=f"{Path(page).resolve().as_uri()}{hash_}")
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def hover(self, selector: str) -> None:
        """Scroll an element into view and move the pointer over its first line."""
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.at = (x, y)

    def click(self, selector: str) -> None:
        """Press and release the left button over an element."""
        self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=self.at[0], y=self.at[1], button="left", clickCount=1)

    def key(self, key: str) -> None:
        """Press and release a key: a character, or a name of `KEY_CODES`."""
        code = KEY_CODES.get(key, ord(key[0].upper()))
        text = {} if key in KEY_CODES else {"text": key}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    # ---- what a test asks
    def value(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"].get("exception", {}).get("description", found))
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + self.timeout
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def screenshot(self, path: Path, size: tuple[int, int], dark: bool = False, media: str = "") -> None:
        """The viewport at `size` as PNG, as the page stands."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=scheme)
        self.resize(size)
        time.sleep(0.3)
        Path(path).write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def resize(self, size: tuple[int, int]) -> None:
        """Change the viewport."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )

    # ---- the protocol: JSON messages over a websocket
    def call(self, method: str, **params: Any) -> dict:
        """Send a command and return its result."""
        self.count += 1
        _send(self.socket, json.dumps({"id": self.count, "method": method, "params": params}).encode())
        while True:
            message = json.loads(_receive(self.socket))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(json.dumps(message["params"])[:500])
            if message.get("id") == self.count:
                if "error" in message:
                    raise AssertionError(f"{method}: {message['error']}")
                return message["result"]

    def _page_address(self) -> str:
        port_file, end = self.profile / "DevToolsActivePort", time.monotonic() + self.timeout
        while not (port_file.is_file() and port_file.read_text().count("\n")):
            assert self.process.poll() is None and time.monotonic() < end, "chromium does not come up"
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not know this machine
        while True:
            with direct.open(f"http://127.0.0.1:{port}/json/list", timeout=self.timeout) as reply:
                pages = [t for t in json.load(reply) if t["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
            assert time.monotonic() < end, "chromium has no page"
            time.sleep(0.05)


def _connect(address: str, timeout: float) -> socket.socket:
    host, path = address.removeprefix("ws://").split("/", 1)
    name, port = host.split(":")
    connection = socket.create_connection((name, int(port)), timeout)
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(
        f"GET /{path} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(1)
    assert b" 101 " in reply.split(b"\r\n")[0], reply
    return connection


def _send(connection: socket.socket, data: bytes) -> None:
    length = len(data)
    head = b"\x81" + (
        struct.pack("!B", 0x80 | length)
        if length < 126
        else struct.pack("!BH", 0xFE, length)
        if length < 65536
        else struct.pack("!BQ", 0xFF, length)
    )
    connection.sendall(head + b"\0\0\0\0" + data)  # a mask of zeros: the protocol wants one, a local pipe does not


def _receive(connection: socket.socket) -> bytes:
    parts, final = b"", False
    while not final:
        first, second = _exactly(connection, 2)
        final, length = bool(first & 0x80), second & 0x7F
        if length > 125:
            length = int.from_bytes(_exactly(connection, 2 if length == 126 else 8), "big")
        data = _exactly(connection, length)
        if first & 0x0F in (0, 1, 2):
            parts += data
        else:  # a ping or a close: no part of a message
            final = False
    return parts


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        assert part, "chromium hung up"
        data += part
    return bytes(data)
