"""The report page in a headless Chromium that reaches nothing: narrow, wide, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report.test_page import HOSTILE, named
from report.test_report import run

from effbench.report.page.blocks import block_of
from effbench.report.page.evidence import evidence
from effbench.report.page.render import PLAIN_ROWS, page_of

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt-get install chromium"),
]
SIZES = [(width, dark) for width in (390, 1400) for dark in (False, True)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it: tests, curves, a hostile label, more rows than plain ones.

    Its rows are in two blocks, of which only the first has tests and a method of its own.
    """
    first = run("lora", {"r1": 0.1, "r2": 0.05}, number=1)
    others = [run("full", {"": n / 50}, number=n, settings={"n": n}) for n in range(2, 8)]
    filler = [named(n, label=HOSTILE, notes=[HOSTILE]) for n in range(PLAIN_ROWS + 50)]
    records = [first, *others, *filler]
    lines = ([1.0, 2.0, 3.0], [3.0, 2.5, 2.2])
    curves = [{"key": r.key, "training": lines, "validation": lines} for r in others]
    path = tmp_path_factory.mktemp("report") / "report.html"
    blocks = [block_of(records[:9]), block_of(records[9:])]
    path.write_text(page_of(blocks, records, evidence(records, first, records), curves))
    return path


def wrong(browser: Browser) -> list[object]:
    """Return what the page asked of the network, and its errors."""
    asked = [e for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    urls = [e["params"]["request"]["url"] for e in asked]
    said = [
        e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")
    ]
    return [u for u in urls if not u.startswith("file:")] + said


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_it_fits_and_asks_for_nothing(
    browser: Browser, report: Path, width: int, dark: bool
) -> None:
    browser.open(report, width=width, dark=dark)
    assert wrong(browser) == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('#charts svg').length") >= 4
    red, green, blue = browser.run(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert (max(red, green, blue) < 60) if dark else (min(red, green, blue) > 200)


FILTERED = """
new Promise((done) => {
  const input = document.querySelector("input[type=search]");
  input.value = %r;
  input.dispatchEvent(new Event("input"));
  setTimeout(done, 500);  // the charts come later
})
"""
LEGENDS = """
[...document.querySelectorAll("#charts .legend li")]
  .filter((li) => li.querySelector(".fill"))
  .map((li) => [li.textContent.trim(), li.querySelector(".fill").getAttribute("class")])
"""


def test_a_name_looks_alike_in_all_charts_whatever_is_shown(browser: Browser, report: Path) -> None:
    browser.open(report, width=1400)
    looks: dict[str, set[str]] = {}
    for words in ("", "method=lora"):
        browser.run(FILTERED % words)
        for name, look in browser.run(LEGENDS):
            looks.setdefault(name, set()).add(look)
    assert {"lora", "full"} <= looks.keys()
    assert [len(found) for found in looks.values()] == [1] * len(looks), looks


CONTRAST = """
(() => {
  const numbers = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (; node; node = node.parentElement) {
    const c = numbers(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3]) return c; }
    return numbers(getComputedStyle(document.body).backgroundColor); };
  const worst = [];
  const told = "p, li, td, th, a, summary, button, label, svg text";
  for (const node of document.querySelectorAll(told)) {
    if (!node.getClientRects().length || !node.textContent.trim()) continue;
    const style = getComputedStyle(node);
    const ink = light(numbers(node.closest("svg") ? style.fill : style.color));
    const back = light(behind(node)), text = node.textContent.slice(0, 40);
    worst.push([(Math.max(ink, back) + 0.05) / (Math.min(ink, back) + 0.05), text]);
  }
  return worst.sort((a, b) => a[0] - b[0])[0];
})()
"""
"""The text that stands out least: https://www.w3.org/TR/WCAG22/#contrast-minimum asks for 4.5."""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_can_be_read(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report, width=1400, dark=dark)
    ratio, text = browser.run(CONTRAST)
    assert ratio >= 4.5, text


def test_everything_that_can_be_reached_has_a_name(browser: Browser, report: Path) -> None:
    browser.open(report, width=1400)
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    found = [n for n in nodes if not n["ignored"]]
    roles = ("button", "link", "searchbox", "combobox", "checkbox", "region", "table", "img")
    parts = [n for n in found if n["role"]["value"] in roles]
    assert {n["role"]["value"] for n in parts} >= {"button", "link", "searchbox", "checkbox"}
    nameless = [n for n in parts if n["role"]["value"] != "table" and not n["name"].get("value")]
    assert nameless == []


def test_the_keyboard_does_all_that_the_mouse_does(browser: Browser, report: Path) -> None:
    browser.open(report, width=1400)
    focus = (
        "(document.activeElement.getAttribute('aria-label') || document.activeElement.textContent)"
    )
    for _ in range(40):
        browser.press("Tab")
        if browser.run(focus) == "Filter the rows":
            break
    browser.call("Input.insertText", text="n=4")
    assert browser.run("document.querySelector('[role=status]').textContent").startswith("1 of ")
    for _ in range(40):
        browser.press("Tab")
        if browser.run("document.activeElement.matches('thead button')"):
            break
    browser.press("Enter", "\r")
    assert browser.run("document.querySelectorAll('th[aria-sort=ascending]').length") == 1
    for _ in range(60):
        browser.press("Tab")
        if browser.run("document.activeElement.matches('td .open')"):
            break
    browser.press("Enter", "\r")
    assert browser.run("document.getElementById('details').open")
    assert "effbench train" in browser.run("document.querySelector('#details pre').textContent")
    browser.press("Escape")
    assert not browser.run("document.getElementById('details').open")
    assert browser.run("document.activeElement.matches('td .open')"), "where one was before"


def test_many_differences_are_folded(browser: Browser, tmp_path: Path) -> None:
    """24 of 30, the best ones first, and all of them after a press of Enter."""
    records = [run("lora", {"": n / 50}, number=n, settings={"n": n}) for n in range(31)]
    found = evidence(records, records[-1], records)
    page = tmp_path / "report.html"
    page.write_text(page_of([block_of(records)], records, found))
    browser.open(page, width=1400)
    rows = "document.querySelectorAll('#forest svg[role=group] title').length"
    first = "document.querySelector('#forest svg[role=group] title').textContent"
    assert browser.run(rows) == 24 and browser.run(first) == found.forest[0]["rows"][0][0]
    assert browser.run("document.querySelector('#forest').offsetHeight") < 1000
    browser.run("document.querySelector('#forest .more').focus()")
    browser.press("Enter", "\r")
    assert browser.run(rows) == 30
    assert browser.run("document.activeElement.getAttribute('aria-expanded')") == "true"


def test_an_artefact_used_in_two_ways_is_two_lines(browser: Browser, tmp_path: Path) -> None:
    """One line would go to and fro between them."""
    made = run("qdylora", {"r1": 0.2, "r8": 0.1})
    ways = [run("qdylora", {"r1": d, "r8": d / 2}, number=n) for n, d in ((2, 0.5), (3, 0.9))]
    used = [replace(way, stage="eval", parent=made.key) for way in ways]
    path = tmp_path / "report.html"
    for records, lines in (([made], 1), (used, 2), ([made, *used], 3)):
        path.write_text(page_of([block_of(records)], records, None, []))
        browser.open(path, width=1400)
        drawn = "document.querySelectorAll('#pareto path[aria-label^=\"Points of\"]').length"
        assert browser.run(drawn) == lines


def test_without_a_script_it_is_read(browser: Browser, report: Path) -> None:
    browser.open(report, width=390, script=False)
    assert wrong(browser) == []
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    rows = [n for n in tree if not n["ignored"] and n["role"]["value"] == "row"]
    assert len(rows) >= PLAIN_ROWS
    assert not [n for n in tree if not n["ignored"] and n["role"]["value"] == "searchbox"]


def test_it_prints_rows_and_no_controls(browser: Browser, report: Path) -> None:
    browser.open(report, width=1400)
    browser.run("dispatchEvent(new Event('beforeprint')), 0")
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run("document.querySelectorAll('#scroll tbody tr[aria-rowindex]').length") > 200
    shown = (
        "[...document.querySelectorAll('nav, .controls')].some((n) => n.getClientRects().length)"
    )
    assert not browser.run(shown)
    assert browser.run("document.getElementById('scroll').scrollHeight") > 200 * 20
