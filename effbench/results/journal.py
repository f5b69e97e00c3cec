"""The finished items of an evaluation, on disk as they are finished.

An evaluation that is interrupted goes on at the next group of items: no item is computed twice,
and none is lost. A group is one line, written whole; a line that a crash cut off is dropped. So is
one that is damaged, with all that follow: their items are evaluated again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from effbench.api.schema import digest
from effbench.util.files import mendable, write_atomic
from effbench.util.seals import Chain, read_log

K = TypeVar("K")


class Journal:
    """Results by item index; opened again, it holds what was finished before.

    Args:
        path: File to append to; None keeps everything in memory.
        items: Ids of all items, in order. A file of other items, or of another place, is started
            anew.
    """

    def __init__(self, path: Path | None, items: Sequence[str]) -> None:
        self._path = path
        self._head = {"items": digest(list(items)), "count": len(items)}
        self._count = len(items)
        self._done: dict[int, Any] = {}
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        kept = list(_whole(path, self._head)) or [self._head]
        for group in kept[1:]:
            self._done |= {int(index): value for index, value in group.items()}
        self._chain = _chain(path)
        lines = (self._chain.seal(json.dumps(line)) + "\n" for line in kept)
        write_atomic(path, "".join(lines))

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
                line = json.dumps({str(i): v for i, v in group.items()})
                file.write(self._chain.seal(line) + "\n")

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


def _chain(path: Path) -> Chain:
    return Chain(path, names=3, bare=False)  # run, evaluations, file


def _whole(path: Path, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the head and the groups of a file up to the first damaged line; none of other items."""
    with suppress(ValueError, OSError):
        for number, line in enumerate(read_log(path, _chain(path))):
            if number == 0 and line != head:
                return
            yield line
