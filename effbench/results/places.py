"""A folder of results here or in a bucket, as files by name; each of them appears whole.

Addresses are read and written through fsspec (https://filesystem-spec.readthedocs.io), those of S3
by Arrow's client (https://arrow.apache.org/docs/python/filesystems.html): s3fs would pin versions
of packages that others need newer. `s3://bucket/path?endpoint_override=HOST:PORT&scheme=http` names
a server that is not Amazon's.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from effbench.util.errors import UserError
from effbench.util.files import atomic_path

FULL = (errno.ENOSPC, errno.EDQUOT)


class Place(Protocol):
    """Where results are; names are relative, with slashes."""

    def names(self, folder: str, deep: bool = False) -> list[str]:
        """Return the names of the files in a folder, sorted; hidden ones are left out.

        Args:
            folder: Its name; it need not be there.
            deep: Whether those in folders inside it count too.
        """

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the content of files that are there."""

    def get(self, name: str, to: Path) -> None:
        """Copy a file to a path on this machine, in a folder that is there."""

    def put(self, name: str, content: bytes | Path) -> None:
        """Write a file, whole or not at all.

        Args:
            name: What it is called.
            content: What is in it, or a file on this machine with that.

        Raises:
            FileExistsError: When it is there already.
        """

    def called(self, name: str) -> str:
        """Return what a person calls a file."""


def place_of(address: str) -> Place:
    """Return the place at a path or an address with `://`.

    Raises:
        UserError: When nothing here can open such an address.
    """
    return Remote(address) if "://" in address else Local(Path(address).expanduser())


class Local:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self, folder: str, deep: bool = False) -> list[str]:
        """Return the names of the files in a folder; links are none."""
        found = (self.root / folder).glob("**/*" if deep else "*")
        files = (path for path in found if path.is_file() and not path.is_symlink())
        return _shown(path.relative_to(self.root).as_posix() for path in files)

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the content of files."""
        return {name: (self.root / name).read_bytes() for name in names}

    def get(self, name: str, to: Path) -> None:
        """Copy a file to another path."""
        shutil.copyfile(self.root / name, to)

    def put(self, name: str, content: bytes | Path) -> None:
        """Write a file."""
        final = self.root / name
        with atomic_path(final, lambda part: _refuse(final.exists(), name)) as part:
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)

    def called(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.root / name)


class Remote:
    """A folder of any file system that fsspec knows."""

    def __init__(self, address: str) -> None:
        try:
            self.files, self.root = _opened(address)
        except Exception as error:  # of fsspec, Arrow, or a package that fsspec would need
            raise UserError(
                f"{address} cannot be opened: {_line(error)}.",
                "s3://bucket/path needs nothing further; for others, install what fsspec names.",
            ) from None
        self.address = address.partition("?")[0]

    def names(self, folder: str, deep: bool = False) -> list[str]:
        """Return the names of the files in a folder."""
        with self._reached():
            self.files.invalidate_cache()
            with suppress(FileNotFoundError):
                depth = None if deep else 1
                found = self.files.find(f"{self.root}/{folder}", maxdepth=depth)
                return _shown(path[len(self.root) :].lstrip("/") for path in found)
        return []

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the content of files."""
        if not names:
            return {}
        with self._reached():
            found: dict[str, bytes] = self.files.cat([f"{self.root}/{name}" for name in names])
        return {path[len(self.root) :].lstrip("/"): content for path, content in found.items()}

    def get(self, name: str, to: Path) -> None:
        """Copy a file from there."""
        with self._reached():
            self.files.get_file(f"{self.root}/{name}", str(to))

    def put(self, name: str, content: bytes | Path) -> None:
        """Write a file under another name first, so that it is seen when it is whole."""
        final = PurePosixPath(self.root, name)
        part = final.with_name(f".{final.name}.{os.urandom(4).hex()}.part")
        with self._reached():
            _refuse(self.files.exists(str(final)), name)
            self.files.makedirs(str(final.parent), exist_ok=True)
            if isinstance(content, Path):
                self.files.put_file(str(content), str(part))
            else:
                self.files.pipe_file(str(part), content)
            self.files.mv(str(part), str(final))

    def called(self, name: str) -> str:
        """Return the address of a file."""
        return f"{self.address.rstrip('/')}/{name}"

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Say of a place that does not answer which one it is.

        Raises:
            UserError: When that happens.
        """
        try:
            yield
        except (UserError, FileExistsError, FileNotFoundError):
            raise
        except Exception as error:  # each of fsspec's file systems has errors of its own
            if getattr(error, "errno", None) in FULL:  # the disk here
                raise
            raise UserError(
                f"{self.address} cannot be reached: {_line(error)}.",
                "Are the address and the credentials right? What was copied is whole.",
            ) from None


def _opened(address: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    if not address.startswith("s3://"):
        from fsspec.core import url_to_fs

        return url_to_fs(address)
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem

    system, root = FileSystem.from_uri(address)
    return ArrowFSWrapper(system), root.rstrip("/")


def _refuse(there: bool, name: str) -> None:
    if there:
        raise FileExistsError(name)


def _shown(names: Any) -> list[str]:
    return sorted(n for n in names if n and not any(p.startswith(".") for p in n.split("/")))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
