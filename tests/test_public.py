"""What others rely on stays as it is, or changes with a word in the changelog."""

from __future__ import annotations

import ast
import dataclasses
import re
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from goldens import PUBLIC, Golden
from typer.main import get_command

from effbench.api import registry
from effbench.api.keys import later_fields
from effbench.api.shape import Shape
from effbench.api.sharing import SHARED
from effbench.api.slices import SLICED
from effbench.api.spec import (
    DatasetSpec,
    HardwareSpec,
    Machine,
    ModelSpec,
    Parallelism,
    Plugin,
    Runtime,
    Spec,
    TrainSpec,
)
from effbench.cli.choosing import Kind
from effbench.cli.main import app
from effbench.report.labels import flatten
from effbench.results.query import METRIC_COLUMNS, RECORD_COLUMNS
from effbench.results.records import Metric, Outcomes, Record
from effbench.util import offered
from effbench.util.package_data import conf_dir

ROOT = Path(__file__).parents[1]
PROMISED = (
    "api.batch",
    "api.cost",
    "api.examples",
    "api.method_types",
    "api.schema",
    "evaluators.base",
)
PROMISED += (
    "api.evolution",
    "evaluators.subject",
    "methods.base",
    "methods.adapters.lora",
    "methods.compresses",
    "methods.reads",
    "methods.trains",
    "util.errors",
    "util.lazy",
)
"""Modules that docs/adding-a-method.md lets other packages import."""


def commands(command: Any = None, name: str = "effbench") -> dict[str, list[str]]:
    """Return the arguments and options of every command."""
    command = command or get_command(app)
    found = {name: sorted(option(p) for p in command.params)}
    for word, inner in getattr(command, "commands", {}).items():
        found |= commands(inner, f"{name} {word}")
    return found


def option(parameter: Any) -> str:
    kind, default = parameter.type, parameter.default
    form = "|".join(getattr(kind, "choices", ())) or kind.name
    if parameter.param_type_name == "argument":
        return f"{parameter.name} {form}"
    shown = "" if default in (None, False, "") else f" = {default}"
    place = f" ({parameter.envvar})" if parameter.envvar else ""
    return f"{' '.join(parameter.opts)} {form}{shown}{place}"


def configs() -> dict[str, str]:
    """Return the keys of every config file."""
    found = {}
    for path in sorted(conf_dir().rglob("*.yaml")):
        values = yaml.safe_load(path.read_text()) or {}
        keys = flatten({k: v for k, v in values.items() if k != "defaults"})
        found[path.relative_to(conf_dir()).with_suffix("").as_posix()] = " ".join(sorted(keys))
    return found


def settings() -> dict[str, dict[str, str]]:
    """Return the fields of what a config fills in, with type and default."""
    found = {
        "model": fields(ModelSpec),
        "model.shape": fields(Shape),
        "dataset": fields(DatasetSpec),
        "train": fields(TrainSpec),
        "hardware": fields(HardwareSpec) | fields(Machine) | fields(Parallelism),
        "run": fields(Runtime),
    }
    for kind in ("methods", "evaluators"):
        for name in registry.names(kind):
            if name not in registry.plugins(kind):
                found[f"{kind[:-1]} {name}"] = fields(registry.find(kind, name))
    return found


def fields(cls: type) -> dict[str, str]:
    found = {}
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "" if default is dataclasses.MISSING else f" = {default!r}"
        found[field.name] = f"{field.type}{shown}"
    return found


def imports() -> dict[str, str]:
    """Return the names that the promised modules define."""
    found = {}
    for name in PROMISED:
        module = import_module(f"effbench.{name}")
        assert module.__file__
        defined = names_in(ast.parse(Path(module.__file__).read_text()).body)
        assert all(hasattr(module, each) for each in defined)
        found[f"effbench.{name}"] = " ".join(sorted(defined))
    return found


def names_in(body: list[ast.stmt]) -> set[str]:
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.If):
            found |= names_in(node.orelse)
    return {name for name in found if not name.startswith("_")}


def environment() -> list[str]:
    """Return the variables that the package reads."""
    files = [*(ROOT / "effbench").rglob("*.py"), *conf_dir().rglob("*.yaml")]
    return sorted({w for f in files for w in re.findall(r"\bEFFBENCH_[A-Z]+\b", f.read_text())})


def names() -> dict[str, Any]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {
        "entry point groups": [f"effbench.{kind}" for kind in get_args(offered.Kind)],
        "environment variables": environment(),
        "extras": sorted(project["optional-dependencies"]),
        "lists": list(get_args(Kind)),
        "model types": [SHARED, SLICED],
        "programs": project["scripts"],
    }


def records() -> dict[str, Any]:
    """Return the fields of records and specs, and the columns of SQL."""
    classes = (Record, Metric, Outcomes, Spec, Plugin)
    columns = {"records": RECORD_COLUMNS, "metrics": METRIC_COLUMNS}
    return {c.__name__: fields(c) for c in classes} | {f"SQL {k}": v for k, v in columns.items()}


def absent() -> dict[str, Any]:
    """Return what it means that a spec lacks a field, for all fields that came later."""
    spec = (Spec, Plugin, ModelSpec, Shape, DatasetSpec, TrainSpec, HardwareSpec)
    named = {cls.__name__: cls for cls in spec}
    for kind in get_args(registry.Kind):
        named |= {f"{kind}/{n}": registry.find(kind, n) for n in registry.names(kind)}
    return {n: later for n, cls in named.items() if (later := later_fields(cls, n))}


PARTS = {f.__name__: f for f in (commands, configs, settings, records, imports, names, absent)}


GROWING = ("configs", "settings", "absent")
"""Parts with an entry for each plug-in."""


def test_the_absence_of_a_field_keeps_its_meaning(golden: Callable[[str], Golden]) -> None:
    for name, fields in (golden("public.json")["absent"] or {}).items():
        now = absent().get(name, {})
        for field, value in fields.items():
            assert now.get(field, value) == value, (
                f"{name}.{field} had the default {value!r}, and keys without it mean that. "
                f'Keep it: field(default=..., metadata={{"absent": {value!r}}})'
            )


@pytest.mark.golden
@pytest.mark.parametrize("part", PARTS)
def test_what_is_public_stays(part: str, golden: Callable[[str], Golden]) -> None:
    file = golden("public.json")
    file.check(part, PARTS[part](), PUBLIC, grows=2 if part in GROWING else 0)
    assert file[part], "nothing to hold it against"


def test_no_two_files_of_tests_have_one_name() -> None:
    """Of two, pytest imports the first and cannot collect the other; a run of one sees nothing."""
    own = Path(__file__).parent
    found = [p.name for p in own.rglob("*.py") if "plugin_example" not in p.parts]
    assert sorted({name for name in found if found.count(name) > 1}) == []
