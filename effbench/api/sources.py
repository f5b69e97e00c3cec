"""The code of what other packages bring, as a hash: once it is edited, it is something else.

What effbench brings itself has a `version` instead, which tests hold against the numbers.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec, resolve_name
from pathlib import Path

from effbench.api.schema import digest

OWN = (__package__ or "").partition(".")[0]


def source_of(cls: type) -> str:
    """Return a hash of the files that define a class of another package; "" for one of effbench's.

    They are those of the class and of its bases outside effbench, and all modules of the same
    packages that these import, also inside functions. Nothing is imported to find them. What is
    imported by a name that is computed is not seen.
    """
    return source_of_modules(base.__module__ for base in cls.__mro__)


def source_of_modules(names: Iterable[str]) -> str:
    """Return a hash of those of some modules that are another package's; see `source_of`."""
    waiting = [name for name in names if _is_foreign(name)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        path = None if name in found else _file_of(name)
        if path:
            content = path.read_bytes()
            found[name] = hashlib.sha256(content).hexdigest()
            waiting += _imported(name, path, content)
    return digest(found) if found else ""


def _is_foreign(module: str) -> bool:
    top = module.partition(".")[0]
    return top != OWN and top not in sys.stdlib_module_names


def _file_of(module: str) -> Path | None:
    """Return the file of a module, None where it has none; its package is not imported."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):  # a module that was made by hand
        return None
    if spec is None or not rest:
        origin = Path(spec.origin) if spec and spec.origin else None
        return origin if origin and origin.is_file() else None
    places = [Path(place, *rest) for place in spec.submodule_search_locations or ()]
    endings = ("/__init__.py", ".py", *EXTENSION_SUFFIXES)
    files = (Path(f"{place}{ending}") for place in places for ending in endings)
    return next((file for file in files if file.is_file()), None)


def _imported(module: str, path: Path, content: bytes) -> Iterator[str]:
    """Yield what a module names of its own package: those around it, and those it imports."""
    parts = module.split(".")
    yield from (".".join(parts[:end]) for end in range(1, len(parts)))
    if path.suffix != ".py":
        return
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    with suppress(SyntaxError):  # importing it says what is wrong
        for node in ast.walk(ast.parse(content)):
            for name in _names(node, package):
                if name.partition(".")[0] == parts[0]:
                    yield name


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the modules that a statement may import."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        with suppress(ImportError):  # a relative import that leads out of the package
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
