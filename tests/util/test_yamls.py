"""YAML of people: read fast where that is safe, and in the same words where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from effbench.util import yamls
from effbench.util.errors import UserError


@pytest.mark.parametrize("text", ["- " * 100_000 + "x", "{a: " * 100_000])
def test_what_is_too_deep_is_refused_and_ends_nothing(tmp_path: Path, text: str) -> None:
    """The fast reader would end the process."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match="cannot be read as YAML"):
        yamls.read(path)


@pytest.mark.parametrize("slow", [False, True])
def test_both_readers_say_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    if slow:
        monkeypatch.setattr(yamls, "SHALLOW", 0)
    path = tmp_path / "a.yaml"
    path.write_text("a: 1e-05\nb: [x:y, 'on', 0o7]\nc: on\n")
    assert yamls.read(path) == {"a": 1e-05, "b": ["x:y", "on", "0o7"], "c": True}
    path.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(UserError, match=r"line 3, column 2: expected ',' or '\]', but got ':'"):
        yamls.read(path)
