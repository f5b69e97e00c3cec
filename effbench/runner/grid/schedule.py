"""Which run of a grid begins when: one after another, or several at once as far as there is room.

No run is begun twice: what another process is on is left for the end, and runs of one key are one.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache

from effbench.results.sweeps import Cell
from effbench.runner.grid.room import Need, Room, Share
from effbench.runner.grid.screen import Screen
from effbench.runner.local import Hands
from effbench.runner.signals import ASKED, handled

POLL_SECONDS = 0.3

Perform = Callable[[Cell, Hands], None]
"""Runs one run to its end, and fills in what came of it."""


@dataclass
class Schedule:
    """The runs of a grid that are to be run here."""

    cells: Sequence[Cell]
    """All of them, those that are done or cannot be run among them."""
    held: Callable[[Cell], bool]
    """Whether another process is on a run."""
    perform: Perform
    screen: Screen
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    """Of the runs at work, where signals are passed on to them."""
    stopped: bool = False
    """Whether no further run is to begin."""

    @property
    def over(self) -> bool:
        """Whether nothing is left to begin."""
        return self.stopped or not any(cell.state == "waiting" for cell in self.cells)

    def free(self) -> Iterator[Cell]:
        """Yield the runs that could begin now, in order."""
        at_work = {cell.key for cell in self.cells if cell.state == "running"}
        for cell in self.cells:
            if cell.state == "waiting" and cell.key not in at_work and not self.held(cell):
                yield cell

    def in_turn(self) -> None:
        """Run one after another."""
        while not self.over:
            cell = next(self.free(), None)
            if cell is None:
                self.screen.say_once("Waiting for runs that another process is on.")
                time.sleep(POLL_SECONDS)
                continue
            self._begin(cell)
            self.perform(cell, Hands(listen=self.screen.listener(cell)))
            self._ended(cell)

    def side_by_side(self, jobs: int, room: Room, need: Callable[[Cell], Need | None]) -> None:
        """Run several at once.

        Args:
            jobs: Most of them.
            room: What they share.
            need: What a run takes of it.
        """
        running: dict[Future[None], tuple[Cell, Share]] = {}
        need = cache(need)
        with ThreadPoolExecutor(jobs) as pool, handled((signal.SIGINT, *ASKED), self._stop):
            while running or not self.over:
                while len(running) < jobs and (found := self._fitting(room, need)):
                    self._begin(found[0])
                    running[pool.submit(self.perform, found[0], self._hands(*found))] = found
                if not running:
                    time.sleep(POLL_SECONDS)
                for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                    cell, share = running.pop(future)
                    room.give_back(share)
                    future.result()
                    self._ended(cell)

    def _fitting(
        self, room: Room, need: Callable[[Cell], Need | None]
    ) -> tuple[Cell, Share] | None:
        """Return the first run that there is room for, with its share."""
        for cell in () if self.stopped else self.free():
            if share := room.take(need(cell)):
                return cell, share
        return None

    def _hands(self, cell: Cell, share: Share) -> Hands:
        return Hands(share.environment, self.screen.listener(cell), self._note)

    def _note(self, process: subprocess.Popen[str]) -> None:
        self.processes.append(process)
        if self.stopped:
            process.send_signal(signal.SIGTERM)

    def _begin(self, cell: Cell) -> None:
        cell.state, cell.begun = "running", time.time()
        self.screen.began(cell)

    def _ended(self, cell: Cell) -> None:
        """Show what came of a run, for the others of its key too."""
        self.stopped = self.stopped or cell.state == "interrupted"
        self.screen.ended(cell)
        for other in self.cells:
            if other.state == "waiting" and other.key == cell.key and not self.stopped:
                other.state, other.value, other.error = cell.state, cell.value, cell.error

    def _stop(self, number: int, frame: object) -> None:
        """Begin no further run and ask those at work to save and end; a second Ctrl-C ends them."""
        passed = number if self.stopped else signal.SIGTERM
        self.stopped = True
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(passed)
