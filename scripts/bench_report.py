"""The report page with 10,000 rows: bytes of its file, and a key in the filter until it is painted.

The time is that of Chromium's main thread on a CPU, and that on the clock; `chromium` of Debian is
needed, and nothing else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import CHROMIUM, Browser
from report.test_page import many

from effbench.report.page.render import page

ROWS, MOST_BYTES, MOST_MS = 10_000, 1.5e6, 100
WORDS = ("m", "me", "method1", "rank=8", "loss<2", "")
KEY = """
new Promise((done) => {
  const input = document.querySelector("input[type=search]"), began = performance.now();
  input.value = %r;
  input.dispatchEvent(new Event("input"));
  requestAnimationFrame(() => setTimeout(() => done(performance.now() - began), 0));
})
"""


def busy(browser: Browser) -> float:
    """Return the milliseconds of CPU that the page's main thread has taken."""
    found = browser.call("Performance.getMetrics")["metrics"]
    return 1e3 * next(float(m["value"]) for m in found if m["name"] == "TaskDuration")


def main() -> int:
    if not CHROMIUM:
        print("Chromium is not here: apt-get install chromium")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        path.write_text(page(many(ROWS)))
        size = path.stat().st_size
        browser = Browser(Path(folder, "profile"))
        browser.call("Performance.enable", timeDomain="threadTicks")
        browser.open(path, width=1400)
        taken: list[tuple[float, float]] = []
        for word in WORDS * 3:
            before = busy(browser)
            clock = float(browser.run(KEY % word))
            taken.append((busy(browser) - before, clock))
        browser.close()
    cpu, clock = (statistics.median(values) for values in zip(*taken, strict=True))
    print(f"{ROWS:,} rows: {size / 1e6:.2f} MB; limit {MOST_BYTES / 1e6} MB")
    print(f"a key until it is painted: {cpu:.0f} ms of CPU, {clock:.0f} ms on the clock (medians)")
    print(f"highest: {max(c for c, _ in taken):.0f} ms of CPU; limit {MOST_MS} ms")
    return int(size > MOST_BYTES or cpu > MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
