"""Hashes that tell whether what was written is still there: of files, of texts, of lines of a log.

They find damage, not malice: who can write a file can write its hash too.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 24
"""Bytes of a file that one thread hashes at a time."""
TEXT_DIGITS, LINE_DIGITS = 32, 16
SUM = re.compile(rb', "sum": "([0-9a-f]{16})"\}$')
"""What `Chain.sealed` puts at the end of a line."""


def hash_of(path: Path) -> str:
    """Return a hash of a file's content: BLAKE2b over that of each chunk, on all cores.

    Raises:
        OSError: When it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= CHUNK_BYTES:
            return _digest(_digest(file.read()).encode())
        from concurrent.futures import ThreadPoolExecutor  # lists of runs start without it

        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            view = memoryview(content)
            chunks = [view[i : i + CHUNK_BYTES] for i in range(0, size, CHUNK_BYTES)]
            with ThreadPoolExecutor() as threads:
                found = "".join(threads.map(_digest, chunks))
            for chunk in chunks:
                chunk.release()
            view.release()
    return _digest(found.encode())


def seal_of(text: str) -> str:
    """Return a hash of a text."""
    return _digest(text.encode())


def sealed(text: str, name: str) -> str:
    """Return a text below a first line with its hash; `unsealed` reads it.

    Args:
        text: What is to be kept.
        name: Of the file, so that it holds in no other one's place.
    """
    return f"{seal_of(name + '/' + text)}\n{text}"


def unsealed(text: str, name: str) -> str:
    """Return what `sealed` was given with this name.

    Raises:
        ValueError: When it is no longer that.
    """
    seal, _, rest = text.partition("\n")
    if seal != seal_of(name + "/" + rest):
        raise ValueError("it is not what was written")
    return rest


def _digest(content: bytes | memoryview, digits: int = TEXT_DIGITS) -> str:
    return hashlib.blake2b(content, digest_size=digits // 2).hexdigest()


class Chain:
    """Ties each line of a log, a JSON object, to its log and to all lines before it.

    A line that is changed, left out, moved or taken from another log no longer fits. Lines that
    earlier versions wrote have no sum, and stand before all that have one.

    Args:
        path: The log.
        names: How many of the last names of the path enter all sums.
        bare: Whether lines without a sum are taken at all.
    """

    def __init__(self, path: Path, names: int = 2, bare: bool = True) -> None:
        self._state = "/".join(path.parts[-names:]).encode()
        self._begun = not bare

    def seal(self, line: str) -> str:
        """Return the next line of the log, a JSON object with at least one key, with its sum."""
        self._begun = True
        return f'{line[:-1]}, "sum": "{self._next(line.encode())}"}}'

    def read(self, line: bytes) -> str:
        """Return the next line of the log without its sum.

        Raises:
            ValueError: When it is not the line that was written there.
        """
        found = SUM.search(line)
        bare = line[: found.start()] + b"}" if found else line
        if (found is None and self._begun) or (found and self._next(bare) != found[1].decode()):
            raise ValueError("it is not what was written")
        if found is None:
            self._next(bare)
        self._begun = found is not None
        return bare.decode()

    def _next(self, line: bytes) -> str:
        total = _digest(self._state + b"\0" + line, LINE_DIGITS)
        self._state = total.encode()
        return total


def read_log(path: Path, chain: Chain | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a log without their sums; a last one that a crash cut off is left out.

    Args:
        path: The log; it need not be there.
        chain: Goes on behind the last line; for who adds some.

    Raises:
        ValueError: That names the first line that is not as it was written.
        OSError: When it cannot be read.
    """
    chain = chain or Chain(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(chain.read(line))
            if not isinstance(values, dict):
                raise ValueError
        except ValueError:
            raise ValueError(f"line {number} is not as it was written") from None
        yield values


def mend_log(path: Path) -> None:
    """Cut off a last line that a crash left unfinished, so that the next one stands alone."""
    if path.is_file():
        with path.open("rb+") as file:
            content = file.read()
            if not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
