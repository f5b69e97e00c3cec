"""The code of a plug-in is in the key: an edit is another run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from effbench.api import registry
from effbench.api.keys import sources_of
from effbench.api.sources import source_of
from effbench.config.compose import compose
from effbench.report.comparison.compare import compare
from effbench.results.records import read_all
from effbench.results.store import RunFolder, Store
from effbench.runner.run import open_run
from effbench.util.errors import UserError

METHOD = """
import json
import ourlab.more.leaf
from dataclasses import dataclass
from ourlab import rates
from ourlab.parts import inner
from effbench.methods.adapters.lora import LoRA

@dataclass(frozen=True)
class Shiny(LoRA):
    '''LoRA that shines.'''

    def loss(self, model, batch, ctx):
        from .parts import late
        return late.shine(super().loss(model, batch, ctx))
"""
EVALUATOR = """
from dataclasses import dataclass
from effbench.evaluators.perplexity import Perplexity

@dataclass(frozen=True)
class Glow(Perplexity):
    '''Perplexity that glows.'''
"""
FILES = {
    "__init__.py": "",
    "method.py": METHOD,
    "evaluator.py": EVALUATOR,
    "rates.py": "from . import deeper\nRATE = 1\n",
    "deeper.py": "",
    "unused.py": "",
    "more/__init__.py": "",
    "more/leaf.py": "",
    "parts/__init__.py": "",
    "parts/inner.py": "",
    "parts/late.py": "from ..parts import last\n\ndef shine(loss):\n    return loss\n",
    "parts/last.py": "",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of an installed package with a method and an evaluator."""
    folder = tmp_path / "site" / "ourlab"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    monkeypatch.syspath_prepend(folder.parent)
    points = {
        "methods": {"shiny": EntryPoint("shiny", "ourlab.method:Shiny", "effbench.methods")},
        "evaluators": {"glow": EntryPoint("glow", "ourlab.evaluator:Glow", "effbench.evaluators")},
    }
    find = registry.find
    monkeypatch.setattr(registry, "plugins", points.__getitem__)
    find.cache_clear()
    yield folder
    find.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "ourlab"]:
        del sys.modules[name]


Composed = Callable[..., str]


def key(*words: str, stage: str = "train") -> str:
    return compose(stage, ["model=tiny", "dataset=arithmetic", "hardware=cpu", *words]).spec.key


SHINY = ["method=shiny", "method.rank=4"]


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("unused.py", "evaluator.py")])
def test_editing_what_a_method_is_made_of_is_another_key(package: Path, name: str) -> None:
    before = key(*SHINY)
    assert key(*SHINY) == before
    (package / name).write_text(FILES[name] + "# edited\n")
    assert key(*SHINY) != before


@pytest.mark.parametrize("name", ["unused.py", "evaluator.py", "data.txt"])
def test_editing_anything_else_is_the_same_key(package: Path, name: str) -> None:
    before = key(*SHINY)
    (package / name).write_text("# edited\n")
    assert key(*SHINY) == before


def test_the_key_does_not_depend_on_where_a_package_lies(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = importlib.import_module("ourlab.method").Shiny
    before = source_of(method)
    moved = package.parent.rename(package.parent.with_name("elsewhere"))
    monkeypatch.syspath_prepend(moved)
    del sys.modules["ourlab"]
    assert source_of(method) == before != ""


def test_finding_the_files_imports_nothing(package: Path) -> None:
    key(*SHINY)
    assert "ourlab.method" in sys.modules
    assert "ourlab.parts.late" not in sys.modules


def test_an_edited_evaluator_is_another_key(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = registry.find("evaluators", "glow")
    before = source_of(cls)
    (package / "evaluator.py").write_text(EVALUATOR + "# edited\n")
    assert source_of(cls) != before
    spec = compose("eval", ["model=tiny", "dataset=arithmetic", "hardware=cpu"]).spec
    from effbench.api.spec import Plugin

    glowing = replace(spec, evaluators=[Plugin("glow")])
    assert sources_of(glowing, []) == {"evaluator.glow": source_of(cls)}


@pytest.mark.parametrize("method", ["lora", "qdylora", "rtn"])
def test_what_effbench_brings_is_known_by_its_version(method: str) -> None:
    assert source_of(registry.find("methods", method)) == ""
    assert compose(None, [f"method={method}", "model=tiny", "hardware=cpu"]).spec.sources == {}


def test_code_that_was_edited_after_the_command_does_not_run(package: Path, tmp_path: Path) -> None:
    job = compose("train", ["model=tiny", "dataset=arithmetic", "hardware=cpu", *SHINY])
    (package / "rates.py").write_text("RATE = 2\n")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    with pytest.raises(UserError, match=r"code of method\.shiny was edited"):
        open_run(job, folder, Store(tmp_path))


def test_compare_says_that_rows_were_made_by_different_code() -> None:
    records = Path(__file__).parents[2] / "results" / "records"
    record = next(r for r in read_all(records, outcomes=False) if r.stage == "train")
    name = f"method.{record.name_of('method')}"
    one, other = (
        replace(record, key=f"{n}" * 16, spec={**record.spec, "sources": {name: f"{n}" * 32}})
        for n in (1, 2)
    )
    [line] = [n for n in compare([one, other]).notes if "different versions" in n]
    assert "1 with source 11111111 (" in line
    assert "1 with source 22222222 (" in line
