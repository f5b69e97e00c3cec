"""The report page with 10,000 rows: bytes of its file, and a key in the filter until it is painted.

The time is that on the clock, so the machine must have nothing else to do. Debian's `chromium` is
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


def main() -> int:
    if not CHROMIUM:
        print("Chromium is not here: apt-get install chromium")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.html")
        path.write_text(page(many(ROWS)))
        size = path.stat().st_size
        browser = Browser(Path(folder, "profile"))
        browser.open(path, width=1400)
        taken = []
        for word in WORDS * 3:
            taken.append(float(browser.run(KEY % word)))
            browser.run("new Promise((done) => setTimeout(done, 500))")  # the charts come later
        browser.close()
    median = statistics.median(taken)
    print(f"{ROWS:,} rows: {size / 1e6:.2f} MB; limit {MOST_BYTES / 1e6} MB")
    print(
        f"a key until it is painted: {median:.0f} ms, at most {max(taken):.0f} ms; limit {MOST_MS}"
    )
    return int(size > MOST_BYTES or median > MOST_MS)


if __name__ == "__main__":
    sys.exit(main())
