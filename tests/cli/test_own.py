"""The page on one's own model says what the terminal says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effbench.testing.own import write_chats, write_model

PAGE = Path(__file__).parents[2] / "docs" / "your-own-model.md"


def test_the_page_shows_what_is_printed(cli: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "my-model")
    write_chats(tmp_path / "chat.jsonl")
    shown = re.search(r"^\$ effbench (.*?)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert shown is not None
    status, out, said = cli(*shown[1].split())
    assert (status, said + out) == (0, shown[2])


def test_what_the_page_calls_latest_made_something() -> None:
    """An evaluation has no points, and nothing to export or to go on from."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    last, seen = "", 0
    for line in "".join(blocks).splitlines():
        if line.startswith("effbench"):
            command = line.split()[1]
            if "latest" in line:
                seen += 1
                assert last in ("train", "compress"), line
            last = command if command in ("train", "compress", "eval") else last
    assert seen > 5
