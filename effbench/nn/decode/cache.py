"""Key/value caches in buffers of a fixed size, whose addresses a captured step can rely on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.cache_utils import Cache, DynamicLayer

from effbench.nn.decode.scratch import BLOCK


def held_bytes(cache: Cache) -> int:
    """Return the bytes of all that a cache of transformers holds.

    An entry that holds something else than keys and values has a `kv_bytes` of its own.
    """
    return sum(_entry_bytes(entry) for entry in cache.layers)


def _entry_bytes(entry: Any) -> int:
    if hasattr(entry, "kv_bytes"):
        return int(entry.kv_bytes())
    tensors = [t for t in (entry.keys, entry.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


class StaticLayer(DynamicLayer):
    """Keys and values of one layer in buffers [B, H_kv, capacity, D] of which a part is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.lane = 0
        """Layers of one lane run in the same steps, so that they are always equally long."""

    @property
    def capacity(self) -> int:
        """Positions that there is room for."""
        return 0 if self.keys is None else int(self.keys.shape[2])

    @property
    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, the room to spare included."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def reserve(self, like: torch.Tensor, capacity: int) -> None:
        """Make room for `capacity` positions of keys like [B, H_kv, *, D], keeping what is there.

        What is not in use is zero, so that a masked product with it is not NaN.
        """
        batch, heads, _, width = like.shape
        fresh = [like.new_zeros(batch, heads, capacity, width) for _ in range(2)]
        if self.length:
            for new, old in zip(fresh, self.buffers, strict=True):
                new[:, :, : self.length] = old[:, :, : self.length]
        self.keys, self.values = fresh
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values [B, H_kv, P, D] after those that are there, and return all."""
        batch, begin = key_states.shape[0], self.length
        end = begin + key_states.shape[2]
        keys = self.keys
        if keys is None or keys.shape[0] != batch or keys.shape[2] < end:
            self.reserve(key_states, end + BLOCK)
        self.length = end
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        if begin == 0:
            return key_states, value_states
        keys, values = self.buffers
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return the positions in use."""
        return self.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions."""
        self.length = max(0, self.length + min(0, tokens_to_remove))


class StaticValues(StaticLayer):
    """Values of one layer alone; its keys have no width."""

    def reserve(self, like: torch.Tensor, capacity: int) -> None:
        """Make room for `capacity` positions of values like [B, H_kv, *, D]; see `StaticLayer`."""
        batch, heads, _, width = like.shape
        fresh = like.new_zeros(batch, heads, capacity, width)
        if self.length:
            fresh[:, :, : self.length] = self.buffers[1][:, :, : self.length]
        self.keys, self.values = like.new_zeros(batch, heads, capacity, 0), fresh
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put a prompt's values [B, H_kv, P, D] away, and return them."""
        batch, _, length, _ = value_states.shape
        if self.values is None or self.values.shape[0] != batch or self.capacity < length:
            self.reserve(value_states, length + BLOCK)
        self.length = length
        self.buffers[1][:, :, :length] = value_states
        return key_states, value_states


Stored = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Keys and values [B, H_kv, T, D] and which of them a sequence sees, [B, 1, 1, T]; None for all."""
Store = Callable[[StaticLayer, torch.Tensor, torch.Tensor], Stored]
"""Puts the new key and value of a layer away and returns all that the query may look at."""


@runtime_checkable
class Placing(Protocol):
    """A `Store` whose places lie on the device, for a kernel that stores by itself."""

    starts: torch.Tensor
    """The first position that each sequence sees, [B] int64."""

    def place(self, layer: StaticLayer) -> torch.Tensor:
        """Return where the next key and value of a layer go, [1] int64."""
        ...
