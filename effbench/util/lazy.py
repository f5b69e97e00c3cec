"""torch, and modules made of it, imported at first use.

A method file is read long before any weight is: its fields are validated, listed and shown by
commands that must start at once. It may therefore name `torch`, `F` and modules of `effbench.nn`
freely inside its hooks, but must not touch them while it is being imported.

A package whose `__init__` calls `lazy_modules(__name__)` hands out its modules lazily:
`from effbench.nn.adapters import lowrank` imports no torch, `lowrank.LowRankLinear` does. To type
checkers, editors and import-linter it is the plain import that it looks like.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any


class LazyModule:
    """Stands for a module that is imported when one of its attributes is first used.

    Args:
        name: Qualified name of the module.
    """

    __slots__ = ("_found", "_name")
    _found: ModuleType | None
    _name: str

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_found", None)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._found or _run(self), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(_run(self), attribute, value)

    def __delattr__(self, attribute: str) -> None:
        delattr(_run(self), attribute)

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return vars(_run(self))

    def __repr__(self) -> str:
        return f"<lazy module {self._name!r}>"


def _run(lazy: LazyModule) -> ModuleType:
    """Return the module itself, imported if it was not, and keep it."""
    found = import_module(lazy._name)
    object.__setattr__(lazy, "_found", found)
    return found


def lazy_modules(package: str) -> None:
    """Let the modules of a package be imported from it without being run; see PEP 562.

    Args:
        package: Its `__name__`, while its `__init__` is being run.
    """

    def submodule(name: str) -> LazyModule:
        qualified = f"{package}.{name}"
        if name.startswith("__") or find_spec(qualified) is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return LazyModule(qualified)

    vars(sys.modules[package])["__getattr__"] = submodule


if TYPE_CHECKING:
    import torch as torch
    import torch.nn.functional as F
else:
    torch = LazyModule("torch")
    F = LazyModule("torch.nn.functional")

__all__ = ["F", "lazy_modules", "torch"]
