"""The documentation is true: commands compose, links lead somewhere, lists are complete."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from effbench.api import registry, schema
from effbench.api.evolution import Evolution
from effbench.api.shape import LINEARS
from effbench.api.weights import Packed
from effbench.cli.main import app
from effbench.cli.tables import campaign_named, campaigns
from effbench.config.compose import compose
from effbench.config.files import groups
from effbench.config.overrides import check_overrides
from effbench.config.start import split_words
from effbench.evaluators.base import Evaluator
from effbench.methods.base import Method
from effbench.methods.calibrates import CompressesBlocks
from effbench.methods.compresses import Compresses, CompressesLinears
from effbench.methods.trains import Trains
from effbench.nn.decode.decoder import Driver, Route
from effbench.nn.decode.policy import CachePolicy
from effbench.report.campaign import Campaign
from effbench.report.claims import Pair, Verdict
from effbench.report.verdicts import retested
from effbench.results.reader import Reader
from effbench.results.records import Metric, Outcomes, Record
from effbench.results.store import MARKER, Store
from effbench.runner.grid.words import listed, spelled_out
from effbench.runner.grid.words import points as expanded
from effbench.testing.own import write_chats, write_model

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
EXAMPLE = ROOT / "tests" / "plugin_example"
STAGES = {
    "train": "train",
    "compress": "compress",
    "eval": "eval",
    "plan": None,
    "similarity": "eval",
}


# -- the commands ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    mark: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S
    )
    return [Block(page, *parts) for parts in found]


def shell_lines(program: str) -> list[tuple[str, str]]:
    """Return `(page, command)` of every line in an unmarked block that runs `program`."""
    found = {}
    for page in PAGES:
        for block in blocks(page):
            if block.mark.startswith("no-test:") or block.language not in ("", "bash", "console"):
                continue
            for line in block.text.splitlines():
                inner = re.search(r"\$\((.*?)\)", line)
                command = inner[1] if inner else line.removeprefix("$ ")
                if command.startswith(f"{program} "):
                    found.setdefault(command, page.relative_to(ROOT).as_posix())
    return [(page, command) for command, page in found.items()]


def inline_commands() -> list[tuple[str, str]]:
    """Return `(page, command)` of every command in running text that has no placeholder."""
    found = {}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
        for command in re.findall(r"`(effbench [^`]+)`", text):
            if not re.search(r"\b[A-Z]{2,}\b| --install", command):
                found.setdefault(command, page.relative_to(ROOT).as_posix())
    return [(page, command) for command, page in found.items()]


def commands() -> list[Any]:
    found = {c: p for p, c in [*inline_commands(), *shell_lines("effbench")]}
    return [pytest.param(c, id=f"{p}: {c}") for c, p in sorted(found.items())]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files and runs that the documentation speaks of."""
    import gguf

    folder = tmp_path_factory.mktemp("desk")
    (folder / "my.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}\n')
    for name in ("mine", "other"):
        shutil.copy(folder / "my.jsonl", folder / f"{name}.jsonl")
    write_chats(folder / "chat.jsonl")
    (folder / "reviews.csv").write_text("review,sentiment\nIt was dull.,neg\n")
    write_model(folder / "my-model")
    (folder / "my.yaml").write_text("model: tiny\ndataset: arithmetic\n")
    writer = gguf.GGUFWriter(folder / "my-model.gguf", "llama")
    for add, value in (
        (writer.add_embedding_length, 64),
        (writer.add_feed_forward_length, 128),
        (writer.add_block_count, 2),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_vocab_size, 512),
        (writer.add_context_length, 512),
    ):
        add(value)
    writer.add_tensor("token_embd.weight", np.zeros((512, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


@pytest.fixture(scope="module")
def keys(desk: Path) -> dict[str, str]:
    """The runs that the documentation speaks of: the key in the text, and the real one."""
    store, found = Store(desk / "results"), {}
    runs = {"3f2a": "lora", "91bc": "qlora", "07de": "dylora", "latest": "full"}
    for number, (name, method) in enumerate(runs.items()):
        spec = compose("train", [f"method={method}", "model=tiny", "dataset=arithmetic"]).spec
        run = store.run(spec.key)
        run.create(spec)
        (run.path / MARKER).write_text(f"{number}\n")
        os.utime(run.path, (number, number))
        found[name] = spec.key
    return found


@pytest.fixture
def at_desk(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(desk)
    monkeypatch.delenv("EFFBENCH_RESULTS", raising=False)
    return desk


@pytest.mark.parametrize("command", commands())
def test_command(command: str, at_desk: Path, keys: dict[str, str]) -> None:
    words = [
        re.sub(r"^from=(\w+)$", lambda m: f"from={keys[m[1]]}" if m[1] != "latest" else m[0], word)
        for word in shlex.split(command)[1:]
    ]
    if len(words) == 1:
        assert words[0] in command_line().commands
        return
    if words[0] in ("list", "show") or "--help" in words:
        result = CliRunner().invoke(app, words)
        assert result.exception is None, result.exception
        assert result.stdout
        return
    context = parsed(words)
    if words[0] in STAGES and context.params["overrides"]:
        own = ["evaluator=similarity"] if words[0] == "similarity" else []
        for point in points(words[0], [*context.params["overrides"], *own], context.params):
            assert compose(STAGES[words[0]], point).spec.key  # type: ignore[arg-type]


@cache
def command_line() -> Any:
    """Return the command line, which takes a moment to make."""
    return get_command(app)


def parsed(words: list[str]) -> Any:
    """Return the context of the last command in `words`, its options checked, nothing run."""
    command = command_line()
    name, context = "effbench", None
    while True:
        context = command.make_context(name, list(words), parent=context)
        rest = [*getattr(context, "_protected_args", ()), *context.args]
        if not hasattr(command, "resolve_command") or not rest:
            return context
        name, command, words = command.resolve_command(context, rest)


def points(stage: str, words: list[str], options: dict[str, Any]) -> list[list[str]]:
    """Return the first and the last run of a grid, for the launcher of this machine."""
    _, words = spelled_out(stage, words)
    elsewhere = [w for w in words if w.startswith("launcher=")]
    check_overrides(elsewhere)
    words = [w for w in words if not w.startswith(("launcher=", "hydra.launcher.", "sweep."))]
    if not (options.get("multirun") or elsewhere):
        return [words]
    files, words = split_words(words)
    grid = expanded(listed(words))
    assert grid
    return [[*map(str, files), *grid[0]], [*map(str, files), *grid[-1]]]


def test_every_command_and_every_option_is_explained() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    words = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", "".join(p.read_text() for p in PAGES[3:])))

    def explained(command: Any, name: str) -> None:
        inner = getattr(command, "commands", {})
        assert f"{name} " in page or f"{name}\n" in page, name
        for option in command.params:
            shown = option.param_type_name == "option" and "completion" not in option.opts[0]
            assert not shown or words & {*option.opts}, f"{name}: {option.opts}"
        for key, one in inner.items():
            explained(one, f"{name} {key}")

    explained(command_line(), "effbench")


@pytest.mark.filterwarnings("ignore")
def test_examples_in_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: list[int], capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EFFBENCH_RESULTS", raising=False)
    texts = [b.text for b in blocks(ROOT / "docs" / "python.md") if b.language == "python"]
    assert len(texts) == 3
    for text in texts:
        exec(compile(text, "docs/python.md", "exec"), {})
    assert inline == [0, 0, 0], "the last one finds its run"
    assert "eval none" in capsys.readouterr().out


def test_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    targets |= {p.stem.replace("_", "-") for p in (ROOT / "scripts").glob("bench_*.py")}
    campaigns = (ROOT / "conf" / "table").glob("*.yaml")
    strays = [*(ROOT / "scripts").glob("campaigns/*.yaml")]
    assert not strays, "campaigns are in conf/table"
    names = [p.stem.replace("_", "-") for p in campaigns]
    targets |= {f"{kind}-{name}" for name in names for kind in ("campaign", "table")}
    used = {word for _, c in shell_lines("make") for word in shlex.split(c)[1:] if "=" not in word}
    assert used <= targets
    assert {"demo", "test"} <= used


def test_extras() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = {e for page in PAGES for e in re.findall(r"effbench\[(\w+)\]", page.read_text())}
    assert used <= set(project["optional-dependencies"])


def test_groups_are_named() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    named = re.search(r"Groups: (.*?)\. Besides", text, re.S)
    assert named is not None
    assert set(re.findall(r"`(\w+)`", named[1])) == set(groups())


# -- links -------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_readme_opens_with_two_commands() -> None:
    first = blocks(ROOT / "README.md")[0]
    assert first.text == "make demo\nmake test\n"


# -- lists -------------------------------------------------------------------------------------


def test_every_method_has_a_page_and_every_page_a_method() -> None:
    pages = {p.stem for p in (ROOT / "docs" / "methods").glob("*.md")} - {"README"}
    assert pages == own_methods()


def test_the_readme_lists_every_page() -> None:
    listed = re.findall(r"\]\(docs/([\w/-]+\.md)\) \|", (ROOT / "README.md").read_text())
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").glob("*.md")]
    assert {*listed} == {*pages, "methods/README.md", "evaluators/README.md"}


@pytest.mark.parametrize("kind", ["methods", "evaluators"])
def test_every_page_is_in_the_list(kind: str) -> None:
    folder = ROOT / "docs" / kind
    listed = re.findall(r"\[(\w+)\]\(\1\.md\)", (folder / "README.md").read_text())
    assert {*listed, "README"} == {p.stem for p in folder.glob("*.md")}


def own_methods() -> set[str]:
    return set(registry.names("methods")) - set(registry.plugins("methods"))


WORDS = {"all seven linears of a block": list(LINEARS)}
"""What a table of settings says in words."""
FILLED_IN = {"fingerprint"}
"""Settings that nobody gives."""


def settings_on(page: Path) -> dict[str, str]:
    """Return the settings in the tables of a page, each with its default as it stands there."""
    found: dict[str, str] = {}
    rows = re.compile(r"^\| key \| default \|.*\n\|[-|]+\n((?:\|.*\n?)+)", re.M)
    for line in "".join(rows.findall(page.read_text())).splitlines():
        keys, text = re.split(r"(?<!\\)\|", line)[1:3]
        names = re.findall(r"`(\w+)`", keys)
        defaults = re.split(r",(?![^\[]*\])", text) if len(names) > 1 else [text]
        assert len(defaults) == len(names), f"{page.name}: {line}"
        found |= {n: d.strip().strip("`") for n, d in zip(names, defaults, strict=True)}
    return found


def says(text: str, default: Any) -> bool:
    """Whether a table's text is the default of a setting; where there is none, any words are."""
    told = WORDS.get(text) or yaml.safe_load(text) if text[:1] in "[{" or text in WORDS else text
    number = re.fullmatch(r"-?\d[\d.]*(e-?\d+)?", text)
    if default in (None, "", (), [], {}):
        return not number and text not in ("true", "false") and (told == text or not told)
    if isinstance(default, bool):
        return text == str(default).lower()
    if isinstance(default, int | float):
        return number is not None and float(text) == default
    told = told.replace("\\n", "\n") if isinstance(told, str) else told
    return bool(told == (list(default) if isinstance(default, tuple) else default))


@pytest.mark.parametrize("kind", ["methods", "evaluators"])
def test_every_setting_is_on_its_page_with_its_default(kind: Any) -> None:
    texts = {p.stem: p.read_text() for p in (ROOT / "docs" / kind).glob("*.md")}
    tables = {name: settings_on(ROOT / "docs" / kind / f"{name}.md") for name in texts}
    for name in registry._own(kind):
        cls = registry.find(kind, name)
        own = schema.plain(cls(**getattr(cls, "needs", {})))
        pages = [name]
        for page in pages:
            named = re.findall(r"[Tt]hose\s+of\s+\[?`?(\w+)", texts[page])
            pages += [n for n in dict.fromkeys(named) if n in tables and n not in pages]
        assert set(tables[name]) <= set(own), name
        for key, default in own.items():
            told = next((tables[page][key] for page in pages if key in tables[page]), None)
            if key not in FILLED_IN and key not in getattr(cls, "needs", {}):
                assert told is not None, f"{name}.md does not explain {key}"
                assert says(told, default), (name, key, told, default)


def test_every_room_has_its_row_and_every_row_a_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    listed = re.findall(r"^\| `(\w+)/` \|", text, re.M)
    there = [p.parent.name for p in (ROOT / "effbench").glob("*/__init__.py")]
    assert sorted(listed) == sorted(there)
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert listed == re.findall(r"\w+", " ".join(layers["contracts"][0]["layers"]))


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", text):
        assert (ROOT / "effbench" / name).is_file(), name


@pytest.mark.parametrize(
    ("title", "cls"), [("All", Method), ("that train", Trains), ("that compress", Compresses)]
)
def test_protocol_lists_the_hooks_that_exist(title: str, cls: type[Method]) -> None:
    text = (ROOT / "docs" / "method-protocol.md").read_text()
    [section] = [part for part in text.split("\n## ") if title in part.partition("\n")[0]]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.M)
    hooks = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    public = {n: v for n, v in _members(cls).items() if not n.startswith("_")}
    there = {n for n, v in public.items() if callable(v) or isinstance(v, property)}
    inherited = set(dir(Method)) if cls is not Method else set()
    assert hooks == there - inherited
    if cls is Method:
        named = re.search(r"Class variables: (.*?)\.\n", section, re.S)
        assert named is not None
        assert set(re.findall(r"`(\w+)`", named[1])) == set(public) - there


def test_members_of_an_evaluator_are_explained() -> None:
    text = (ROOT / "docs" / "adding-a-method.md").read_text()
    section = text.partition("## A new evaluator")[2].partition("\n## ")[0]
    members = {name for name in vars(Evaluator) if not name.startswith("_")}
    assert members <= set(re.findall(r"`(\w+)`", section))


OTHERS = (CompressesLinears, CompressesBlocks, Evolution, Packed, CachePolicy, Route, Driver)
"""What a plug-in may override beside the hooks of a method."""


@pytest.mark.parametrize("cls", OTHERS)
def test_protocol_names_all_that_can_be_overridden(cls: type) -> None:
    text = (ROOT / "docs" / "method-protocol.md").read_text()
    named = set(re.findall(r"`(\w+)", text))
    members = {n for c in cls.__mro__ if c.__module__.startswith("effbench") for n in vars(c)}
    settings = {"name", "packed", *cls.__dict__.get("__dataclass_fields__", ())}
    assert {n for n in members - settings if not n.startswith("_")} <= named


def _members(cls: type[Method]) -> dict[str, Any]:
    """Return what a class has, and what it has from others that are no methods."""
    own = [c for c in cls.__mro__ if c is cls or not issubclass(c, Method)]
    return {n: v for c in reversed(own) for n, v in vars(c).items()}


# -- figures -----------------------------------------------------------------------------------

NUMBER = r"[-+]?\d*\.?\d+"
Figure = tuple[str, str, str]
FIGURE = re.compile(rf"({NUMBER})(?: nats\S*)?\s+\[({NUMBER}), ({NUMBER})\]")
"""A value with its interval."""
NAMED = re.compile(r"(?:results/tables/|conf/table/|effbench table |make campaign-)([\w-]+)")


@dataclass(frozen=True)
class Row:
    """A row of a table, of one metric."""

    name: str
    metric: tuple[str, ...]
    value: float
    figures: tuple[tuple[float, float, float], ...]
    """Its value and its difference, each with its interval."""


@cache
def rows_of(table: str) -> tuple[Row, ...]:
    """Return the rows of a committed table whose values have intervals."""
    found = []
    for path in (ROOT / "results" / "tables").glob(f"{table}*.csv"):
        if table == "grand" or path.stem not in (table, f"{table}_points"):
            continue
        for line in csv.DictReader(path.open()):
            name = f"{line['run']} {line['point']}".strip()
            metric = tuple(line[k] for k in ("metric", "task", "split", "phase"))
            parts = [[line[f"{k}{end}"] for end in ("", "_low", "_high")] for k in VALUES]
            figures = tuple((float(v), float(a), float(b)) for v, a, b in parts if a)
            if figures and line["value"]:
                found.append(Row(name, metric, float(line["value"]), figures))
    return tuple(found)


VALUES = ("value", "difference")


def quoting(text: str) -> Iterator[tuple[set[str], str]]:
    """Yield the blocks of a text that quote tables, with the names of these."""
    for section in re.split(r"^(?=##+ )", text, flags=re.M):
        names = {name.replace("-", "_") for name in NAMED.findall(section)}
        tables = {name for name in names if rows_of(name)}
        measured = False  # by a benchmark, whose figures are in no table
        for block in section.split("\n\n") if tables else ():
            measured = "bench-" in block or "bench_" in block or measured
            measured = measured and not NAMED.search(block)
            if not measured:
                yield tables, " ".join(block.replace("−", "-").split())


def close(said: Sequence[str], found: Sequence[float]) -> bool:
    """Whether numbers are others rounded, whatever their sign."""
    half = [0.51 * 10.0 ** -len(x.partition(".")[2]) for x in said]
    plus = [abs(float(x) - y) <= h for x, y, h in zip(said, found, half, strict=True)]
    swapped = [found[0], *reversed(found[1:])]
    minus = [abs(float(x) + y) <= h for x, y, h in zip(said, swapped, half, strict=True)]
    return all(plus) or all(minus)


def is_difference(figure: Figure, table: str, reader: Reader) -> bool:
    """Whether a figure is the difference of two rows of a table, by its first metric."""
    campaign = campaign_named(table)
    rows = [row for row in rows_of(table) if row.metric[0] == campaign.metrics[0]]
    pairs = [
        Pair(one.name, two.name, "lower")
        for one, two in combinations(rows, 2)
        if one.metric == two.metric and close(figure[:1], [one.value - two.value])
    ]
    asked = replace(campaign, verdict=Verdict("not run yet", "", rests_on=pairs))
    found = [test.difference for test in retested(asked, ROOT / "results", reader)]
    return any(close(figure, [d.value, d.low or 0, d.high or 0]) for d in found)


def test_campaigns_are_listed_as_they_stand() -> None:
    text = "".join((ROOT / "docs" / f"{name}.md").read_text() for name in ("campaigns", "mini"))
    rows = dict(re.findall(r"^\| \[(\w+)\]\(\.\./.*?\) \|(.*)$", text, re.M))
    assert rows.keys() == {c.name for c in campaigns()}
    for campaign in campaigns():
        row, made = rows[campaign.name], (ROOT / "results" / "tables" / f"{campaign.name}.md")
        assert made.exists() == (f"results/tables/{campaign.name}.md" in text), campaign.name
        assert made.exists() != ("not run yet" in row), campaign.name
        if campaign.verdict and campaign.name.endswith("_mini"):
            assert campaign.verdict.state in row, campaign.name


@pytest.mark.parametrize(
    ("title", "known"),
    [
        ("# Record\n", {f.name for f in fields(Record)} | {"digest"}),
        ("# metrics\n", {f.name for f in fields(Metric)}),
        ("# outcomes\n", {f.name for f in fields(Outcomes)}),
    ],
)
def test_fields_of_a_record_are_explained(title: str, known: set[str]) -> None:
    text = (ROOT / "docs" / "records.md").read_text()
    table = text.partition(title)[2].partition("\n#")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == known


def test_keys_of_a_campaign_file_are_explained() -> None:
    keys = {f.name for f in fields(Campaign)} - {"name", "title"} | {"words"}
    assert set(settings_on(ROOT / "docs" / "campaigns.md")) == keys


def test_figures_that_quote_tables_are_in_them() -> None:
    texts = {p.relative_to(ROOT).as_posix(): p.read_text() for p in PAGES[3:]}
    for path in (ROOT / "conf" / "table").glob("*.yaml"):
        texts[path.name] = f"conf/table/{path.stem}\n" + path.read_text().replace("\n\n", "\n")
    reader, wrong = Reader(ROOT / "results" / "records"), []
    for page, text in texts.items():
        for tables, block in quoting(text):
            known = [f for table in tables for row in rows_of(table) for f in row.figures]
            for figure in FIGURE.findall(block):
                told = any(close(figure, f) for f in known)
                if not told and not any(is_difference(figure, t, reader) for t in tables):
                    wrong.append(f"{page}: {figure[0]} [{figure[1]}, {figure[2]}]")
    assert not wrong


# -- what may import what ----------------------------------------------------------------------


def test_torch_is_not_imported_before_or_after_a_run() -> None:
    package = ROOT / "effbench"
    light = ["runner.local", "runner.sweep", "resources.predict"]
    for room in ("api", "cli", "config", "data", "evaluators", "methods", "report", "results"):
        files = [p for p in (package / room).rglob("*.py") if p.parent.name != "selfcheck"]
        light += [".".join(p.relative_to(package).with_suffix("").parts) for p in files]
    code = "\n".join(f"import effbench.{name.removesuffix('.__init__')}" for name in light)
    code += "\nimport sys\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -- adding a method ---------------------------------------------------------------------------


def test_the_example_is_what_the_page_shows() -> None:
    shown = {
        b.mark.removeprefix("file: "): b.text
        for b in blocks(ROOT / "docs" / "adding-a-method.md")
        if b.mark.startswith("file: ")
    }
    files = {p.relative_to(ROOT).as_posix() for p in EXAMPLE.iterdir() if p.is_file()}
    assert set(shown) == files
    for name, text in shown.items():
        assert text == (ROOT / name).read_text(), name


def effbench(folder: Path, *words: str) -> str:
    """Run the command line in a process that finds what lies in `folder` first."""
    return python(folder, "-c", "from effbench.cli.main import main; main()", *words)


def python(folder: Path, *words: str) -> str:
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ALONE = "config or untrained or loaded or seed or peft"
"""Some of what the contract asks of one method."""


@pytest.mark.parametrize("chosen", [ALONE, pytest.param("", marks=pytest.mark.slow)])
def test_a_method_from_another_package(chosen: str, tmp_path: Path) -> None:
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    for name in ("effbench_neftune.py", "test_contract.py"):
        shutil.copy(EXAMPLE / name, tmp_path)
    info = tmp_path / f"effbench_neftune-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))

    assert re.search("neftune +NEFTune: LoRA whose", effbench(tmp_path, "list", "methods"))
    assert "method.noise = 5.0" in effbench(tmp_path, "show", "method", "neftune")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    out = python(
        tmp_path, "-m", "pytest", "-q", "-m", "not slow", "-k", chosen, "-p", "no:cacheprovider"
    )
    assert "passed" in out


def test_a_method_inside(tmp_path: Path) -> None:
    for part in ("effbench", "conf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "effbench_neftune.py", tmp_path / "effbench" / "methods" / "neftune.py")
    shutil.copy(EXAMPLE / "neftune.yaml", tmp_path / "conf" / "method")

    assert re.search("neftune +NEFTune: LoRA on token", effbench(tmp_path, "list", "methods"))
    out = effbench(tmp_path, "plan", "method=neftune", "method.noise=0", "model=tiny")
    assert "train neftune tiny gsm8k-test seed 0" in out


def test_no_file_has_marks_of_a_merge() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    texts = (ROOT / name for name in tracked.stdout.decode().split("\0") if name)
    marks = tuple(7 * mark + b" " for mark in (b"<", b">", b"|"))
    marked = [
        path.relative_to(ROOT)
        for path in texts
        if path.suffix not in (".png", ".json")
        and path.is_file()
        and any(line.startswith(marks) for line in path.read_bytes().splitlines())
    ]
    assert not marked
