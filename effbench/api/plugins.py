"""The method or evaluator that a spec names, with its settings."""

from __future__ import annotations

from typing import Any

from effbench.api import registry
from effbench.api.schema import build
from effbench.api.spec import Plugin


def make_method(plugin: Plugin) -> Any:
    """Return the method that a spec names, with its settings."""
    return build(registry.find("methods", plugin.name), plugin.settings, "method")


def make_evaluator(plugin: Plugin) -> Any:
    """Return the evaluator that a spec names, with its settings."""
    cls = registry.find("evaluators", plugin.name)
    return build(cls, plugin.settings, f"evaluator.{plugin.name}")
