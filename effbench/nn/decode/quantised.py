"""A layer's cache of a few last tokens as they are, and of all before them in few bits.

Tokens of a sequence are counted from its first one, padding aside. After T tokens there are

    n = ⌊max(T - w, 0) / g⌋

groups of g tokens in codes (`nn.quant.ranges`), and the other tokens, the last w among them, as
they came. A group of keys has a range for each channel, a group of values ranges for each token,
over c channels each, the largest common divisor of g and D (Liu et al., arXiv 2402.02750). A query
sees the cache as it is when its own token has come in, whatever comes in together with it.
"""

from __future__ import annotations

from functools import partial

import torch

from effbench.nn.decode import coded_attention, entries
from effbench.nn.decode.scratch import LOOKING
from effbench.nn.decode.view import LayerCache, Own, View
from effbench.nn.quant.ranges import Ranges, channels_of, decode, encode


class QuantisedLayer(LayerCache):
    """Keeps the last tokens of each sequence as [B, G, F, D], and earlier ones in groups of codes.

    Args:
        bits: Of a code.
        group: Tokens of a group, g.
        window: w, a query's own token among them.
        undo: Tokens that `crop` can take back: what went into codes since then is kept as it came
            too.
    """

    def __init__(self, bits: int, group: int, window: int, undo: int = 0) -> None:
        super().__init__()
        self.bits, self.group, self.window, self.undo = bits, group, window, undo
        self.length = 0
        """Columns that came in, padding included; `keys` and `values` are the last of them."""
        self.counts = torch.zeros(1, dtype=torch.long)
        """Groups of each sequence, n, [B]; [1] where none is padded."""
        self.packed: tuple[Ranges, Ranges] | None = None
        """Keys [B, G, N, D groups of g] and values [B, G, N, g, D / c groups of c], N the most; G
        and D are their own."""

    def get_seq_length(self) -> int:
        """Return the columns that came in."""
        return self.length

    def kv_bytes(self) -> int:
        """Return the bytes of codes, ranges, and what is kept as it came."""
        return super().kv_bytes() + sum(part.bytes for part in self.packed or ())

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, D] and return what their queries see."""
        assert self.keys is not None and self.values is not None
        self.length += keys.shape[2]
        self.keys = torch.cat([self.keys, keys], dim=-2)
        self.values = torch.cat([self.values, values], dim=-2)
        self._pack()
        view = self._view(keys.shape[2])
        self._forget()
        return view

    # -- places --------------------------------------------------------------------------------

    def _starts(self) -> torch.Tensor:
        """Return the column of each sequence's first token, [B], or [1] where none is padded."""
        assert self.keys is not None
        empty = torch.zeros(1, dtype=torch.long) if self.empty is None else self.empty
        return empty.to(self.keys.device)

    def _groups(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return n after so many tokens."""
        return (tokens - self.window).clamp(min=0) // self.group

    def _least_groups(self, tokens: int) -> int:
        """Return n after so many tokens of which none is padding."""
        return max(tokens - self.window, 0) // self.group

    @property
    def first(self) -> int:
        """The column that `keys` begins with."""
        assert self.keys is not None
        return self.length - self.keys.shape[-2]

    # -- codes ---------------------------------------------------------------------------------

    def _pack(self) -> None:
        """Put the groups into codes that the window has left."""
        if self.empty is None and self._least_groups(self.length) == int(self.counts):
            return
        starts = self._starts()
        before, counts = self.counts.to(starts.device), self._groups(self.length - starts)
        self.counts = counts
        if not (counts > before).any():
            return
        begin, end = int(before.min()), int(counts.max())
        slots = torch.arange(begin, end, device=starts.device)
        fresh = (slots >= before[:, None]) & (slots < counts[:, None])
        tokens = torch.arange(begin * self.group, end * self.group, device=starts.device)
        made = self._encoded(starts[:, None] + tokens - self.first)
        old = self.packed or tuple(Ranges(*(t[:, :, :0] for t in part)) for part in made)
        keys, values = (
            Ranges(*(_merged(a, b, begin, fresh) for a, b in zip(*pair, strict=True)))
            for pair in zip(old, made, strict=True)
        )
        self.packed = keys, values

    def _encoded(self, places: torch.Tensor) -> tuple[Ranges, Ranges]:
        """Return the tokens at places [B or 1, N g] of `keys` in codes.

        Places where there is none give codes that mean nothing.
        """
        assert self.keys is not None and self.values is not None
        index = places.clamp(0, self.keys.shape[2] - 1)[:, None, :, None]
        keys, values = (
            t.gather(2, index.expand(*t.shape[:2], -1, t.shape[3])).unflatten(2, (-1, self.group))
            for t in (self.keys, self.values)
        )
        values = values.unflatten(-1, (-1, channels_of(self.group, values.shape[-1])))
        return encode(keys.transpose(3, 4), self.bits, 3), encode(values, self.bits, 3)

    def _all(
        self, recent: tuple[torch.Tensor, torch.Tensor], step: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all groups and of what is as it came, [B, G, N g + F, D].

        In a step by a kernel where there is one; see `view.turned`.
        """
        assert self.packed is not None
        found = entries.expanded(self.packed, self.bits, self.group, recent) if step else None
        if found is not None:
            return found
        keys, values = (
            torch.cat(pair, dim=2) for pair in zip(self._decoded(), recent, strict=True)
        )
        return keys, values

    def _decoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all groups, [B, G, N g, D]."""
        assert self.packed is not None and self.values is not None
        keys = decode(self.packed[0], self.bits, self.group, self.dtype)
        channels = channels_of(self.group, self.values.shape[3])
        values = decode(self.packed[1], self.bits, channels, self.dtype)
        return keys.transpose(3, 4).flatten(2, 3), values.flatten(4).flatten(2, 3)

    # -- what is seen --------------------------------------------------------------------------

    def _view(self, width: int) -> View:
        """Return what the last `width` queries see."""
        assert self.keys is not None and self.values is not None
        if self.packed is None:
            return View(self.keys, self.values, self.empty)
        if width == 1 and self.empty is None:
            return self._step(self.packed)
        keys, values = self._all((self.keys, self.values), step=width == 1)
        if width > LOOKING and self.final:
            return View(keys, values, answer=partial(self._looked, keys, values, self.first))
        seen, places = self._seen(self.length - width, self.length, self.first)
        return View(keys, values) if seen.all() else View(keys, values, seen=seen, places=places)

    def _step(self, packed: tuple[Ranges, Ranges]) -> View:
        """Return what a single query sees where nothing is padding: all groups, and all after."""
        assert self.keys is not None and self.values is not None
        begin = int(self.counts) * self.group - self.first
        keys, values = self.keys[:, :, begin:], self.values[:, :, begin:]
        if self.attends and coded_attention.applies(self.bits, self.group, keys, values):
            own = partial(self._attended, packed, (keys, values))
            return View(keys, values, direct=own)
        return View(*self._all((keys, values), step=True))

    def _attended(
        self,
        packed: tuple[Ranges, Ranges],
        recent: tuple[torch.Tensor, torch.Tensor],
        query: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        return coded_attention.attended(query, packed, self.bits, self.group, recent, scale)

    def _looked(
        self, keys: torch.Tensor, values: torch.Tensor, first: int, query: torch.Tensor, own: Own
    ) -> torch.Tensor:
        """Return what the queries [B, H, W, D] of the last columns are given, some at a time.

        Those look at what one of them sees: fewer columns, and fewer of them at a time.

        Args:
            keys: Of all groups and of what is as it came, [B, G, N g + F, D].
            values: The same of values.
            first: The column that what is as it came begins with; it may be forgotten by now.
            query: Of the last columns.
            own: The model's attention.
        """
        begin, found = self.length - query.shape[2], []
        for start in range(begin, self.length, LOOKING):
            end = min(start + LOOKING, self.length)
            seen, places = self._seen(start, end, first)
            columns = seen.any(1).any(0).nonzero().flatten()
            shown = keys[:, :, columns], values[:, :, columns], seen[:, :, columns]
            view = View(shown[0], shown[1], seen=shown[2], places=places[:, columns])
            found.append(own(query[:, :, start - begin : end - begin], view))
        return torch.cat(found, dim=1)

    def _seen(self, start: int, end: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which codes and which columns the queries of some columns see, [B or 1, W, N g +
        F], and the places of their tokens, [B or 1, N g + F].

        A query of padding sees itself, for a row of attention with nothing in it is NaN.
        """
        assert self.packed is not None
        starts = self._starts()[:, None]
        own = torch.arange(start, end, device=starts.device)
        coded = self._groups(own + 1 - starts)[..., None] * self.group
        slots = torch.arange(self.packed[0].codes.shape[2] * self.group, device=starts.device)
        columns = torch.arange(first, self.length, device=starts.device)
        later = ((columns - starts)[:, None] >= coded) & (columns <= own[:, None])
        seen = torch.cat([slots < coded, later | (columns == own[:, None])], dim=2)
        behind = (columns - starts).clamp(min=0)
        return seen, torch.cat([slots.expand(len(behind), -1), behind], dim=1)

    def _forget(self) -> None:
        """Keep of what came as it is what is in no code, or `crop` may need again."""
        assert self.keys is not None and self.values is not None
        if self.packed is None:
            return
        if self.empty is None:
            needed = self.group * self._least_groups(self.length - self.undo)
        else:
            starts = self._starts()
            groups = self._groups(self.length - self.undo - starts)
            needed = int((starts + self.group * groups).min())
        drop = needed - self.first
        if drop > 0:  # copies, so that what is dropped is freed
            self.keys, self.values = (t[:, :, drop:].clone() for t in (self.keys, self.values))

    # -- changes -------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: When tokens would have to be as they came again that are in codes alone.
        """
        if not tokens_to_remove or not self.is_initialized:
            return
        length, starts = self.length + tokens_to_remove, self._starts()
        counts = self._groups(length - starts)
        if self.packed is not None and int((starts + self.group * counts).min()) < self.first:
            raise ValueError(f"only the last {self.undo} tokens can be taken back")
        super().crop(tokens_to_remove)
        self.length, self.counts = length, counts
        self._keep_packed(slice(None))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences `beam_idx`, in this order."""
        if self.empty is not None:
            self.counts = self.counts[beam_idx]
        super().reorder_cache(beam_idx)
        self._keep_packed(beam_idx)

    def _keep_packed(self, rows: torch.Tensor | slice) -> None:
        """Keep the codes of some sequences, as many groups as the longest of them has."""
        if self.packed is not None:
            most = int(self.counts.max())
            keys, values = (Ranges(*(t[rows, :, :most] for t in part)) for part in self.packed)
            self.packed = keys, values


def _merged(old: torch.Tensor, made: torch.Tensor, begin: int, fresh: torch.Tensor) -> torch.Tensor:
    """Return groups [B, G, N, ...] with those that are fresh, [B or 1, M], put in from `begin` on.

    Args:
        old: [B, G, N', ...], N' at least `begin`.
        made: [B, G, M, ...].
        begin: Where the first of `made` belongs.
        fresh: Which of `made` are to be taken.
    """
    kept = torch.zeros_like(made)
    kept[:, :, : old.shape[2] - begin] = old[:, :, begin:]
    chosen = fresh.view(fresh.shape[0], 1, -1, *[1] * (made.ndim - 3))
    return torch.cat([old[:, :, :begin], torch.where(chosen, made, kept)], dim=2)
