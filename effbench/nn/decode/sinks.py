"""A layer's cache of the first tokens and the last ones, keys not turned."""

from __future__ import annotations

import torch

from effbench.nn.decode.view import LayerCache, View


class SinkLayer(LayerCache):
    """Keeps n sinks and a window of w tokens of each sequence, [B, G, n + w, D].

    Until a sequence has n + w tokens it keeps all of them. Each query sees its own sinks and the
    window that ends with its own token, whatever came in together with it.

    Args:
        sinks: n.
        window: w, a query's own token among them.
        undo: How many of the tokens that leave the window are kept, for `crop`.
    """

    is_sliding = False

    def __init__(self, sinks: int, window: int, undo: int = 0) -> None:
        super().__init__()
        self.sinks, self.room, self.undo = sinks, sinks + window, undo
        self.lost = False
        """Whether a token has been forgotten."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, D] and return what their queries see."""
        assert self.keys is not None and self.values is not None
        before, new = self.get_seq_length(), keys.shape[2]
        if new == 1 and before == self.room and self.empty is None and not self.undo:
            return self._moved_on(keys, values)
        if before:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        view = self._view(keys, values, before, new)
        self._keep(keys, values)
        return view

    def _moved_on(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in one token [B, G, 1, D] where the window is full: what is seen is what is kept."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = (
            torch.cat([old[:, :, : self.sinks], old[:, :, self.sinks + 1 :], new], dim=2)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        self.lost = True
        return View(self.keys, self.values)

    def _view(self, keys: torch.Tensor, values: torch.Tensor, before: int, new: int) -> View:
        least = 0 if self.empty is None else int(self.empty.min())
        whole = min(max(self.room - before + least, 0), new)
        if whole == new:
            return View(keys, values, self.empty)
        if new == 1 and self.empty is None:
            return View(*(self._ends(t, self.room) for t in (keys, values)))
        ends = torch.arange(before + whole, before + new, device=keys.device)
        return View(keys, values, self.empty, self._columns(ends, self.room))

    def _columns(self, ends: torch.Tensor, room: int) -> torch.Tensor:
        """Return the columns of sinks and window that end with each of some columns, [B, U, room].

        Columns that are empty, or before the first one, stand where a sequence is shorter.
        """
        places = torch.arange(room, device=ends.device)
        columns = (ends[:, None] - (room - 1) + places)[None]
        empty = ends.new_zeros(1) if self.empty is None else self.empty
        long = ends[None, :, None] - empty[:, None, None] >= room
        sink = long & (places < self.sinks)
        return torch.where(sink, empty[:, None, None] + places, columns)

    def _ends(self, states: torch.Tensor, room: int) -> torch.Tensor:
        """Return the sinks and the last of [B, G, S, D], `room` columns in all."""
        last = states[:, :, states.shape[2] - room + self.sinks :]
        return torch.cat([states[:, :, : self.sinks], last], dim=2)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep of [B, G, S, D] what later queries see, and what `crop` may need."""
        room, length = self.room + self.undo, keys.shape[2]
        self.keys, self.values = keys, values
        if length <= room:
            return
        if self.empty is None:
            self.keys, self.values = (self._ends(t, room) for t in (keys, values))
            self.lost = True
            return
        ends = torch.full((1,), length - 1, device=keys.device)
        columns = self._columns(ends, room)[:, 0]
        index = columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys, self.values = (t.gather(2, index) for t in (keys, values))
        self.lost |= bool((length - self.empty > room).any())
        self.empty = (self.empty - (length - room)).clamp(min=0)
        if not self.empty.any():
            self.empty = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: When tokens that would be in the window again are gone.
        """
        left = self.get_seq_length() + min(0, tokens_to_remove)
        if self.lost and left < self.room:
            raise ValueError(f"only the last {self.undo} tokens can be taken back")
        super().crop(tokens_to_remove)
