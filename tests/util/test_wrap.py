"""Lines that fit a terminal."""

from __future__ import annotations

import io
import os
import shutil

import pytest

from effbench.util.wrap import joined, write

TEXT = "in 884 a prompt loses its start, results/runs/1222a4c26df0a437\nevaluate again"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_word_is_broken_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    stream = Terminal()
    write(TEXT, stream)
    lines = stream.getvalue().splitlines()
    assert " ".join(lines).split() == TEXT.split()
    assert all(len(line) <= 20 or " " not in line for line in lines)
    assert lines[-1] == "evaluate again"


def test_elsewhere_a_line_stays_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    stream = io.StringIO()
    write(TEXT * 9, stream)
    assert stream.getvalue() == TEXT * 9 + "\n"


def test_a_setting_in_quotes_is_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((30, 24)))
    stream = Terminal()
    word = """'dataset.choices=[" neg", " pos"]'"""
    write(f"Say what class it is of: {word}; or another kind it isn't = 'a b", stream)
    assert stream.getvalue().splitlines() == [
        "Say what class it is of:",
        f"{word};",
        "or another kind it isn't = 'a",
        "b",
    ]


def test_what_goes_on_stands_below_what_it_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 24)))
    stream = Terminal()
    write("lora  a frozen base\nrtn   rounds to the nearest", stream, indent=6)
    assert stream.getvalue().splitlines() == [
        "lora  a frozen base",
        "rtn   rounds to the",
        "      nearest",
    ]


def test_a_paragraph_is_a_line_and_what_is_set_apart_stays() -> None:
    text = (
        "A title.\n\nSome words\nthat go on.\n\n    y = W x\n    z = y\n\nEnd\nof it:\n- one\n- two"
    )
    assert joined(text) == (
        "A title.\n\nSome words that go on.\n\n    y = W x\n    z = y\n\nEnd of it:\n- one\n- two"
    )
