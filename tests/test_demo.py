"""`make demo` leaves a clone as it was: all that it writes lies in a folder that git ignores."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_demo_writes_only_where_git_ignores() -> None:
    script = (ROOT / "scripts/demo.sh").read_text().partition("cat <<TEXT")[0]
    [folder] = re.findall(r'^results="\$\{EFFBENCH_RESULTS:-(.+)\}"$', script, re.MULTILINE)
    assert f"{folder}/" in (ROOT / ".gitignore").read_text().splitlines()
    places = re.findall(r"(?:run\.results=|--results |--plot |mkdir -p |[^<]> ?)(\S+)", script)
    assert len(places) >= 4
    assert all(re.match(r'"\$results["/]', place) for place in places), places
    runs = [line for line in script.splitlines() if re.match(r'.*"\$effbench" ', line)]
    assert all("${common[@]}" in line or "--results" in line for line in runs), runs
