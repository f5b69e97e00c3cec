"""The documentation is true: commands compose, links lead somewhere, lists are complete."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from effbench.api import registry
from effbench.api.evolution import Evolution
from effbench.api.weights import Packed
from effbench.cli.main import app
from effbench.config.compose import compose
from effbench.config.files import groups
from effbench.config.overrides import check_overrides
from effbench.config.start import split_words
from effbench.methods.base import Method
from effbench.methods.calibrates import CompressesBlocks
from effbench.methods.compresses import Compresses, CompressesLinears
from effbench.methods.trains import Trains
from effbench.nn.decode.decoder import Driver, Route
from effbench.nn.decode.policy import CachePolicy
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


def own_methods() -> set[str]:
    return set(registry.names("methods")) - set(registry.plugins("methods"))


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
