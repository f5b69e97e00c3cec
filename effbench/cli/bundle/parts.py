"""Files as numbered parts of a stated size: one tar, cut anywhere."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from effbench.util.errors import UserError
from effbench.util.sizes import UNITS

LEAST_BYTES = 1 << 20
"""The smallest size of a part."""
MOST_PARTS = 999


@dataclass(frozen=True)
class Piece:
    """A file of a bundle."""

    name: str
    """Relative to the bundle's folder, with slashes."""
    bytes: int
    sha256: str


def parse_size(text: str) -> int:
    """Return a size in bytes: `60MiB`, `60M` (the same), `63MB`, or a plain number.

    Raises:
        UserError: When it is no size, or under one MiB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if not found or found[2].lower() not in UNITS:
        raise UserError(f"{text!r} is not a size.", "For example: 60MiB, 700MB or 4GiB.")
    size = int(float(found[1]) * UNITS[found[2].lower()])
    if size < LEAST_BYTES:
        raise UserError(f"A part of {text} is too small.", "The least is 1MiB.")
    return size


def piece(folder: Path, path: Path) -> Piece:
    """Return what is to be known of a file in `folder`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Piece(path.relative_to(folder).as_posix(), path.stat().st_size, digest)


def write_parts(files: Iterable[Path], root: Path, folder: Path, size: int) -> list[Piece]:
    """Write `files` as one tar into `part-NNN-of-NNN`, each of at most `size` bytes.

    Args:
        files: What to write.
        root: What their names in the tar are relative to.
        folder: Where the parts go.
        size: Most bytes of a part.

    Raises:
        UserError: When it would take more than 999 parts.
    """
    paths = list(files)
    total = sum(_in_tar(path) for path in paths) + tarfile.RECORDSIZE
    if -(-total // size) > MOST_PARTS:
        least = -(-total // MOST_PARTS // 2**20)
        raise UserError(
            f"That would take more than {MOST_PARTS} parts.", f"The least --part-size: {least}MiB."
        )
    writer = _Cut(folder, size)
    with tarfile.open(fileobj=cast(BinaryIO, writer), mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for path in paths:
            tar.add(path, path.relative_to(root).as_posix(), recursive=False, filter=_anonymous)
    writer.close()
    return writer.named()


def write_archive(folder: Path, name: str, target: Path) -> None:
    """Write a folder as `target`, a gzipped tar in which it is called `name`.

    The same files give the same bytes.
    """
    import gzip

    with target.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
        stream = cast(BinaryIO, packed)
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                inside = path.relative_to(folder).as_posix()
                tar.add(path, f"{name}/{inside}", recursive=False, filter=_anonymous)


def _in_tar(path: Path) -> int:
    return 3 * tarfile.BLOCKSIZE + -(-path.stat().st_size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = 0
    info.mode = 0o644
    return info


class _Cut:
    """A stream into numbered files of at most `size` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.pieces: list[Piece] = []
        self.file: BinaryIO | None = None
        self.room = 0

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if not self.room:
                self._next()
            now = view[: self.room]
            assert self.file is not None
            self.file.write(now)
            self.digest.update(now)
            self.room -= len(now)
            view = view[len(now) :]
        return len(data)

    def _next(self) -> None:
        self.close()
        self.path = self.folder / f"part-{len(self.pieces) + 1:03}"
        self.file, self.room, self.digest = self.path.open("wb"), self.size, hashlib.sha256()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            found = Piece(self.path.name, self.size - self.room, self.digest.hexdigest())
            self.pieces.append(found)
            self.file = None

    def named(self) -> list[Piece]:
        """Give every part its final name, now that their number is known."""
        done = []
        for found in self.pieces:
            name = f"{found.name}-of-{len(self.pieces):03}"
            (self.folder / found.name).rename(self.folder / name)
            done.append(Piece(name, found.bytes, found.sha256))
        return done
