"""Real Chromium without a window, driven through its debugging pipe: for tests of pages.

The protocol is JSON with a zero byte after each message, on file descriptors 3 (to Chromium) and 4 (from it).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
    "--hide-scrollbars",
)

_CONTRASTS = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const light = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if (colour && !/, 0\\)$|transparent/.test(colour)) return colour;
    }
    return "white";
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const found = [];
  const add = (node, colour, name) => found.push([ratio(light(colour), light(behind(node))), name]);
  for (const node of document.querySelectorAll(SELECTOR)) {
    if (!node.getClientRects().length) continue;
    const name = node.tagName + "." + node.getAttribute("class");
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (own || node.matches("input, textarea, select")) {
      const style = getComputedStyle(node);
      add(node, node.namespaceURI.endsWith("svg") ? style.fill : style.color, name);
    }
    if (node.placeholder) add(node, getComputedStyle(node, "::placeholder").color, name + "::placeholder");
  }
  return found.sort((a, b) => a[0] - b[0]);
})()
"""


def contrasts(selector: str) -> str:
    """An expression: [contrast of text to what is behind it, element] of all that are shown, least first."""
    return _CONTRASTS.replace("SELECTOR", json.dumps(selector))


def find_chromium() -> str | None:
    """Where Chromium is, if it is on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One Chromium with one page. `events` holds all that it told without being asked."""

    def __init__(self, program: str, folder: Path, timeout_s: float = 30) -> None:
        self._timeout_s, self._number, self._rest = timeout_s, 0, b""
        self.events: list[dict[str, Any]] = []
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._in, self._out = ours_in, ours_out
        os.set_blocking(self._in, False)
        # Above the numbers that Chromium reads and writes, so that neither end is overwritten on the way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        self._pid = os.posix_spawn(
            program,
            [program, *SWITCHES, f"--user-data-dir={folder}"],
            {**os.environ, "HOME": str(folder)},
            file_actions=[
                *((os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in (0, 1, 2)),
                *((os.POSIX_SPAWN_DUP2, end, number) for number, end in enumerate(ends, 3)),
            ],
        )
        for end in ends:
            os.close(end)
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """Call a method of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told["error"]
                return told["result"]
            self.events.append(told)

    def open(self, page: Path, width: int, scheme: str) -> None:
        """Show a file, so wide, `light` or `dark`."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + self._timeout_s
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.events.append(self._next())

    def evaluate(self, script: str) -> Any:
        """The JSON value of an expression in the page."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def screenshot(self, to: Path) -> None:
        """The whole page as PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        to.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._timeout_s
        while b"\0" not in self._rest:
            assert time.monotonic() < deadline, "Chromium says nothing"
            try:
                got = os.read(self._in, 1 << 20)
                assert got, "Chromium ended"
                self._rest += got
            except BlockingIOError:
                time.sleep(0.005)
        message, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told
