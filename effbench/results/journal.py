"""The finished items of an evaluation, on disk as they are finished.

An evaluation that is interrupted goes on at the next group of items: no item is computed twice,
and none is lost. A group is one line, written whole; a line that a crash cut off is dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from effbench.api.schema import digest
from effbench.util.files import mendable

K = TypeVar("K")


class Journal:
    """Results by item index; opened again, it holds what was finished before.

    Args:
        path: File to append to; None keeps everything in memory.
        items: Ids of all items, in order. A file of other items is started anew.
    """

    def __init__(self, path: Path | None, items: Sequence[str]) -> None:
        self._path = path
        self._head = {"items": digest(list(items)), "count": len(items)}
        self._count = len(items)
        self._done: dict[int, Any] = {}
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        kept = lines if lines and _parsed(lines[0]) == self._head else []
        for number, line in enumerate(kept[1:], 1):
            group = _parsed(line)
            if not isinstance(group, dict):
                kept = kept[:number]
                break
            self._done |= {int(index): value for index, value in group.items()}
        if not kept:
            kept = [json.dumps(self._head).encode()]
        with mendable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\n".join(kept) + b"\n")

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, index: int) -> bool:
        return index in self._done

    @property
    def complete(self) -> bool:
        """Whether every item is finished."""
        return len(self._done) == self._count

    def add(self, group: Mapping[int, Any]) -> None:
        """Keep the results of a group of items; they are on disk when this returns.

        Args:
            group: From an item's index to its result, a plain JSON value.

        Raises:
            UserError: When the place cannot be written.
        """
        self._done |= group
        if self._path is not None:
            with mendable(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({str(i): v for i, v in group.items()}) + "\n")

    def pending(self, groups: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
        """Yield the groups in which any item is not finished.

        Groups are formed over all items, finished or not, so that what shares a batch does not
        depend on where an evaluation was interrupted, and neither does any rounding.
        """
        return (group for group in groups if any(i not in self._done for i in group))

    def values(self) -> list[Any]:
        """Return the results of all items, in order.

        Raises:
            KeyError: When one is not finished.
        """
        return [self._done[i] for i in range(self._count)]


def pending(
    journals: Mapping[K, Journal], groups: Sequence[Sequence[int]]
) -> Iterator[tuple[Sequence[int], list[K]]]:
    """Yield the groups that are not finished in all journals, with the keys of those that lack it.

    Args:
        journals: Of the same items.
        groups: As for `Journal.pending`.
    """
    for group in groups:
        lacking = [key for key, own in journals.items() if any(i not in own for i in group)]
        if lacking:
            yield group, lacking


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
