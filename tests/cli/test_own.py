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
