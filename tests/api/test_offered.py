"""What another package offers by entry points: formats, kinds of datasets, stages, evaluators."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from effbench.api import registry, weights
from effbench.api.stages import base as stages
from effbench.cli import launching, listing, show
from effbench.config.compose import compose
from effbench.data.dataset import Data
from effbench.data.kinds import base as kinds
from effbench.models.load import load_tokenizer
from effbench.testing.bench import Bench
from effbench.util import offered, rooms
from effbench.util.errors import UserError

FILES = {
    "format": """
from dataclasses import dataclass
from effbench.nn.quant.formats.grouped import Grouped

@dataclass(frozen=True)
class Sixteenths(Grouped):
    '''Eight bits, a scale for sixteen weights.'''

    bits: int = 8
    group_size: int = 16
""",
    "method": """
from dataclasses import dataclass
from typing import ClassVar
from effbench.api.weights import find
from effbench.methods.compresses import CompressesLinears

@dataclass(frozen=True)
class Rounds(CompressesLinears):
    '''Rounds every weight.'''

    produces: ClassVar[str] = "sixteenths"

    def compressed(self, linear):
        return find("sixteenths")().quantise(linear)

    def empty(self, linear):
        return find("sixteenths")().empty(linear)

    def shape(self, base, point, phase, folder):
        return base.packed(find("sixteenths")())
""",
    "kind": """
from dataclasses import replace
from effbench.data.kinds.pairs import Pairs

class Shouted(Pairs):
    '''Prompts in capitals.'''

    def render(self, place, spec):
        text = super().render(place, spec)
        return text and replace(text, prompt=text.prompt.upper())
""",
    "stage": """
'''Look at a model.'''
from effbench.api.stages.base import Stage

STAGE = Stage(method="none", evaluators=("letters",))

def perform(run):
    from effbench.runner.stages.eval import perform
    perform(run)
    run.note("Looked at.")
""",
    "evaluator": """
'''Letters of the answers.'''
from dataclasses import dataclass
from typing import ClassVar
from effbench.evaluators.base import Evaluator, Result
from effbench.results.records import Metric

@dataclass(frozen=True)
class Letters(Evaluator):
    '''Counts prompts in capitals.'''

    itemwise: ClassVar[bool] = False
    headline: ClassVar[str] = "letters"

    each: int = 1
    '''What one counts.'''

    def run(self, subject):
        texts = subject.data.texts["test"]
        shouted = sum(text.prompt.isupper() for text in texts)
        return Result([Metric("letters", self.each * shouted, "")])
""",
}
ENTRIES = """
[effbench.formats]
sixteenths = ourlab.format:Sixteenths
wrong = ourlab.kind:Shouted
[effbench.methods]
rounds = ourlab.method:Rounds
[effbench.kinds]
shouted = ourlab.kind:Shouted
[effbench.stages]
look = ourlab.stage
broken = ourlab.kind
[effbench.evaluators]
letters = ourlab.evaluator:Letters
"""
CACHES: tuple[Callable[..., object], ...] = (
    offered.offered,
    offered._named_by_packages,
    registry.find,
    rooms._names,
    rooms._found,
    kinds.find,
    stages.names,
    stages.find,
)


def forget() -> None:
    importlib.invalidate_caches()
    for function in CACHES:
        function.cache_clear()  # type: ignore[attr-defined]
    for name in [n for n in sys.modules if n.partition(".")[0] == "ourlab"]:
        del sys.modules[name]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that has one of each."""
    info = tmp_path / "site" / "ourlab-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ourlab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    place = tmp_path / "site" / "ourlab"
    place.mkdir()
    for name, text in {"__init__": "", **FILES}.items():
        (place / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(info.parent))
    forget()
    yield place
    monkeypatch.undo()
    forget()


def test_what_a_package_offers_runs(package: Path, bench: Bench, tmp_path: Path) -> None:
    rows = ({"q": f"What is {n} + 1?", "a": str(n + 1)} for n in range(40))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["dataset=file", "dataset.kind=shouted", f"dataset.files.all={tmp_path}/rows.jsonl"]
    words = [*own, "dataset.prompt='{q}'", "dataset.answer='{a}'", "hardware.device=cpu"]
    few = ["+dataset.limit.train=4", "evaluator=[letters]"]

    made = bench.run("compress", "method=rounds", *words, *few)
    shouted = {m.name: m.value for m in made.metrics}["letters"]
    assert shouted > 1
    seen = bench.run("look", f"from={made.key}", "evaluator.letters.each=3", "hardware.device=cpu")
    assert {m.name: m.value for m in seen.metrics}["letters"] == 3 * shouted
    assert "Looked at." in seen.notes
    sources = bench.job("look", f"from={made.key}", *few[1:]).spec.sources
    assert set(sources) == {
        *("method.rounds", "evaluator.letters"),
        *("stages.look", "kinds.shouted", "formats.sixteenths"),
    }
    (package / "kind.py").write_text(FILES["kind"] + "\n")
    edited = bench.job("look", f"from={made.key}", *few[1:]).spec.sources
    assert {name for name in sources if sources[name] != edited[name]} == {"kinds.shouted"}


def prompts(tmp_path: Path, *words: str) -> list[str]:
    """Return what the tokens of a plug-in kind's prompts say, as a new process would."""
    forget()
    own = ["dataset=file", "dataset.kind=shouted", f"dataset.files.test={tmp_path}/rows.jsonl"]
    own += ["dataset.prompt='{q}'", "dataset.answer='{a}'", "dataset.cut={}", *words]
    spec = compose("eval", ["model=tiny", "hardware=cpu", *own]).spec
    tokenizer = load_tokenizer(spec.model)
    examples = Data(spec.dataset, tokenizer).examples("test")
    return [tokenizer.decode(e.ids[: e.prompt_length]) for e in examples]


def test_tokens_of_an_edited_kind_are_made_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it knows files by second and size
    (tmp_path / "rows.jsonl").write_text('{"q": "a word", "a": "b"}\n')
    kept = tmp_path / "cache" / "tokens"
    assert prompts(tmp_path) == prompts(tmp_path) == ["A WORD"]
    assert len([*kept.iterdir()]) == 1, "read again while nothing has changed"
    for before, after, found in (
        ("text.prompt.upper()", "text.prompt.title()", "A Word"),
        ("prompt=text.prompt.title()", "prompt=spec.system", "own"),
    ):
        code = (package / "kind.py").read_text()
        (package / "kind.py").write_text(code.replace(before, after))
        assert prompts(tmp_path) == [found]
    assert prompts(tmp_path, "dataset.system=user") == ["user"], "any setting may be read"


def test_what_a_package_offers_is_listed_and_shown(package: Path) -> None:
    assert listing.entries("evaluators", "letters") == [("letters", "Letters of the answers.")]
    assert "evaluator.letters.each = 1" in show.describe("evaluator", "letters")
    app = typer.Typer()
    launching.add_to(app)
    assert {c.name: c.help for c in app.registered_commands}["look"] == "Look at a model."
    assert stages.names()[-2:] == ("broken", "look")
    assert weights.is_packed("sixteenths") and "shouted" in kinds.names()
    assert "ourlab.stage" not in sys.modules  # a help needs no import


def test_an_entry_point_of_another_kind_is_refused(package: Path) -> None:
    with pytest.raises(UserError, match=r"ourlab\.kind:Shouted is no Packed") as error:
        weights.find("wrong")
    assert "effbench.formats" in error.value.hint
    with pytest.raises(UserError, match=r"ourlab\.kind has no STAGE") as error:
        stages.find("broken")
    assert "effbench.api.stages.base" in error.value.hint
