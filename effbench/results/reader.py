"""The records of a folder, each read once by whoever asks for many of them in several places."""

from __future__ import annotations

from pathlib import Path

from effbench.results.records import Record, as_now, read


class Reader:
    """Records by key, with the fields of their specs that came since they were written.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[tuple[str, bool], Record] = {}

    def has(self, key: str) -> bool:
        """Whether there is a record of a run."""
        return bool(key) and self._path(key).is_file()

    def of(self, key: str, outcomes: bool = True) -> Record:
        """Return the record of a run, without its outcomes where they are not wanted.

        Raises:
            UserError: As `records.read`.
        """
        if (key, True) in self._found:
            return self._found[key, True]
        if (key, outcomes) not in self._found:
            [self._found[key, outcomes]] = as_now([read(self._path(key), outcomes)])
        return self._found[key, outcomes]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"
