"""The page in a real browser: it opens without complaint, asks for nothing, and its controls work.

Skipped where no Chromium is installed.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from browser_fixture import NAMES, Browser, find_browser
from fedmerge.report import fit, write_report
from report_fixture import write_folder

PATH = find_browser()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"none of {', '.join(NAMES)} is installed")

PANEL = "document.querySelector('#setting-1')"
IMAGE = f"{PANEL}.querySelector('.weights image')"
SLIDER = f"{PANEL}.querySelector('.slider input')"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    methods = ("fedmerge", "fedavg", "local")
    write_folder(
        folder, settings=("concept-mix", "domain"), methods=methods, seeds=(0, 1), rounds=8
    )
    return write_report(folder)


@pytest.fixture(scope="module")
def shared(report: Path) -> Iterator[Browser]:
    with Browser(PATH or "") as browser:
        browser.open(report)
        yield browser
        assert browser.complaints() == []
        assert browser.requests() == [report.as_uri()]


def test_the_page_opens_without_a_complaint_and_asks_for_nothing(
    shared: Browser, report: Path
) -> None:
    assert shared.run("document.title") == "fedmerge report"
    assert shared.complaints() == []
    assert shared.requests() == [report.as_uri()]


def test_the_slider_moves_the_weights_and_the_map(shared: Browser) -> None:
    pixels = f"""(async () => {{
        const image = new Image();
        image.src = {IMAGE}.getAttribute("href") || {IMAGE}.getAttribute("xlink:href");
        await image.decode();
        const canvas = document.createElement("canvas");
        canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
        canvas.getContext("2d").drawImage(image, 0, 0);
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.width, canvas.height, ...data.filter((_, i) => i % 4 === 3)];
    }})()"""
    places = (
        f"[...{PANEL}.querySelectorAll('.point')].map((p) => "
        "p.getAttribute('transform').match(/[0-9.]+/g).map(Number)).flat()"
    )
    last, there = shared.run(pixels), shared.run(places)
    assert last[:2] == [5, 32]
    assert shared.run(f"{SLIDER}.max") == "3"  # rounds 2, 4, 6, 8
    move = f"{SLIDER}.value = %d; {SLIDER}.dispatchEvent(new Event('input'))"
    shared.run(move % 0)
    first = shared.run(pixels)
    assert shared.run(f"{PANEL}.querySelector('.slider output').value") == "2"
    assert shared.run(places) != there
    # The weights begin near uniform: a row of five is 0.2 each, and the scale ends at 1.
    rows = [first[2 + 5 * i : 7 + 5 * i] for i in range(32)]
    last_rows = [last[2 + 5 * i : 7 + 5 * i] for i in range(32)]
    assert sum(max(row) - min(row) for row in rows) < sum(max(r) - min(r) for r in last_rows) / 2
    shared.run(move % 3)
    again = shared.run(pixels)
    assert max(abs(a - b) for a, b in zip(again, last, strict=True)) <= 2  # a byte for a weight
    assert shared.run(places) == there


def test_the_slider_and_the_settings_obey_the_keyboard(shared: Browser) -> None:
    shared.run(f"{SLIDER}.focus()")
    shared.press("ArrowLeft", 37)
    assert shared.run(f"{PANEL}.querySelector('.slider output').value") == "6"
    outline = f"getComputedStyle({SLIDER}).outlineStyle"
    assert shared.run(outline) == "solid"  # focus can be seen
    shown = "[...document.querySelectorAll('.panel')].map((p) => getComputedStyle(p).display)"
    assert shared.run(shown) == ["block", "none"]
    shared.run("document.querySelector('#tab-1').focus()")
    shared.press("ArrowRight", 39)
    assert shared.run(shown) == ["none", "block"]
    assert shared.run("document.querySelector('#setting-2 .card').children.length > 3")
    shared.press("ArrowLeft", 37)
    assert shared.run(shown) == ["block", "none"]


def test_a_client_is_picked_by_list_button_or_map(shared: Browser) -> None:
    card = f"{PANEL}.querySelector('.card').textContent"
    picker = f"{PANEL}.querySelector('.picker select')"
    shared.run(f"{picker}.value = '9'; {picker}.dispatchEvent(new Event('change'))")
    assert "true kind: swap 001" in shared.run(card)
    shared.run(f"{PANEL}.querySelector('.step[data-step=\"1\"]').click()")
    assert "true kind: swap 010" in shared.run(card)
    point = f"{PANEL}.querySelector('.point[data-client=\"7\"]')"
    shared.run(f"{point}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    assert "true kind: swap 111" in shared.run(card)
    assert shared.run(f"{point}.classList.contains('on')")
    for part in ("28 to train, 14 to validate, 28 to test", "fedmerge", "fedavg", "local"):
        assert part in shared.run(card)


def test_the_map_changes_its_colours(shared: Browser) -> None:
    fills = f"[...{PANEL}.querySelectorAll('.point circle')].map((c) => getComputedStyle(c).fill)"
    kinds = shared.run(fills)
    assert len(set(kinds)) == 8
    shared.run("document.querySelector('#map-1-1').click()")
    gains = shared.run(fills)
    assert gains != kinds
    letter = f"getComputedStyle({PANEL}.querySelector('.point .kind')).display"
    assert shared.run(letter) == "none"
    shared.run("document.querySelector('#map-1-kind').click()")
    assert shared.run(fills) == kinds


def test_the_cells_are_read_with_the_keyboard(shared: Browser) -> None:
    for figure, words in (("weights", "weight"), ("worth", "is worth")):
        picture = f"{PANEL}.querySelector('.{figure} svg')"
        read = f"{PANEL}.querySelector('.{figure} .readout').textContent"
        resting = shared.run(read)
        shared.run(f"{picture}.focus()")
        shared.press("ArrowDown", 40)  # enters
        first = shared.run(read)
        assert words in first
        assert "model 1" in first
        shared.press("ArrowRight", 39)
        assert "model 2" in shared.run(read)
        shared.press("ArrowDown", 40)
        assert shared.run(read).split(":")[0] != first.split(":")[0]  # another client
        assert shared.run(f"{picture}.querySelectorAll('.cell').length") == 1
        shared.run(f"{picture}.blur()")
        assert shared.run(read) == resting
        assert shared.run(f"{picture}.querySelectorAll('.cell').length") == 0


def test_the_map_is_walked_with_the_arrow_keys(shared: Browser) -> None:
    shared.run(f"{PANEL}.querySelector('.point[tabindex=\"0\"]').focus()")
    stops = f"{PANEL}.querySelectorAll('.point[tabindex=\"0\"]').length"
    at = "document.activeElement.dataset.client"
    assert shared.run(stops) == 1
    seen = {shared.run(at)}
    for key, code in (("ArrowLeft", 37), ("ArrowUp", 38), ("ArrowRight", 39), ("ArrowDown", 40)):
        shared.press(key, code)
        seen.add(shared.run(at))
        assert shared.run("document.activeElement.classList.contains('on')")
        assert shared.run(f"{PANEL}.querySelector('.picker select').value") == shared.run(at)
    assert len(seen) > 2
    assert shared.run(stops) == 1


def test_bars_have_one_scale_and_negative_ones_hang(shared: Browser) -> None:
    card = f"{PANEL}.querySelector('.card')"
    tall = f"[...{card}.querySelectorAll('.bars.ours')].map((b) => b.clientHeight)"
    first = f"[...{card}.querySelectorAll('.bars.ours i')].map((i) => i.clientHeight)"
    weights = f"""JSON.parse({PANEL}.querySelector('script').textContent).clients[
        {PANEL}.querySelector('.picker select').value].row.flat()"""
    full = shared.run(tall)[0]
    scale = shared.run(f"JSON.parse({PANEL}.querySelector('script').textContent).weights.scale")
    for height, weight in zip(shared.run(first), shared.run(weights), strict=True):
        assert abs(height - full * weight / 100 / scale) <= 1.5
    assert shared.run(f"{card}.querySelector('.bars.ours').previousSibling.textContent").endswith(
        f"0.00 to {scale:.2f}"
    )


def test_a_setting_is_chosen_from_the_bar_and_stands_in_the_address(shared: Browser) -> None:
    shown = "[...document.querySelectorAll('.panel')].map((p) => getComputedStyle(p).display)"
    shared.run("document.querySelector('.turn[data-step=\"1\"]').click()")
    assert shared.run(shown) == ["none", "block"]
    assert shared.run("location.hash") == "#setting-2"
    assert shared.run("document.querySelector('#turn').value") == "2"
    turn = "document.querySelector('#turn')"
    shared.run(f"{turn}.value = 1; {turn}.dispatchEvent(new Event('change'))")
    assert shared.run(shown) == ["block", "none"]
    shared.run("document.querySelector('#tab-2').click()")
    assert shared.run("location.hash") == "#setting-2"
    shared.run("document.querySelector('#tab-1').click()")


def test_focus_is_never_under_the_bar(shared: Browser) -> None:
    bar = "document.querySelector('.sticky').getBoundingClientRect()"
    assert shared.run(f"{bar}.height") < 64
    buttons = f"[...{PANEL}.querySelectorAll('.name')]"
    for i in (2, 1, 0):
        top = f"{buttons}[{i}].getBoundingClientRect().top"
        shared.run(f"scrollBy(0, {top} - 5)")  # under the bar, which a browser takes for seen
        assert shared.run(top) < shared.run(f"{bar}.bottom")
        shared.run(f"{buttons}[{i}].focus()")
        assert shared.run(top) >= shared.run(f"{bar}.bottom")


def test_on_paper_all_is_open_and_shown(shared: Browser) -> None:
    shut = "document.querySelectorAll('details:not([open])').length"
    lively = "document.querySelectorAll('.panel[data-lively]').length"
    before = shared.run(shut)
    assert before > 0
    shared.run("dispatchEvent(new Event('beforeprint'))")
    assert shared.run(shut) == 0
    assert shared.run(lively) == shared.run("document.querySelectorAll('.panel').length") > 1
    shared.run("dispatchEvent(new Event('afterprint'))")
    assert shared.run(shut) == before


def test_the_slider_says_its_round_before_it_is_moved(tmp_path: Path) -> None:
    write_folder(tmp_path, settings=("domain",), methods=("fedmerge", "fedavg"), rounds=4)
    with Browser(PATH or "") as browser:
        browser.open(write_report(tmp_path))
        slider, output = (
            f"{PANEL}.querySelector('.slider {part}')" for part in ("input", "output")
        )
        shown = browser.run(f"{output}.value")
        assert browser.run(f"{slider}.getAttribute('aria-valuetext')") == f"round {shown}"


def test_a_methods_name_lifts_its_line(shared: Browser) -> None:
    lit = f"[...{PANEL}.querySelectorAll('.lines .on title')].map((t) => t.textContent)"
    button = f"[...{PANEL}.querySelectorAll('.name')].find((b) => b.textContent === 'local')"
    assert shared.run(lit) == []
    shared.run(f"{button}.click()")
    assert shared.run(lit) == ["local", "local"]  # in both pictures
    assert shared.run(f"{button}.getAttribute('aria-pressed')") == "true"
    shared.run(f"{button}.click()")
    assert shared.run(lit) == []


def test_grey_lines_that_are_pressed_get_colours_and_names(tmp_path: Path) -> None:
    methods = ("fedmerge", *(f"fedavg:m{i}" for i in range(12)))
    write_folder(tmp_path, settings=("domain",), methods=methods, seeds=(0, 1), rounds=4)
    with Browser(PATH or "") as browser:
        browser.open(write_report(tmp_path))
        grey = f"""[...{PANEL}.querySelectorAll('.name')]
            .filter((b) => b.querySelector('.swatch').style.background.includes('grey'))"""
        pressed = browser.run(f"{grey}.slice(0, 3).map((b) => (b.click(), b.textContent))")
        curves = f"{PANEL}.querySelector('.lines')"
        called = f"[...{curves}.querySelectorAll('.called')]"
        assert browser.run(f"{called}.map((t) => t.textContent)") == pressed
        strokes = browser.run(
            f"[...{curves}.querySelectorAll('[data-method].on path')]"
            ".map((p) => getComputedStyle(p).stroke)"
        )
        assert len(set(strokes)) == 3
        assert sorted(browser.run(f"{called}.map((t) => getComputedStyle(t).fill)")) == sorted(
            strokes
        )
        faint = f"[...{curves}.querySelectorAll('[data-band]')]"
        wait = "new Promise((done) => setTimeout(done, 400))"  # the fading takes a moment
        shown = f"{wait}.then(() => {faint}.map((b) => getComputedStyle(b).opacity))"
        assert set(browser.run(shown)) == {"0"}
        browser.run(f"{grey}.slice(3).forEach((b) => b.click())")
        places = browser.run(f"{called}.map((t) => Number(t.getAttribute('y')))")
        tall = browser.run(f"{curves}.querySelector('svg').viewBox.baseVal.height")
        assert len(places) == len(browser.run(grey)) > 5
        ordered = sorted(places)
        assert 0 < ordered[0] < ordered[-1] < tall
        assert all(b - a > 9.9 for a, b in pairwise(ordered))
        browser.run(f"{grey}.slice(3).forEach((b) => b.click())")
        browser.run(f"{grey}.slice(0, 3).forEach((b) => b.click())")
        assert browser.run(f"{called}.length") == 0
        assert set(browser.run(shown)) == {"1"}


def test_the_table_changes_with_its_view(shared: Browser) -> None:
    shown = (
        "[...document.querySelectorAll('.view')].filter((v) => getComputedStyle(v).display !== "
        "'none').map((v) => v.querySelector('.title').textContent)"
    )
    assert shared.run(shown) == ["Test accuracy, merged model"]
    shared.run("document.querySelector('#view-2').click()")
    assert shared.run(shown) == ["Test accuracy, merged model, best round"]
    shared.run("document.querySelector('#view-1').click()")


def test_every_control_has_a_name(shared: Browser) -> None:
    bare = (
        "[...document.querySelectorAll('input, select, button')].filter((c) => !(c.labels?.length "
        "|| c.textContent.trim() || c.getAttribute('aria-label'))).length"
    )
    assert shared.run(bare) == 0


def test_a_narrow_page_does_not_scroll_sideways(shared: Browser) -> None:
    for width in (400, 900):
        shared.resize(width, 900)
        assert shared.run("document.documentElement.scrollWidth") <= width
    shared.send("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("part", [0.9, 0.6, 0.0])  # of its bytes; without all parts it is larger
def test_a_page_with_parts_left_out_works(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    monkeypatch.setattr(fit, "LIMIT", part * report.stat().st_size)
    shutil.copytree(report.parent, tmp_path / "cut")
    with Browser(PATH or "") as browser:
        browser.open(write_report(tmp_path / "cut"))
        assert "leaves out" in browser.run("document.querySelector('header').textContent")
        assert browser.complaints() == []


def test_the_dark_page_is_dark(report: Path) -> None:
    with Browser(PATH or "", dark=True) as browser:
        browser.open(report)
        ground = "getComputedStyle(document.documentElement).backgroundColor"
        assert browser.run(ground) == "rgb(20, 23, 27)"
        line = f"getComputedStyle({PANEL}.querySelector('.lines text')).fill"
        assert browser.run(line) == "rgb(228, 231, 234)"
        assert "night" in browser.run(f"getComputedStyle({IMAGE}).filter")
        assert browser.complaints() == []


def test_without_scripts_the_last_round_is_shown(report: Path) -> None:
    with Browser(PATH or "") as browser:
        browser.send("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.open(report)
        document = browser.send("DOM.getDocument", {"depth": -1})["root"]["nodeId"]
        chosen = browser.send(
            "DOM.querySelectorAll", {"nodeId": document, "selector": ".weights image"}
        )
        assert len(chosen["nodeIds"]) >= 4
        slider = browser.send(
            "DOM.querySelectorAll", {"nodeId": document, "selector": ".slider[hidden]"}
        )
        assert len(slider["nodeIds"]) == 2
        assert browser.complaints() == []
