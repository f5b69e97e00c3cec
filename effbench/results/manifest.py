"""What a run wrote, by file: a file that is no longer that is not read, and its name is told.

`manifest.jsonl` gets a line with the hash of a file just before the file takes its place, so that
after a kill at any moment the file that is there is one of those that were announced. Logs, which
grow line by line, have a sum in each line instead. Folders of runs that were made before there was
a manifest are read as they are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from effbench.util.errors import UserError
from effbench.util.files import mendable
from effbench.util.seals import Chain, hash_of, mend_log, read_log

NAME = "manifest.jsonl"
ANEW = "Put it back from a copy, or give the command of that run again with --fresh."
SMALL_BYTES = 1 << 20
"""Files up to this size are hashed whenever they are looked at; of others the size is compared."""


def damaged(path: Path, how: str, hint: str = ANEW) -> UserError:
    """Return what there is to say of a file of a run that is not what was written."""
    return UserError(f"{path} cannot be read: {how}.", hint)


class Manifest:
    """What is known of the files of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / NAME

    def begin(self) -> None:
        """Announce what an earlier version left of an unfinished run, which had no manifest."""
        if self.path.exists():
            return
        for pattern in ("checkpoint.pt", "parts/*", "evaluations/*", "artefact/**/*"):
            for file in sorted(self.folder.glob(pattern)):
                if file.is_file() and file.suffix != ".items":
                    self.announce(file.relative_to(self.folder).as_posix(), file)

    def announce(self, name: str, content: Path) -> None:
        """Add what is about to stand under a name; it is on the disk when this returns.

        Args:
            name: The file's place in the run folder, with slashes.
            content: Where its content is now.

        Raises:
            UserError: When the place cannot be written, or the manifest is damaged.
        """
        line = {"file": name, "bytes": content.stat().st_size, "hash": hash_of(content)}
        chain = Chain(self.path)
        with mendable(self.path):
            mend_log(self.path)
            self._lines(chain)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(chain.seal(json.dumps(line)) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def has(self, name: str) -> bool:
        """Whether a file was announced."""
        return name in self._known()

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files that were announced, in a folder or at all."""
        return sorted(
            name for name in self._known() if name.startswith(f"{folder}/" * bool(folder))
        )

    def check(self, name: str, whole: bool = True, hint: str = ANEW) -> None:
        """Make sure that a file is what the run wrote.

        Args:
            name: As for `announce`.
            whole: Whether a large file is hashed too.
            hint: What to do when it is not.

        Raises:
            UserError: When it is not, or cannot be read.
        """
        path, known = self.folder / name, self._known()
        if not known:
            return
        if not path.is_file():
            raise damaged(path, "it is no file" if path.exists() else "it is gone", hint)
        try:
            size = path.stat().st_size
            hashes = {sum_ for bytes_, sum_ in known.get(name, ()) if bytes_ == size}
            if hashes and (whole or size <= SMALL_BYTES):
                hashes &= {hash_of(path)}
        except OSError as error:
            raise damaged(path, str(error.strerror), hint) from None
        if not hashes:
            raise damaged(path, f"it is not what run {self.folder.name} wrote", hint)

    def hash(self) -> str:
        """Return the hash of the manifest; empty when there is none."""
        return hash_of(self.path) if self.path.is_file() else ""

    def _known(self) -> dict[str, list[tuple[int, str]]]:
        found: dict[str, list[tuple[int, str]]] = {}
        for line in self._lines(Chain(self.path)):
            found.setdefault(line["file"], []).append((line["bytes"], line["hash"]))
        return found

    def _lines(self, chain: Chain) -> list[dict[str, Any]]:
        try:
            return list(read_log(self.path, chain))
        except (ValueError, OSError) as error:
            raise damaged(self.path, str(error)) from None
