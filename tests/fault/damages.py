"""Files of run folders, records and caches, damaged in every way; then they are used.

Each damage is done to a copy. A command on it has to end as on the undamaged files, or to refuse
with a message that names the file, its folder or the run, in a few lines and without a traceback.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from crashes import End, Tally
from scenes import SHORT, Said, command

from effbench.results.events import EventLog
from effbench.results.journal import Journal
from effbench.testing.bench import Bench, HardKill

Damage = Callable[[Path, Path], None]
"""Damages a file; the second path is the same file of another run."""


def _flip(share: float) -> Damage:
    def act(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(share * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return act


def _digit(path: Path, other: Path) -> None:
    """Change the last digit of the first number: still a good file, with another value."""
    content = path.read_bytes()
    found = re.search(rb"\d(?=\D*$)", content) or re.search(rb".", content, re.S)
    assert found is not None
    path.write_bytes(
        content[: found.start()] + b"7" * (content[found.start()] != 55) + content[found.end() :]
    )


def _cut(share: float) -> Damage:
    def act(path: Path, other: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return act


def _without_line(path: Path, other: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    del lines[len(lines) // 2]
    path.write_bytes(b"".join(lines))


def _more(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00more")


def _folder(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: dict[str, Damage] = {
    "first bit": _flip(0.0),
    "a bit inside": _flip(0.5),
    "another bit": _flip(0.8),
    "last bit": _flip(1.0),
    "a digit": _digit,
    "cut in half": _cut(0.5),
    "end cut off": _cut(0.97),
    "emptied": _cut(0.0),
    "a line less": _without_line,
    "of another run": lambda path, other: path.write_bytes(other.read_bytes()) and None,
    "deleted": lambda path, other: path.unlink(),
    "bytes more": _more,
    "a folder": _folder,
    "a link to itself": _link,
}


@dataclass(frozen=True)
class Site:
    """Runs to damage: their commands, and where their files are, from the results folder on."""

    root: Path
    keys: dict[str, str]
    """By name: `a` and `b` are two trainings, `c` compresses; the others are interrupted."""

    def words(self, name: str) -> list[str]:
        """Return the command of a run."""
        stages = {"e": ("train", 2), "f": ("compress", 3), "g": ("eval", 4)}
        stage, seed = stages.get(name[0], ("train", 1))
        more = ["train.checkpoint_every=5"] if stage == "train" else []
        more += ["method=rtn"] if stage == "compress" else []
        return [stage, *SHORT, *more, f"seed={seed + 10 * name.endswith('2')}"]


def build_site(root: Path, short: bool = False) -> Site:
    """Make finished and interrupted runs; only trainings for the short form."""
    keys = {}
    site = Site(root, keys)

    def run(name: str, words: Sequence[str], patch: object = None) -> None:
        bench = Bench(root)
        job = bench.job(words[0], *words[1:])  # type: ignore[arg-type]
        with suppress(HardKill):
            bench.go(job)
        keys[name] = job.spec.key

    run("a", site.words("a"))
    run("b", [*site.words("a")[:-1], "seed=5"])
    for name, owner, method, kind, number in (
        ("e", EventLog, "append", "step", 8),
        ("e2", EventLog, "append", "step", 8),
        ("f", EventLog, "append", "part", 5),
        ("f2", EventLog, "append", "part", 5),
        ("g", EventLog, "append", "evaluated", 1),
        ("g2", EventLog, "append", "evaluated", 1),
        ("h", Journal, "add", "", 2),
        ("h2", Journal, "add", "", 2),
    ):
        if short and name not in ("e", "e2"):
            continue
        words = site.words(name.replace("h", "g"))
        words = [*words[:-1], "seed=9"] if name == "h" else words
        words = [*words[:-1], "seed=8"] if name == "h2" else words
        with mock.patch.object(owner, method, _until(getattr(owner, method), kind, number)):
            run(name, words)
    return site


def _until(call: Callable[..., None], kind: str, number: int) -> Callable[..., None]:
    seen = 0

    def counted(self: object, first: object, **facts: object) -> None:
        nonlocal seen
        call(self, first, **facts)
        seen += kind in ("", first)
        if seen == number:
            raise HardKill

    return counted


@dataclass(frozen=True)
class Case:
    """A file, what it is damaged by, and the command that meets it."""

    file: str
    other: str
    damage: str
    words: tuple[str, ...]
    key: str
    """Of the run whose end is compared; empty when what is printed is."""
    where: str = "results"

    @property
    def name(self) -> str:
        """What is done, in words."""
        return f"{self.file}, {self.damage}: {' '.join(self.words[:2])}"


def cases(site: Site) -> Iterator[Case]:
    """Yield what is damaged and used."""
    keys = site.keys

    def each(
        name: str, twin: str, file: str, words: Sequence[str], key: str = ""
    ) -> Iterator[Case]:
        for damage in DAMAGES if name in keys else ():
            path, other = (f"runs/{keys[n]}/{file}" for n in (name, twin))
            yield Case(path, other, damage, tuple(words), key)

    evaluation = ["eval", f"from={keys['a']}", *HERE_TOO]
    for file in (
        "spec.json",
        "manifest.jsonl",
        "FINISHED",
        "data.json",
        "artefact/weights.safetensors",
        "artefact/method.json",
        "events.jsonl",
    ):
        yield from each("a", "b", file, evaluation, "from a")
    for file in ("artefact/weights.safetensors", "artefact/method.json"):
        yield from each("a", "b", file, ["export", keys["a"], "exported"])
    for file in ("checkpoint.pt", "events.jsonl", "manifest.jsonl", "spec.json"):
        yield from each("e", "e2", file, site.words("e"), keys["e"])
    part = "parts/model.layers.0.self_attn.q_proj.safetensors"
    for file in (part, "events.jsonl", "manifest.jsonl"):
        yield from each("f", "f2", file, site.words("f"), keys.get("f", ""))
    for file in ("evaluations/perplexity.json", "events.jsonl"):
        yield from each("g", "g2", file, site.words("g"), keys.get("g", ""))
    words = [*site.words("g")[:-1], "seed=9"]
    yield from each("h", "h2", "evaluations/perplexity.test.items", words, keys.get("h", ""))
    a, b = keys["a"], keys["b"]
    for words in (["runs", "show", a], ["runs"], ["compare", b, a], site.words("a")):
        for damage in DAMAGES:
            if damage == "deleted" and words == ["runs"]:
                continue  # a list without it is right
            yield Case(f"records/{a}.json", f"records/{b}.json", damage, tuple(words), "")
    for damage in DAMAGES:
        index = "runs/.records.json"
        yield Case(index, f"records/{b}.json", damage, ("runs",), "")
        yield Case("tokens", "", damage, (*site.words("e2"), "--fresh"), keys["e2"], "cache")


HERE_TOO = SHORT[2:]


def use(case: Case, root: Path) -> tuple[Said, End | None]:
    """Give the command of a case; return what it said and what its run ended in."""
    words = [str(root.parent / w) if w == "exported" else w for w in case.words]
    if words[0] in ("runs", "compare", "export"):
        words += ["--results", str(root)]
    said = command(words, root)
    if said.status or not case.key:
        exported = root.parent / "exported"
        files = {p.name: p.read_bytes() for p in sorted(exported.glob("*"))}
        return Said(said.status, _untimed(said.out, root) + repr(files), said.err), None
    bench = Bench(root)
    stage, *rest = [w for w in words if not w.startswith("--")]
    return said, End.of(bench, bench.job(stage, *rest))  # type: ignore[arg-type]


def _untimed(text: str, root: Path) -> str:
    """Return what was printed without the place, ages of runs, and the widths that they ask for."""
    text = re.sub(r"\b\d+ (s|min|h|d)\b", "AGE", text.replace(str(root), ""))
    return re.sub(r"[ -]{2,}", "  ", text)


def try_damages(site: Site, chosen: Callable[[int], bool] = lambda n: True) -> Tally:
    """Damage one file after another; say which command did the wrong thing then."""
    tally, references = Tally("damaged files"), {}
    for number, case in enumerate(cases(site)):
        tally.points += 1
        if not chosen(number):
            continue
        reference = (case.words, case.key)
        if reference not in references:
            references[reference] = in_a_copy(site, case, None)
        if wrong := _judged(case, references[reference], in_a_copy(site, case, case.damage)):
            tally.wrong.append(f"{case.name}: {wrong}"[:400])
        tally.tried += 1
    return tally


def _judged(case: Case, whole: object, found: object) -> str:
    """Return what is wrong with how a command on a damaged file ended; empty when nothing is."""
    if isinstance(whole, str) or isinstance(found, str):
        return f"{whole if isinstance(whole, str) else found}"
    (before, ending), (said, end) = whole, found  # type: ignore[misc]
    assert before.status == 0, before
    if "Traceback" in said.err:
        return "traceback"
    if said.status == 0:
        odd = ending.differs(end) if ending else before.out != said.out and "other output"
        return f"a silent change: {odd}" if odd else ""
    if said.status != 2:
        return f"exit status {said.status}: {said.err[-200:]}"
    message = said.err[said.err.index("Error:") :]
    parts = [p for p in Path(case.file).parts if p not in ("runs", "records", "cache")]
    if len(message.splitlines()) > 6 or not any(p.split(".")[0] in message for p in parts):
        return f"a message that names nothing: {message}"
    return ""


def in_a_copy(site: Site, case: Case, damage: str | None) -> object:
    """Use a copy of the runs in a process of its own; return what came of it, or a traceback."""
    place = site.root.parent / "copy"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(site.root, place / "results")
    shutil.copytree(site.root.parent / "cache", place / "cache")
    if damage:
        path, other = place / "results" / case.file, place / "results" / case.other
        if case.where == "cache":
            files = sorted((place / "cache" / "tokens").iterdir())
            for path, twin in zip(files, [*files[1:], files[0]], strict=True):
                _damage(path, twin if twin.is_file() else path, damage)
        else:
            _damage(path, other, damage)
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(reading)
        os.environ["EFFBENCH_CACHE"] = str(place / "cache")
        try:
            answer: object = use(case, place / "results")
        except BaseException:
            answer = traceback.format_exc()[-600:]
        with os.fdopen(writing, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        content = file.read()
    os.waitpid(number, 0)
    return pickle.loads(content) if content else "the process died"


def _damage(path: Path, other: Path, damage: str) -> None:
    if path.is_file() and not path.is_symlink():
        DAMAGES[damage](path, other)
