"""Which wheels it takes: asked of pip, for the target.

What the target has already stands in as an empty package of the same version, so that pip looks
for versions that fit it and does not look at what only it would need.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit
from zipfile import ZipFile

from effbench.cli.bundle.target import Target, plain_name, version_here, versions_here
from effbench.util.errors import UserError

NO_NETWORK = (
    "NewConnectionError",
    "Name or service not known",
    "Temporary failure in name resolution",
    "Network is unreachable",
    "Connection refused",
    "ProxyError",
    "ConnectTimeoutError",
)
MARK = "+there"
"""Ends the version of a package that stands in for what the target has."""
ROUNDS = 4
"""How often requirements that only the target has are looked for; each round finds new ones."""


class UnreachableError(UserError):
    """The package registry does not answer."""


@dataclass(frozen=True)
class Found:
    """One package as pip chose it."""

    name: str
    version: str
    url: str
    sha256: str
    requires: tuple[str, ...]
    extras: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Name of the file."""
        return unquote(urlsplit(self.url).path).rpartition("/")[2]

    @property
    def built(self) -> bool:
        """Whether it is a wheel, and not source that has to be built."""
        return self.file.endswith(".whl")


@dataclass(frozen=True)
class Plan:
    """What goes into a bundle, and what has to be there already."""

    packages: list[Found]
    there: dict[str, dict[str, str]] = field(default_factory=dict)
    """From the name of a package left out to who needs it, and the range that it has to be in."""
    same_versions: bool = True
    """Whether the versions are those of this machine, where it has the package."""


def run_pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python's pip and return what it said."""
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def resolve(
    wanted: Sequence[str], target: Target, without: Mapping[str, str], links: Sequence[Path]
) -> Plan:
    """Return the packages that `wanted` needs on the target.

    The versions installed here are taken where they fit the target and what it has, else the
    newest that do.

    Args:
        wanted: Requirements, or paths of wheels.
        target: Where they will be installed.
        without: Names of packages that are there already, and their versions where known.
        links: Folders with further wheels.

    Raises:
        UserError: When no versions fit together, a package has no wheel for the target, or there
            is no network.
    """
    known = {n: v or version_here(n) for n, v in without.items()}
    known = {n: v for n, v in known.items() if v}
    with TemporaryDirectory() as folder:
        for name, version in known.items():
            _stand_in(Path(folder), name, version)
        asked = [f"{name}=={_local(version)}" for name, version in known.items()]
        here = [f"{n}=={v}" for n, v in versions_here().items() if n not in without]
        here = [pin for pin in here if not pin.startswith("effbench==")]
        sources = [Path(folder), *links]
        try:
            found = _until_whole(wanted, target, [*asked, *here], sources)
            same = True
        except UnreachableError:
            raise
        except UserError:
            found = _until_whole(wanted, target, asked, sources)
            same = False
    kept, there = _needed(found, wanted, target, without)
    return Plan(kept, there, same)


def _until_whole(
    wanted: Sequence[str], target: Target, pins: Sequence[str], links: Sequence[Path]
) -> list[Found]:
    """Ask pip, and again for what only the target's markers ask for.

    pip evaluates the markers of dependencies on the machine where it runs.
    """
    roots = list(wanted)
    for _ in range(ROUNDS):
        found = _ask(roots, target, pins, links)
        names = {plain_name(f.name) for f in found}
        lacking = [r for r, n in _edges(found, target) if n not in names]
        if not lacking:
            return found
        roots += sorted(set(lacking))
    return found


def _ask(
    wanted: Sequence[str], target: Target, pins: Sequence[str], links: Sequence[Path]
) -> list[Found]:
    with TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{pin}\n" for pin in pins))
        answer = run_pip(
            *("install", "--dry-run", "--ignore-installed", "--retries=1", "--progress-bar=off"),
            *("--target", folder, "--report", str(Path(folder) / "report.json")),
            *("--constraint", str(constraints)),
            *(word for link in links for word in ("--find-links", str(link))),
            *target.pip_options(),
            *wanted,
        )
        if answer.returncode:
            raise _refused(answer.stdout + answer.stderr, target)
        report = json.loads((Path(folder) / "report.json").read_text())
    return [_found(item) for item in report["install"]]


def _found(item: Mapping[str, Any]) -> Found:
    metadata, info = item["metadata"], item["download_info"]
    return Found(
        metadata["name"],
        metadata["version"],
        info["url"],
        info.get("archive_info", {}).get("hashes", {}).get("sha256", ""),
        tuple(metadata.get("requires_dist", ())),
        tuple(item.get("requested_extras", ())),
    )


def _refused(said: str, target: Target) -> UserError:
    if any(sign in said for sign in NO_NETWORK):
        return UnreachableError(
            "The package registry cannot be reached.",
            "A bundle is made where there is network: check it, and what pip is configured with.",
        )
    blamed = said.partition("The conflict is caused by:")[2].strip().partition("\n\n")[0]
    lacking = re.findall(r"No matching distribution found for (\S+)", said)
    listed = re.search(r"no matching distributions available.*?:\n((?: {4}\S+\n)+)", said)
    if listed and MARK not in blamed:
        lacking += listed[1].split()
    where = f"Python {target.python} on {target.title}"
    if lacking:
        return UserError(
            f"There is no wheel of {', '.join(dict.fromkeys(lacking))} for {where}.",
            "Leave it out (--without NAME) if it is there already; else another --python or a "
            "newer --platform may have one.",
        )
    lines = [line.strip() for line in said.splitlines()]
    conflict = [line.strip().replace(MARK, "") for line in blamed.splitlines()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = "; ".join(conflict[:6]) or (errors or lines or ["pip failed"])[-1]
    return UserError(
        f"No versions fit together for {where}: {reason.rstrip('.')}.",
        "Where --without names a version, see whether the ranges above allow it.",
    )


# -- what is there already ---------------------------------------------------------------------


def _local(version: str) -> str:
    """Return a version that no registry has, and that is taken for `version` by any range."""
    return f"{version}{MARK if '+' not in version else MARK.replace('+', '.')}"


def _stand_in(folder: Path, name: str, version: str) -> None:
    version, stem = _local(version), name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    with ZipFile(folder / f"{stem}-{version}-py3-none-any.whl", "w") as archive:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", metadata)
        tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tag)
        archive.writestr(f"{info}/RECORD", "")


def _edges(found: Iterable[Found], target: Target) -> list[tuple[str, str]]:
    """Return every requirement that holds on the target, and the name it is of."""
    edges = []
    for package in found:
        for line, name, _ in _requirements(package, set(package.extras), target):
            edges.append((line, name))
    return edges


def _requirements(
    package: Found, extras: set[str], target: Target
) -> list[tuple[str, str, set[str]]]:
    """Return requirements of a package on the target: without marker, the name, its extras."""
    from packaging.requirements import Requirement

    environment, kept = target.environment(), []
    for line in package.requires:
        needed = Requirement(line)
        marker = needed.marker
        if marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        ):
            needed.marker = None
            kept.append((str(needed), plain_name(needed.name), set(needed.extras)))
    return kept


def _needed(
    found: Sequence[Found], wanted: Sequence[str], target: Target, without: Mapping[str, str]
) -> tuple[list[Found], dict[str, dict[str, str]]]:
    """Walk from what is wanted, not through what is left out: what it needs, what must be there."""
    from packaging.requirements import Requirement

    by_name = {plain_name(f.name): f for f in found}
    there: dict[str, dict[str, str]] = {}
    seen: dict[str, set[str]] = {}
    todo = [(plain_name(f.name), set(f.extras)) for f in found if _is_wanted(f, wanted)]
    while todo:
        name, extras = todo.pop()
        if name in seen and extras <= seen[name]:
            continue
        extras |= seen.get(name, set())
        seen[name] = extras
        for line, needs, their_extras in _requirements(by_name[name], extras, target):
            if needs in without:
                asks = there.setdefault(needs, {})
                asks[by_name[name].name] = str(Requirement(line).specifier)
            elif needs in by_name:
                todo.append((needs, their_extras))
    kept = [f for name, f in sorted(by_name.items()) if name in seen]
    return kept, dict(sorted(there.items()))


def _is_wanted(package: Found, wanted: Sequence[str]) -> bool:
    names = set()
    for word in wanted:
        stem = Path(word.partition("[")[0]).name
        names.add(plain_name(stem.partition("-")[0] if stem.endswith(".whl") else stem))
    return plain_name(package.name) in names
