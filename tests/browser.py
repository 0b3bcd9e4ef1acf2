"""Headless Chromium: a page as people see and use it. Skips where there is none."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
WIDTH = 1240
HEIGHT = 900
_TIMEOUT_S = 120
# Chromium reads commands from descriptor 3 and writes to 4; subprocess cannot choose the numbers.
_LAUNCH = """
import fcntl, os, sys
reads, writes = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 5) for fd in sys.argv[1:3]]  # neither is 3 or 4
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
_MEASURE = """(() => {
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
return {
  width: document.documentElement.scrollWidth,
  plots: [...document.querySelectorAll('svg')].map(svg => ({
    box: box(svg),
    axes: [...svg.querySelectorAll('g[id^=axes_]')].map(g => box(g.querySelector('g[id^=patch_]'))),
    words: [...svg.querySelectorAll('text')].map(t => ({text: t.textContent.trim(), box: box(t)})),
  })),
};
})()"""
_UNTIL = """new Promise((resolve, reject) => {
const end = performance.now() + %d;
const look = () => {
  const found = (() => { try { return %s; } catch { return null; } })();
  if (found) resolve(found);
  else if (performance.now() > end) reject(new Error('it never came: ' + document.body.innerText));
  else setTimeout(look, 20);
};
look();
})"""


class Tab:
    """A page under test. complaints: what its console and the browser said: errors, warnings, violated policies."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._buffer = b""
        self._last = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self._call(f"{domain}.enable")
        self.resize(WIDTH, HEIGHT)

    def open(self, address: str) -> None:
        for each in ("about:blank", address):  # an address that differs in its fragment alone loads nothing
            self._call("Page.navigate", url=each)
            self.until(f"location.href.startsWith({json.dumps(each)}) && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript, as JSON has it; promises are awaited."""
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description"))
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """Waits until the value of JavaScript is true, and returns it."""
        return self.evaluate(_UNTIL % (_TIMEOUT_S * 500, expression))

    def text(self, selector: str) -> str:
        return str(self.until(f"document.querySelector({json.dumps(selector)})?.innerText"))

    def place(self, selector: str) -> Box:
        """Where the element is in the window, scrolled into view."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.until(element + "?.getBoundingClientRect().width > 0")
        self.evaluate(element + ".scrollIntoView({block: 'center', behavior: 'instant'})")
        return Box(*self.evaluate(f"(r => [r.left, r.top, r.right, r.bottom])({element}.getBoundingClientRect())"))

    def click(self, selector: str) -> None:
        box = self.place(selector)
        self.drag([((box.left + box.right) / 2, (box.top + box.bottom) / 2)])

    def drag(self, points: Sequence[tuple[float, float]]) -> None:
        """Presses the mouse at the first point of the window, moves it over the others, and releases it."""
        for kind, (x, y) in (("Pressed", points[0]), *(("Moved", p) for p in points[1:]), ("Released", points[-1])):
            button = {"button": "left", "buttons": int(kind != "Released"), "clickCount": int(kind != "Moved")}
            self._call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button)

    def hover(self, x: float, y: float) -> None:
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def choose(self, selector: str, file: Path) -> None:
        """Picks the file in a file input."""
        self.until(f"document.querySelector({json.dumps(selector)}) !== null")
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def drop(self, selector: str, file: Path) -> None:
        box = self.place(selector)
        at = {"x": (box.left + box.right) / 2, "y": (box.top + box.bottom) / 2}
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self._call("Input.dispatchDragEvent", type=kind, data=data, **at)

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """scheme: "light" or "dark"."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """The whole page, in a window as high as it is."""
        width = self.evaluate("innerWidth")
        self.resize(width, self.evaluate("Math.max(innerHeight, document.documentElement.scrollHeight)"))
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last += 1
        session = {} if self._session is None else {"sessionId": self._session}
        command = {"id": self._last, "method": method, "params": parameters, **session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self._note(message.get("method", ""), message.get("params", {}))

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._events], [], [], end - time.monotonic())
            received = os.read(self._events, 1 << 20) if ready else b""
            assert received, "Chromium gives no answer"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def _note(self, event: str, about: dict[str, Any]) -> None:
        match event:
            case "Runtime.exceptionThrown":
                self.complaints.append(str(about["exceptionDetails"].get("exception", about)))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.complaints.append(f"{about['entry']['source']}: {about['entry']['text']}")


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """A tab of a Chromium of its own, whose profile is in the folder."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no headless Chromium is installed (Debian: chromium)")
    theirs_in, commands = os.pipe()
    events, theirs_out = os.pipe()
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--no-first-run",
        "--no-proxy-server",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder / 'profile'}",
    )
    launch = [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), program, *flags]
    with subprocess.Popen(
        launch, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Tab(commands, events)
        finally:
            os.close(commands)  # Chromium ends with it
            os.close(events)
            process.wait(_TIMEOUT_S)


@dataclass(frozen=True)
class Box:
    """Pixels of the page."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> tuple[float, float]:
        """How far they reach into each other, across and down; negative where they are apart."""
        across = min(self.right, other.right) - max(self.left, other.left)
        return across, min(self.bottom, other.bottom) - max(self.top, other.top)


@dataclass(frozen=True)
class Word:
    text: str
    box: Box


@dataclass(frozen=True)
class Plot:
    """An SVG element. axes: the area inside the axes of each panel."""

    box: Box
    axes: tuple[Box, ...]
    words: tuple[Word, ...]

    @property
    def collisions(self) -> list[tuple[str, str]]:
        """Words that are written over each other. A box has some air above and below its letters."""
        pairs = ((a, b, a.box.overlap(b.box)) for a, b in combinations(self.words, 2))
        return [(a.text, b.text) for a, b, (across, down) in pairs if across > 1 and down > 5]

    @property
    def cut(self) -> list[str]:
        """Words that reach beyond the plot, where they are hidden."""
        within = (-1.0, -1.0, 1.0, 1.0)
        left, top, right, bottom = (a + b for a, b in zip(vars(self.box).values(), within, strict=True))
        words = ((w.text, w.box) for w in self.words)
        return [t for t, b in words if b.left < left or b.top < top or b.right > right or b.bottom > bottom]


@dataclass(frozen=True)
class Page:
    """pixels: uint8 [height, width, 3]. width: of what the page holds, more than the window's where it overflows."""

    pixels: NDArray[np.uint8]
    width: float
    plots: tuple[Plot, ...]

    def colourful(self, box: Box) -> float:
        """The share of pixels in the box that are not grey: curves and bars are coloured, axes and words are not."""
        inside = self.pixels[round(box.top) : round(box.bottom), round(box.left) : round(box.right)].astype(int)
        assert inside.size, f"{box} is not on the screenshot"
        return float((np.ptp(inside, axis=2) > 60).mean())


def see(html: str, folder: Path) -> Page:
    """The screenshot stays in the folder, for people to look at."""
    page, screenshot = folder / "page.html", folder / "page.png"
    page.write_text(html, encoding="utf-8")
    with browser(folder) as tab:
        tab.open(page.as_uri())
        seen = tab.evaluate(_MEASURE)
        tab.screenshot(screenshot)
    plots = tuple(
        Plot(
            Box(*plot["box"]),
            tuple(Box(*axes) for axes in plot["axes"]),
            tuple(Word(word["text"], Box(*word["box"])) for word in plot["words"] if word["text"]),
        )
        for plot in seen["plots"]
    )
    with Image.open(screenshot) as image:
        return Page(np.asarray(image.convert("RGB")), seen["width"], plots)
