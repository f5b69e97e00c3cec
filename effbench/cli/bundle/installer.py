"""Install effbench from a bundle, without network.

This file travels inside `install.sh` and runs on the target: it takes nothing but the standard
library, and the pip that the bundle brings.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, cast

MARK = ".effbench-bundle"
"""Written last into what was installed: the bundle and the way it was installed."""
HELP = """examples:
  ./install.sh --check                        which parts have come, and whether they are whole
  ./install.sh ~/effbench                     into a folder, beside the packages of python3
  ./install.sh ~/effbench --python /opt/py/bin/python3
  ./install.sh ~/effbench --venv              into an environment of its own
then:
  . ~/effbench/activate
  effbench train method=qdylora"""


class CannotInstallError(Exception):
    """Something to put right: what is wrong, and what to do about it."""


def main(words: Sequence[str], manifest: dict[str, Any]) -> int:
    """Run the installer and return its exit status: 0 done, 1 parts are missing, 2 refused."""
    options = _options(words[1:])
    here = Path(words[0])
    try:
        if options.check:
            return _check(here, manifest)
        if not options.prefix:
            raise CannotInstallError(
                "Say where to install: install.sh PREFIX\nHelp: install.sh --help"
            )
        prefix = Path(options.prefix).expanduser().absolute()
        _install(here, manifest, prefix, options)
    except CannotInstallError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"Error: {error.filename or here}: {error.strerror}.", file=sys.stderr)
        print("Nothing was installed.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Nothing was installed.", file=sys.stderr)
        return 130
    return 0


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="install.sh",
        description="Install effbench from this bundle; no network is touched.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prefix", nargs="?", metavar="PREFIX", help="folder to install into")
    parser.add_argument("--python", metavar="PY", help="the Python to install for")
    parser.add_argument("--venv", action="store_true", help="make PREFIX a virtual environment")
    parser.add_argument(
        "--force", action="store_true", help="install although packages are missing or too old"
    )
    parser.add_argument("--check", action="store_true", help="look at the parts, install nothing")
    return parser.parse_args(words)


# -- the parts ---------------------------------------------------------------------------------


def _check(here: Path, manifest: dict[str, Any]) -> int:
    states = [(piece, _state(here, piece)) for piece in manifest["pieces"]]
    for piece, state in states:
        print(f"{state or 'ok':8} {piece['name']}  {piece['bytes'] / 2**20:.1f} MiB")
    wrong = [piece["name"] for piece, state in states if state]
    print(f"{len(states) - len(wrong)} of {len(states)} are here and whole.")
    return 1 if wrong else 0


def _state(here: Path, piece: dict[str, Any]) -> str:
    """Return what is wrong with a part, "" when nothing is."""
    path = here / piece["name"]
    if not path.is_file():
        return "missing"
    if path.stat().st_size != piece["bytes"]:
        return "damaged"
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return "" if digest == piece["sha256"] else "damaged"


def _verify(here: Path, manifest: dict[str, Any]) -> None:
    wrong: dict[str, list[str]] = {}
    for piece in manifest["pieces"]:
        state = _state(here, piece)
        if state:
            wrong.setdefault(state, []).append(piece["name"])
    if wrong:
        said = "; ".join(f"{state}: {', '.join(names)}" for state, names in sorted(wrong.items()))
        raise CannotInstallError(
            f"The bundle in {here} is not whole. {said[0].upper()}{said[1:]}.\n"
            "Copy them there again. Nothing was installed."
        )


class _Joined(io.RawIOBase):
    """Files read one after another, as if they were one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.left = list(paths)
        self.file: BinaryIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.file or self.left:
            if self.file is None:
                self.file = cast(BinaryIO, self.left.pop(0).open("rb"))
            count = cast(io.FileIO, self.file).readinto(buffer)
            if count:
                return count
            self.file.close()
            self.file = None
        return 0


def _unpack(here: Path, manifest: dict[str, Any], folder: Path) -> Path:
    """Return the folder with the wheels and archives of the bundle."""
    if not manifest["parts"]:
        return here
    joined = io.BufferedReader(_Joined([here / p["name"] for p in manifest["pieces"]]))
    with tarfile.open(fileobj=joined, mode="r|") as archive:
        _extract(archive, folder)
    return folder


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(folder, filter="data")
        return
    for member in archive:  # an early 3.11: links, devices and places elsewhere are left out
        place = (folder / member.name).resolve()
        if member.isfile() and place.is_relative_to(folder.resolve()):
            archive.extract(member, folder)


# -- what is there already ---------------------------------------------------------------------


def _look(manifest: dict[str, Any], force: bool) -> None:
    """Say which packages of this Python will be used, and refuse those that will not do.

    Needs pip's `packaging`, so that the bundle's pip has to be on the path.
    """
    from pip._vendor.packaging.specifiers import SpecifierSet

    bad = []
    if manifest["there"]:
        print(f"Packages of {sys.executable} that will be used:")
    for name, asks in manifest["there"].items():
        found = _version(name)
        wrong = [
            f"{who} needs {name} {ranges}".rstrip()
            for who, ranges in asks.items()
            if not found or not SpecifierSet(ranges).contains(found, prereleases=True)
        ]
        state = "missing" if not found else "refused" if wrong else "ok"
        print(f"  {state:7}  {name} {found}".rstrip())
        if wrong:
            bad.append(f"{name} is {found or 'missing'}: {'; '.join(wrong)}")
    if not bad:
        return
    said = "\n  ".join(bad)
    if force:
        print(f"Warning, gone on with --force:\n  {said}", file=sys.stderr)
        return
    raise CannotInstallError(
        f"This Python lacks what the bundle leaves out:\n  {said}\n"
        "Install them, say another Python (--python PY), or make a bundle that brings them. "
        "Nothing was installed."
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _shadowed(manifest: dict[str, Any]) -> list[str]:
    """Return the packages that the bundle brings and this Python has in another version."""
    return [
        f"{w['name']} {w['version']} (here: {_version(w['name'])})"
        for w in manifest["wheels"]
        if _version(w["name"]) not in ("", w["version"])
    ]


# -- installing --------------------------------------------------------------------------------


def _install(here: Path, manifest: dict[str, Any], prefix: Path, options: Any) -> None:
    mark = {"bundle": manifest["id"], "venv": options.venv, "python": sys.executable}
    if _mark(prefix) == mark:
        print(f"This bundle is installed in {prefix} already; nothing to do.")
        _say_how(prefix)
        return
    if prefix.exists() and not _mark(prefix) and (not prefix.is_dir() or any(prefix.iterdir())):
        raise CannotInstallError(
            f"{prefix} is not empty, and is no installed bundle.\nChoose a new folder."
        )
    _verify(here, manifest)
    _need_room(manifest, prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    fresh = prefix.with_name(f".{prefix.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir()
        source = _unpack(here, manifest, fresh / "bundle")
        _fill(source, manifest, fresh, prefix, options)
        shutil.rmtree(fresh / "bundle", ignore_errors=True)
        (fresh / MARK).write_text(json.dumps(mark))
        _swap(fresh, prefix)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"effbench {manifest['effbench']} is installed in {prefix}.")
    _say_how(prefix)


def _mark(prefix: Path) -> Any:
    try:
        return json.loads((prefix / MARK).read_text())
    except (OSError, ValueError):
        return None


def _need_room(manifest: dict[str, Any], prefix: Path) -> None:
    place = next(p for p in prefix.parents if p.exists())
    free = shutil.disk_usage(place).free
    packed = sum(p["bytes"] for p in manifest["pieces"]) if manifest["parts"] else 0
    need = packed + manifest["unpacked_bytes"]
    if free < need:
        raise CannotInstallError(
            f"{place} has {free / 1e9:.1f} GB free; installing takes {need / 1e9:.1f} GB.\n"
            "Free some, or choose a folder on another disk."
        )


def _fill(source: Path, manifest: dict[str, Any], fresh: Path, prefix: Path, options: Any) -> None:
    """Put packages, model and data into `fresh`, which will be renamed to `prefix`."""
    wheels = [source / w["file"] for w in manifest["wheels"]]
    pip = next((str(w) for w in wheels if w.name.startswith("pip-")), "")
    if pip:
        sys.path.insert(0, pip)
    elif not _version("pip"):
        raise CannotInstallError(f"{sys.executable} has no pip, and the bundle leaves it out.")
    _look(manifest, options.force)
    for line in _shadowed(manifest) if not options.venv else ():
        print(f"  brought, for effbench alone: {line}")
    print(f"Installing {len(wheels)} packages", flush=True)
    kept = [str(w) for w in wheels if str(w) != pip]
    if options.venv:
        _into_venv(pip, kept, manifest, fresh, prefix)
        _write(fresh / "activate", _activate(prefix, prefix / "bin", ""))
    else:
        _pip(sys.executable, pip, "--target", str(fresh / "site"), *kept)
        _write(fresh / "bin" / "effbench", _starter(prefix), executable=True)
        _write(fresh / "activate", _activate(prefix, prefix / "bin", str(prefix / "site")))
    for name in manifest["assets"]:
        print(f"Unpacking {name}", flush=True)
        with tarfile.open(source / "assets" / f"{name}.tar.gz") as archive:
            _extract(archive, fresh / "cache" / "assets")


def _pip(python: str, pip: str, *words: str) -> None:
    program = [f"{pip}/pip"] if pip else ["-m", "pip"]
    command = [python, *program, "install", "--isolated", "--no-index", "--no-deps", "--quiet"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-warn-script-location"]
    done = subprocess.run(
        [*command, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIP_CONFIG_FILE": os.devnull},
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
        raise CannotInstallError(
            f"pip did not install the packages: {(errors or lines)[-1]}\nNothing was installed."
        )


def _into_venv(
    pip: str, wheels: Sequence[str], manifest: dict[str, Any], fresh: Path, prefix: Path
) -> None:
    import venv

    shared = bool(manifest["there"])
    builder = venv.EnvBuilder(
        system_site_packages=shared, symlinks=os.name != "nt", with_pip=not pip
    )
    try:
        builder.create(fresh)
    except subprocess.CalledProcessError:
        raise CannotInstallError(
            f"{sys.executable} cannot put pip into a virtual environment.\n"
            "Install without --venv, or make a bundle that brings pip."
        ) from None
    _pip(str(fresh / "bin" / "python"), pip, *([pip] if pip else []), *wheels)
    if shared and sys.prefix != sys.base_prefix:
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        site = next((fresh / "lib").glob("python*/site-packages"))
        _write(site / "packages_that_were_there.pth", "".join(f"{p}\n" for p in sorted(paths)))
    for file in (*(fresh / "bin").iterdir(), fresh / "pyvenv.cfg"):
        content = b"" if file.is_symlink() or not file.is_file() else file.read_bytes()
        if bytes(fresh) in content:
            file.write_bytes(content.replace(bytes(fresh), bytes(prefix)))


def _starter(prefix: Path) -> str:
    site, python = shlex.quote(str(prefix / "site")), shlex.quote(sys.executable)
    return (
        "#!/bin/sh\n"
        f'PYTHONPATH={site}"${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        f'[ -n "$EFFBENCH_CACHE" ] || EFFBENCH_CACHE={shlex.quote(str(prefix / "cache"))}\n'
        'HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"\n'
        "export PYTHONPATH EFFBENCH_CACHE HF_HUB_OFFLINE\n"
        f'exec {python} {site}/bin/effbench "$@"\n'
    )


def _activate(prefix: Path, programs: Path, site: str) -> str:
    lines = [f'export PATH={shlex.quote(str(programs))}:"$PATH"']
    if site:
        lines.append(f'export PYTHONPATH={shlex.quote(site)}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    lines.append(f"export EFFBENCH_CACHE={shlex.quote(str(prefix / 'cache'))}")
    lines.append("export HF_HUB_OFFLINE=1")
    return "".join(f"{line}\n" for line in lines)


def _write(path: Path, text: str, executable: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if executable:
        path.chmod(0o755)


def _swap(fresh: Path, prefix: Path) -> None:
    """Put `fresh` where `prefix` is; what an earlier one has made in its cache stays."""
    old = prefix.with_name(f".{prefix.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if prefix.exists():
        prefix.rename(old)
    try:
        fresh.rename(prefix)
    except BaseException:
        if old.exists():
            old.rename(prefix)
        raise
    for kept in _made(old / "cache"):
        target = prefix / "cache" / kept.relative_to(old / "cache")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            kept.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _made(cache: Path) -> Iterator[Path]:
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        yield from sorted(folder.iterdir()) if folder.is_dir() else [folder]


def _say_how(prefix: Path) -> None:
    print("To use it, in every shell:")
    print(f"  . {shlex.quote(str(prefix / 'activate'))}")
    print("which says:")
    for line in (prefix / "activate").read_text().splitlines():
        print(f"  {line}")
