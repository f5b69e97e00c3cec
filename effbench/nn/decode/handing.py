"""Entries of a cache that make something of keys and values, and leave holding it to others."""

from __future__ import annotations

import torch

from effbench.nn.decode.view import LayerCache, View


class KeepingLayer(LayerCache):
    """Keeps all keys and values, [B, G, S, D]."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, D] and return what their queries see."""
        assert self.keys is not None and self.values is not None
        if self.get_seq_length():
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return View(keys, values, self.empty)


class HandingLayer(LayerCache):
    """Hands on what it makes of keys and values.

    Args:
        inner: Holds it.
    """

    def __init__(self, inner: LayerCache) -> None:
        super().__init__()
        self.inner = inner

    def hand_on(self, keys: torch.Tensor, values: torch.Tensor, empty: torch.Tensor | None) -> View:
        """Return what the other entry shows of keys and values; `empty` is that of the first."""
        if not self.inner.is_initialized:
            self.inner.lazy_initialization(keys, values)
            self.inner.empty = empty
        return self.inner.append(keys, values)

    def get_seq_length(self) -> int:
        """Return the columns that are held."""
        return self.inner.get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: When the other entry cannot take them back.
        """
        self.inner.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences `beam_idx`, in this order."""
        self.inner.reorder_cache(beam_idx)

    def kv_bytes(self) -> int:
        """Return the bytes of all that is held."""
        return self.inner.kv_bytes()
