"""The page at / of the HTTP port, as a browser shows it and as people use it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rafaga.server.services import page
from tests import bundles
from tests.browser import Tab, browser
from tests.integration.rest import send
from tests.integration.serving import Served, serving

STATIC = resources.files(page) / "static"
TOKEN = "of-this-test"
MARKUP = "<img src=x onerror=\"document.title='run'\">"
TASKS = ("digits", "detector", "segmenter", "backbone", "series", "letters", "plain", "broken")
# Text with less contrast to what is behind it than WCAG's level AA asks for.
FAINT = """(() => {
const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const rgba = colour => { pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = pen.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = node => { for (let at = node; at; at = at.parentElement) {
  const [r, g, b, a] = rgba(getComputedStyle(at).backgroundColor); if (a > 0.9) return [r, g, b]; }
  return [255, 255, 255]; };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const node = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('svg, noscript')) continue;
  const [a, b] = [light(rgba(getComputedStyle(node).color).slice(0, 3)), light(behind(node))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) found.push(walker.currentNode.data.trim() + ': ' + contrast.toFixed(2));
}
return found;
})()"""
NAMELESS = """[...document.querySelectorAll('input, textarea, button, a')]
  .filter(e => !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"""


@pytest.fixture(scope="module")
def served(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`everything`, a classifier whose first labels are markup, and a model that is refused."""
    root = tmp_path_factory.mktemp("page") / "repository"
    shutil.copytree(everything, root)
    edited = bundles.publish_classifier(root, "hostile") / "bundle.json"
    text = json.loads(edited.read_text())
    text["labels"][:] = [f"{MARKUP} {i}" for i in range(bundles.CLASSES)]
    figures = {
        "mase": (0.766, 0.08),
        "coverage_80": (0.7228, 0.058),
        "coverage_q10": (0.17, 0.041),
        "pinball": (0.25, 0),
    }
    text["variants"][0]["metrics"] = [
        {"name": name, "value": value, "dataset": MARKUP, "samples": 135, "standard_error": error}
        for name, (value, error) in figures.items()
    ]
    edited.write_text(json.dumps(text))
    (bundles.publish_classifier(root, "broken") / "model.onnx").write_bytes(b"not the file")
    with serving(root) as server:
        yield server


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(opened: Tab) -> Iterator[Tab]:
    """A window as it was at the start; no test may leave errors or violated policies in its console."""
    opened.complaints.clear()
    opened.resize(1240, 900)
    opened.prefer("light")
    yield opened
    assert opened.complaints == []


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red on the left, blue on the right, 40 x 20."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :25, 0] = 200
    pixels[:, 25:, 2] = 250
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def show(tab: Tab, served: Served, model: str, picked: Path | None = None) -> None:
    tab.open(f"{served.http}/#/{model}/1")
    tab.until(f"document.querySelector('article h2')?.textContent === {json.dumps(model)}")
    if picked is not None:
        tab.choose("#picked", picked)


def rows(tab: Tab) -> list[list[str]]:
    """Of the ranking in the outcome: name and share."""
    tab.until("document.querySelector('.outcome:not([aria-busy]) .bars')")
    cells = "[...document.querySelectorAll('.outcome .bar')].map(r => [r.firstChild.innerText, r.lastChild.innerText])"
    return list(tab.evaluate(cells))


def test_every_file_has_a_strict_policy_and_is_sent_once(served: Served) -> None:
    for file in STATIC.iterdir():
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        answer = send(served, path)
        assert (answer.status, answer.body) == (200, file.read_bytes())
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = send(served, path, If_None_Match=answer.headers["etag"])
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", answer.headers["etag"])


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    files = {file.name: file.read_text() for file in STATIC.iterdir()}
    assert not re.search(r"<style|style=|<script(?![^>]*src=)| on\w+=|javascript:", files["index.html"])
    foreign = [name for name, text in files.items() if re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)]
    assert foreign == []
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc"
    assert [name for name, text in files.items() if re.search(unsafe, text)] == []


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with serving(tmp_path, page="off") as server:
        assert [send(server, path).status for path in ("/", "/page/page.js")] == [404, 404]


def test_models_are_listed_with_state_precision_and_provenance(tab: Tab, served: Served) -> None:
    show(tab, served, "digits")
    listed = tab.evaluate("[...document.querySelectorAll('#models a')].map(a => a.innerText)")
    assert len(listed) == len(json.loads(served.get("/v1/models")[1])["models"])
    assert "Ready" in tab.text("#models a[aria-current]")
    assert "fp32" in tab.text("#models a[aria-current]")
    for fact in ("a few nodes", "2026-01-01", "Apache-2.0", "image: uint8 [any, 28, 28, 1]"):
        assert fact in tab.text("article")
    show(tab, served, "broken")
    assert "refused at load" in tab.text("article > .error")


def test_a_picked_image_is_classified(tab: Tab, served: Served, tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    Image.fromarray(pixels[:, :, 0]).save(tmp_path / "digit.png")
    show(tab, served, "digits", tmp_path / "digit.png")
    best = np.argsort(-bundles.classify(pixels[np.newaxis])[0])
    assert [name for name, _ in rows(tab)] == [f"digit {i}" for i in best[:5]]
    assert f"digit {best[0]}" in tab.text(".winner")
    assert "batch of 1" in tab.text(".times")
    assert "curl --data-binary @image.png" in tab.text(".shell code")
    assert "/v1/models/digits:classify" in tab.text(".shell code")


def test_a_drawn_digit_is_sent_white_on_black_scaled_and_centred(tab: Tab, served: Served) -> None:
    show(tab, served, "digits")
    box = tab.place("#drawing")
    # A small 7 in a corner.
    tab.drag([(box.left + x, box.top + y) for x, y in ((20, 20), (60, 20), (60, 22), (40, 100))])
    rows(tab)
    sent = np.array(
        tab.evaluate("[...document.querySelector('.seen').getContext('2d').getImageData(0, 0, 28, 28).data]")
    ).reshape(28, 28, 4)
    ink = sent[:, :, 0]
    assert (sent[:, :, :3] == ink[:, :, np.newaxis]).all()
    assert ink.max() > 200
    ys, xs = np.nonzero(ink)
    assert 18 <= np.ptp(ys) + 1 <= 20
    assert np.average(ys, weights=ink[ys, xs]) == pytest.approx(13.5, abs=0.8)
    assert np.average(xs, weights=ink[ys, xs]) == pytest.approx(13.5, abs=0.8)
    best = np.argsort(-bundles.classify(ink[np.newaxis, :, :, np.newaxis].astype(np.uint8))[0])
    assert [name for name, _ in rows(tab)] == [f"digit {i}" for i in best[:5]]
    tab.click(".tools button")
    tab.until("!document.querySelector('.outcome .bars')")


def test_boxes_are_drawn_where_the_objects_are(tab: Tab, served: Served, photo: Path) -> None:
    show(tab, served, "detector")
    tab.drop(".drop", photo)
    score = np.asarray(Image.open(photo)).mean() / 255
    tab.until(f"document.querySelector('.outcome .hint')?.innerText.includes('{score:.2f}')")
    slider = "const e = document.querySelector('#least-score'); e.value = %s; e.dispatchEvent(new Event('input'))"
    tab.evaluate(f"(() => {{ {slider % 0.01} }})()")
    assert [name for name, _ in rows(tab)] == ["bright thing", "dark thing"]
    image = tab.place(".stage img")
    sides = "(r => ({left: r.left, top: r.top, right: r.right, bottom: r.bottom}))(b.getBoundingClientRect())"
    # Behind the best one, so first in the document.
    quarter, whole = tab.evaluate(f"[...document.querySelectorAll('.box')].map(b => {sides})")
    assert whole == pytest.approx(vars(image), abs=1)
    middle = {"right": (image.left + image.right) / 2, "bottom": (image.top + image.bottom) / 2}
    assert quarter == pytest.approx(vars(image) | middle, abs=1)


def test_classes_of_pixels_are_laid_over_the_image(tab: Tab, served: Served, photo: Path) -> None:
    show(tab, served, "segmenter", photo)
    assert [name for name, _ in rows(tab)] == ["red", "blue"]
    image, overlay = tab.place(".stage img"), tab.place(".overlay")
    assert vars(overlay) == pytest.approx(vars(image), abs=1)
    opaque = (
        "(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((v, i) => i % 4 == 3 && v)"
        ".length / (c.width * c.height))(document.querySelector('.overlay'))"
    )
    assert tab.evaluate(opaque) == 1
    tab.click(".swatch")
    assert tab.evaluate("document.querySelector('.swatch').ariaPressed") == "false"
    assert tab.evaluate(opaque) == pytest.approx(15 / 40, abs=0.05)


def test_features_are_shown_with_their_shape(tab: Tab, served: Served, photo: Path) -> None:
    show(tab, served, "backbone", photo)
    assert "[1, 3, 10, 20], stride 2" in tab.text(".maps li")
    assert tab.evaluate("[document.querySelector('.heat').width, document.querySelector('.heat').height]") == [20, 10]


def test_a_pasted_series_is_forecast_and_drawn(tab: Tab, served: Served) -> None:
    show(tab, served, "series")
    tab.click("article textarea")
    tab.type("day, value\n2026-01-01, 1\n2026-01-02, 2\n2026-01-03, 4\n")
    tab.until("document.querySelector('path.median')")
    assert tab.text(".inputs > .hint") == "3 values"
    assert "80 % interval" in tab.text(".legend")
    assert tab.evaluate("document.querySelector('.plot svg').textContent").endswith("2026-01-012026-01-03+4 days")
    box = tab.place(".plot svg")
    tab.hover(box.right - 15, (box.top + box.bottom) / 2)
    assert tab.text(".reading").split() == ["+4", "days", "4.00", "°C", "80", "%:", "3.30", "to", "4.70"]
    tab.click("details summary")
    assert tab.text("details tbody tr").split() == ["+1", "3.30", "4.00", "4.70"]


@pytest.mark.parametrize(
    ("text", "error"),
    [("1\n2\nabc", "Line 3: “abc” is not a number."), ("1", "expected at least 2 observations, got 1")],
)
def test_what_is_wrong_with_a_series_is_said(tab: Tab, served: Served, text: str, error: str) -> None:
    show(tab, served, "series")
    tab.click("article textarea")
    tab.type(text)
    tab.until(f"document.querySelector('.try .error').innerText.includes({json.dumps(error)})")
    if "observations" in error:
        assert [said for said in tab.complaints if "400" not in said] == []
        tab.complaints.clear()  # Chromium logs every answer of 400 and above


def test_symbols_are_appended_by_a_click(tab: Tab, served: Served) -> None:
    show(tab, served, "letters")
    tab.click(".inputs .symbol:nth-child(2)")
    assert rows(tab)[0] == ["b", "100.0 %"]
    tab.click(".outcome .symbol")
    tab.until("document.querySelector('.inputs input').value === 'bb'")
    tab.click(".inputs input")
    tab.type("aab")
    tab.until("document.querySelectorAll('.outcome .bar').length && !document.querySelector('[aria-busy]')")
    tab.until("document.querySelector('.outcome .bar').lastChild.innerText === '66.7 %'")


def test_a_plain_model_takes_named_arrays(tab: Tab, served: Served) -> None:
    show(tab, served, "plain")
    tab.evaluate(
        "(t => { t.value = t.value.replace('[0,0,0]', '[1,2,3.5]') })(document.querySelector('article textarea'))"
    )
    tab.click(".primary:not(#sign-in *)")
    assert tab.text(".outcome pre") == "y FP32 [1,3]\n[2,4,7]"


def test_markup_in_labels_stays_text(tab: Tab, served: Served, tmp_path: Path) -> None:
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    show(tab, served, "hostile", tmp_path / "black.png")
    assert rows(tab)[0][0] == f"{MARKUP} 0"
    assert tab.evaluate("document.querySelectorAll('.outcome img').length") == 0
    assert tab.evaluate("document.title") == "hostile · Rafaga"
    accuracy = tab.text("section[aria-labelledby=accuracy-title]")
    assert f"{MARKUP}, 135 samples" in accuracy
    for shown in ("0.766 ± 0.08", "72.3 % ± 5.8 %", "0.25"):
        assert shown in accuracy, "figures have their standard errors, if these are known"


def test_a_token_is_asked_for_and_shows_nothing_before(tab: Tab, everything: Path) -> None:
    with serving(everything, bearer_token_sha256=(hashlib.sha256(TOKEN.encode()).hexdigest(),)) as server:
        tab.open(server.http + "/")
        tab.until("document.activeElement.id === 'token'")
        for text, refusal in (("wrong", "refused this token"), (TOKEN, "")):
            tab.type(text)
            tab.press("Enter")
            if refusal:
                assert refusal in tab.text("#refused")
                assert "digits" not in tab.evaluate("document.documentElement.outerHTML")
        assert "digits" in tab.text("#models")
        assert tab.evaluate("sessionStorage.length") == 1
        tab.click("#forget")
        assert "digits" not in tab.evaluate("document.documentElement.outerHTML")
        assert tab.evaluate("sessionStorage.length") == 0
    refused = [said for said in tab.complaints if "401" in said]
    assert len(refused) >= 2
    tab.complaints[:] = [said for said in tab.complaints if said not in refused and "ERR_" not in said]


def test_live_figures_come_from_the_metrics(tab: Tab, served: Served) -> None:
    show(tab, served, "digits")
    module = "import('/page/metrics.js').then(({parse, History}) => %s)"
    line = r'a_total{model="x\\"y\\\\z\\n",code="OK"} 3 1700000000'
    found = tab.evaluate(module % f"parse('# HELP\\n{line}').map(s => [s.name, s.labels.get('model'), s.value])")
    assert found == [["a_total", 'x"y\\z\n', 3]]
    before = 'rafaga_queue_seconds_count{model="m"} 10\nrafaga_queue_seconds_sum{model="m"} 1\n'
    after = (
        'rafaga_queue_seconds_count{model="m"} 30\nrafaga_queue_seconds_sum{model="m"} 1.2\n'
        'rafaga_queue_seconds_bucket{model="m",le="0.1"} 19\nrafaga_queue_seconds_bucket{model="m",le="+Inf"} 20\n'
        'rafaga_inference_seconds_count{model="m"} 5\nrafaga_inference_seconds_sum{model="m"} 0.1\n'
        'rafaga_batch_size_sum{model="m"} 40\nrafaga_requests_in_flight 2\n'
    )
    history = "(h => (h.add(%s, 1000), h.add(%s, 3000), h.of('m')[0]))(new History())"
    point = tab.evaluate(module % (history % (json.dumps(before), json.dumps(after))))
    expected = {"rate": 10, "wait": 0.01, "run": 0.02, "latency": 0.03, "batch": 8, "queued": 0}
    assert {name: value for name, value in point.items() if name != "slowWait"} == pytest.approx(expected)
    tab.until("document.querySelectorAll('.tile').length === 4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_model_fits_a_phone_and_can_be_read(tab: Tab, served: Served, scheme: str) -> None:
    tab.prefer(scheme)
    tab.resize(400, 800)
    found: dict[str, Any] = {}
    show(tab, served, TASKS[0])
    for model in TASKS:
        tab.evaluate(f"location.hash = '#/{model}/1'")
        tab.until(f"document.querySelector('article h2').textContent === {json.dumps(model)}")
        wide = tab.evaluate("document.documentElement.scrollWidth")
        found[model] = (wide, tab.evaluate(FAINT), tab.evaluate(NAMELESS))
    assert found == dict.fromkeys(TASKS, (400, [], []))
