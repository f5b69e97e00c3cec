"""Wheels that no registry has: effbench's own, and those of packages published as source alone."""

from __future__ import annotations

import base64
import hashlib
import tomllib
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from effbench.cli.bundle.resolve import Found, run_pip
from effbench.cli.bundle.target import Target
from effbench.util.errors import UserError


def own_wheel(folder: Path) -> Path:
    """Make the wheel of this effbench, from its checkout or from its installed files.

    Raises:
        UserError: When it runs from neither.
    """
    root = Path(__file__).parents[3]
    if _is_checkout(root):
        return _build(str(root), "effbench", folder)
    try:
        installed = distribution("effbench")
    except PackageNotFoundError:
        installed = None
    if installed is None or Path(str(installed.locate_file("effbench"))) != root / "effbench":
        raise UserError(
            f"effbench runs from {root}, which is neither a checkout nor an installed package.",
            "Bundle from a clone of its repository, or from an environment it is installed in.",
        )
    return repack(installed, folder)


def _is_checkout(root: Path) -> bool:
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return False
    return bool(project.get("name") == "effbench")


def repack(installed: Distribution, folder: Path) -> Path:
    """Put the files of an installed package of pure Python back into a wheel in `folder`.

    What was made at installation (programs, byte code) is left out.
    """
    stem = f"{installed.metadata['Name'].replace('-', '_')}-{installed.version}"
    info = f"{stem}.dist-info"
    left = {f"{info}/{name}" for name in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")}
    path, record = folder / f"{stem}-py3-none-any.whl", []
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for file in sorted(installed.files or (), key=str):
            name = file.as_posix()
            if name in left or name.startswith(("..", "/")) or name.endswith(".pyc"):
                continue
            content = Path(str(file.locate())).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            record.append(f"{name},sha256={digest.decode()},{len(content)}\n")
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]))
    return path


def build_sources(found: Sequence[Found], target: Target, folder: Path) -> list[str]:
    """Build the packages in `found` that come as source into wheels in `folder`.

    Returns:
        Names of those whose wheel would not run on a foreign target; it is not kept.

    Raises:
        UserError: When one cannot be built.
    """
    compiled = []
    for package in (f for f in found if not f.built):
        stem = f"{package.name.replace('-', '_')}-{package.version}-".lower()
        there = [p for p in folder.glob("*.whl") if p.name.lower().startswith(stem)]
        wheel = there[0] if there else _build(package.url, package.name, folder)
        if target.foreign and not wheel.name.endswith("-none-any.whl"):
            wheel.unlink()
            compiled.append(package.name)
    return compiled


def _build(source: str, name: str, folder: Path) -> Path:
    before = set(folder.glob("*.whl"))
    answer = run_pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), source)
    made = set(folder.glob("*.whl")) - before
    if answer.returncode or not made:
        lines = [line for line in answer.stderr.splitlines() if line.strip()] or ["pip failed"]
        errors = [line for line in lines if "rror" in line]
        raise UserError(
            f"No wheel of {name} can be built here: {(errors or lines)[-1].strip()}.",
            f"See why: pip wheel --no-deps {source}",
        )
    return made.pop()
