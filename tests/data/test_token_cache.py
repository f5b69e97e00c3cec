"""Tokens that were made once are read again, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from effbench.config.compose import compose
from effbench.data import tokenise as module
from effbench.data.dataset import Data
from effbench.models.load import load_tokenizer
from effbench.util.errors import UserError


def test_a_file_in_the_place_of_another_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    spec = compose("eval", ["model=tiny", "dataset=arithmetic", "dataset.limit.test=4"]).spec
    tokenizer = load_tokenizer(spec.model)

    def read(split: str) -> list[list[int]]:
        return [e.ids for e in Data(spec.dataset, tokenizer).examples(split)]

    first = read("test")
    [one] = (tmp_path / "tokens").glob("*.json")
    second = read("validation")
    [other] = set((tmp_path / "tokens").glob("*.json")) - {one}
    assert first != second

    def again(*_: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomic", again)
        assert read("test") == first
    one.write_bytes(other.read_bytes())
    assert read("test") == first


@pytest.mark.parametrize("place", ["file", "/proc/none"])
def test_a_cache_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / place))
    spec = compose("eval", ["model=tiny", "dataset=arithmetic", "dataset.limit.test=4"]).spec
    with pytest.raises(UserError):
        module.write_atomic(tmp_path / place / "tokens" / "a", "")
    assert len(Data(spec.dataset, load_tokenizer(spec.model)).examples("test")) == 4
