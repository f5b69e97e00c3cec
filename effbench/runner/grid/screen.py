"""What a person sees of a grid at work: an overview that is drawn anew, or plain lines.

In a terminal the bars of the runs are the last lines of theirs in the overview.
"""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from effbench.report.grid import at_work, duration, named, varied
from effbench.results.sweeps import Cell
from effbench.util.wrap import wrapped, write

if TYPE_CHECKING:
    from rich.live import Live

KEPT = 20
"""Last lines of a run that are shown when it fails without a reason."""


class Screen:
    """Shows a grid while it runs.

    Args:
        cells: Its runs.
        jobs: Most of them at once.
        live: Whether to draw an overview; None does so in a terminal.
    """

    def __init__(self, cells: Sequence[Cell], jobs: int, live: bool | None = None) -> None:
        self._cells, self._jobs = cells, jobs
        self._own = varied(cells)
        self._drawn = sys.stderr.isatty() if live is None else live
        self._live: Live | None = None
        self._tails: dict[int, deque[str]] = defaultdict(lambda: deque(maxlen=KEPT))
        self._said: set[str] = set()

    def __enter__(self) -> Screen:
        if self._drawn:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(
                console=Console(stderr=True),
                get_renderable=self._drawing,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def listener(self, cell: Cell) -> Callable[[str], None] | None:
        """Return who hears what a run says; None where it may write itself."""
        alone = self._jobs == 1 and not self._drawn
        return None if alone else partial(self._hear, cell)

    def began(self, cell: Cell) -> None:
        """Show that a run begins."""
        if not self._drawn:
            self._say(f"begun   {named(cell, self._own)}")

    def ended(self, cell: Cell) -> None:
        """Show what came of a run; why it failed stays on the screen."""
        if cell.state == "failed":
            self._say(f"failed  {named(cell, self._own)}: {cell.error}")
            if cell.error.startswith("exit status"):
                self._say("\n".join(f"    {line}" for line in self._tails[cell.number]))
        elif not self._drawn:
            took = f"  {duration(cell.seconds)}" if cell.seconds else ""
            self._say(f"{cell.state:6}  {named(cell, self._own)}{took}")
        self._tails.pop(cell.number, None)

    def say_once(self, text: str) -> None:
        """Say something that is not to be said again."""
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _say(self, text: str) -> None:
        if self._live:
            self._live.console.print(wrapped(text), markup=False, highlight=False, soft_wrap=True)
        else:
            write(text)

    def _hear(self, cell: Cell, line: str) -> None:
        cell.said = line
        self._tails[cell.number].append(line)
        if not self._drawn:
            self._say(f"[{cell.key[:8]}] {line}")

    def _drawing(self) -> Any:
        from rich.text import Text

        size = shutil.get_terminal_size()
        lines = at_work(self._cells, self._jobs, size.columns - 1)
        return Text("\n".join(lines[: size.lines - 2]), no_wrap=True)
