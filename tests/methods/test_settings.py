"""Settings are read: none is offered in a config and then left out on the way to what computes."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from effbench.api import registry
from effbench.api.registry import Kind

KINDS: tuple[Kind, ...] = ("methods", "evaluators")
KEYED = {"fingerprint"}
"""Settings that are there to be in a run's key."""


@cache
def attributes(path: str) -> frozenset[str]:
    """Return the names of the attributes that a file reads."""
    nodes = ast.walk(ast.parse(Path(path).read_text(encoding="utf-8")))
    loaded = (n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load))
    return frozenset(node.attr for node in loaded)


def unread(cls: type[Any]) -> set[str]:
    """Return the settings that no class reads of those that make up a method or an evaluator."""
    own = (c for c in cls.__mro__ if c.__module__.startswith("effbench."))
    files = {path for c in own if (path := inspect.getsourcefile(c))}
    return {f.name for f in fields(cls)} - KEYED - frozenset().union(*map(attributes, files))


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_is_read(kind: Kind) -> None:
    found = {name: unread(registry.find(kind, name)) for name in registry.names(kind)}
    assert {name: settings for name, settings in found.items() if settings} == {}
