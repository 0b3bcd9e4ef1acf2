"""A page as people see it: rendered by headless Chromium, with the places of its plots and of the words in them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chromium-headless-shell")
WIDTH = 1240
_HEIGHT = 6000
_TIMEOUT_S = 120
# Runs in a copy of the page, and only writes down: pages themselves have no script.
_MEASURE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const svgs = [...document.querySelectorAll('svg')];
document.documentElement.dataset.seen = JSON.stringify({
  width: document.documentElement.scrollWidth,
  height: document.documentElement.scrollHeight,
  plots: svgs.map(svg => ({
    box: box(svg),
    axes: [...svg.querySelectorAll('g[id^=axes_]')].map(g => box(g.querySelector('g[id^=patch_]'))),
    words: [...svg.querySelectorAll('text')].map(t => ({text: t.textContent.trim(), box: box(t)})),
  })),
});
</script>"""


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
        """Words that reach beyond the plot, where nobody sees them."""
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
        """The share of pixels in the box that are no grey: curves and bars are coloured, axes and words are not."""
        inside = self.pixels[round(box.top) : round(box.bottom), round(box.left) : round(box.right)].astype(int)
        assert inside.size, f"{box} is not on the screenshot"
        return float((np.ptp(inside, axis=2) > 60).mean())


def see(html: str, folder: Path) -> Page:
    """Skips where there is no Chromium. The screenshot stays in the folder, for people to look at."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no headless Chromium is installed (Debian: chromium)")
    page, screenshot = folder / "page.html", folder / "page.png"
    page.write_text(html.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
    common = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={WIDTH},{_HEIGHT}",
    ]
    address = page.as_uri()
    ran = subprocess.run(
        [*common, "--dump-dom", f"--screenshot={screenshot}", address],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=True,
    )
    found = re.search(r'data-seen="([^"]*)"', ran.stdout)
    assert found, ran.stderr
    seen = json.loads(unescape(found[1]))
    assert seen["height"] <= _HEIGHT, "the page is longer than the screenshot"
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
