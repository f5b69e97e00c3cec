"""DFloat11 weights that are decoded while others are multiplied, on a CUDA device.

There are two buffers. While the weights in one are used, those that were used next the last time
are decoded into the other, on a stream of their own. Each stream waits for the other wherever a
buffer changes hands; the host waits for neither. On a CPU the order of the work is the same, but
nothing runs at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from effbench.nn.quant.dfloat11 import Scratch, Unit


class Ahead(Scratch):
    """A buffer for the unit that is used, and one for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.next = Scratch()
        self.after: dict[Unit, Unit] = {}
        """Which unit was used after another one."""

    def decoded(self, unit: Unit) -> torch.Tensor:
        """Return the upper halves of a unit's weights, [N] bfloat16, until another one's come."""
        before = self.holds
        if before is unit:
            return super().decoded(unit)
        device = unit.get_buffer("rest").device
        if _overlaps(device):  # what is decoded aside is there before anything that comes now
            torch.cuda.current_stream(device).wait_stream(_aside(device))
        if self.next.holds is unit:
            self.buffer, self.next.buffer = self.next.buffer, self.buffer
            self.holds, self.next.holds = unit, before
        found = super().decoded(unit)
        if before is not None:
            self.after[before] = unit
        follows = self.after.get(unit)
        if follows is not None and follows.sound:
            self._start(follows, device)
        return found

    def _start(self, unit: Unit, device: torch.device) -> None:
        """Decode a unit into the other buffer; its codes were decoded before as they are."""
        own = self.next.room(unit)  # made on this stream, like the codes
        if not _overlaps(device):
            self.next.decoded(unit)
            return
        aside = _aside(device)
        aside.wait_stream(torch.cuda.current_stream(device))  # which may still read the buffer
        with torch.cuda.stream(aside):
            self.next.decoded(unit)
        for tensor in (own, *unit.encoded):  # where they are freed, their memory waits for this
            tensor.record_stream(aside)

    def forget(self) -> None:
        """Have whatever comes next decoded."""
        super().forget()
        self.next.forget()


def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def decoded_ahead(model: torch.nn.Module) -> Iterator[None]:
    """Decode the DFloat11 weights of a model ahead, in the order of the pass before.

    For passes without gradients, one after the other on one stream. It takes a second buffer as
    large as the largest unit.
    """
    units = [module for module in model.modules() if isinstance(module, Unit)]
    before = [unit.scratch for unit in units]
    ahead = Ahead()
    for unit, own in zip(units, before, strict=True):
        own.clear()
        unit.scratch = ahead
    try:
        yield
    finally:
        for unit, own in zip(units, before, strict=True):
            unit.scratch = own
