"""What the C library gives back, and systems that have none such."""

from __future__ import annotations

import os
import sys

import pytest

from effbench.util import c_library


def test_functions_are_found_by_name() -> None:
    assert c_library.c_library("getpid")() == os.getpid()
    assert c_library.c_library("no_library_has_this_name") is None


def test_what_is_free_is_given_back_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[str, int]]()
    monkeypatch.setattr(c_library, "c_library", lambda name: lambda pad: asked.append((name, pad)))
    c_library.give_back()
    assert asked == [("malloc_trim", 0)]
    monkeypatch.setattr(c_library, "c_library", lambda name: None)
    c_library.give_back()


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert c_library.c_library("malloc_trim") is None
    c_library.give_back()
