"""Modules of a lazy package are imported at first use, and are then the modules themselves."""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from pathlib import Path

import pytest

import effbench.nn
from effbench.util.lazy import LazyModule, lazy_modules


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A lazy package with one module, and one that cannot be run."""
    name = f"lazy_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "numbers.py").write_text("ONE = 1\n\n\ndef one():\n    return ONE\n")
    (folder / "broken.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_module(name)
    lazy_modules(name)
    return name


def test_a_module_runs_when_one_of_its_names_is_used(package: str) -> None:
    names: dict = {}
    exec(f"from {package} import numbers, broken", names)
    assert f"{package}.numbers" not in sys.modules
    assert names["numbers"].one() == 1
    assert names["numbers"].one is sys.modules[f"{package}.numbers"].one
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        _ = names["broken"].anything


def test_what_is_set_is_set_in_the_module_itself(package: str, monkeypatch) -> None:
    names: dict = {}
    exec(f"from {package} import numbers", names)
    monkeypatch.setattr(f"{package}.numbers.ONE", 2)
    assert names["numbers"].one() == 2
    monkeypatch.undo()
    assert names["numbers"].one() == 1


def test_a_name_that_is_no_module_is_refused(package: str) -> None:
    with pytest.raises(ImportError, match="no_such_module"):
        exec(f"from {package} import no_such_module")
    assert not hasattr(import_module(package), "no_such_module")


def test_every_family_of_nn_hands_out_its_modules_lazily() -> None:
    for folder in Path(effbench.nn.__path__[0]).iterdir():
        if (folder / "__init__.py").is_file():
            family = import_module(f"effbench.nn.{folder.name}")
            some = next(p.stem for p in folder.glob("[a-z]*.py"))
            assert isinstance(vars(family)["__getattr__"](some), LazyModule), folder.name


@pytest.mark.parametrize("room", ["methods", "evaluators"])
def test_what_is_used_of_nn_is_named_at_the_top(room: str) -> None:
    for path in (Path(effbench.nn.__path__[0]).parent / room).rglob("*.py"):
        functions = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)
        ]
        inside = [n for f in functions for n in ast.walk(f) if isinstance(n, ast.ImportFrom)]
        assert not [n.lineno for n in inside if (n.module or "").startswith("effbench.nn")], path
