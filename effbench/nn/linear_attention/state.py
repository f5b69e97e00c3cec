"""A layer's entry of a cache that holds a state in the place of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from effbench.util.errors import UserError


class StateLayer(CacheLayerMixin):
    """The state [B, G, d, d] of one layer, of one size however many tokens it has seen.

    It counts them, for positions and masks are taken from the first entry of a cache.
    """

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: torch.Tensor | None = None
        self.length = 0

    def put(self, state: torch.Tensor, tokens: int) -> None:
        """Keep the state after so many further tokens."""
        self.state, self.length = state, self.length + tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the state comes from the layer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse keys and values.

        Raises:
            TypeError: Always.
        """
        raise TypeError("this layer keeps a state, and neither keys nor values")

    def get_seq_length(self) -> int:
        """Return the tokens seen, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a mask of further tokens has, and where they begin."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Return that there is no end."""
        return -1

    def kv_bytes(self) -> int:
        """Return the bytes of the state."""
        return 0 if self.state is None else self.state.numel() * self.state.element_size()

    # -- changes -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.length = None, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back.

        Raises:
            UserError: When there are any to take back.
        """
        if tokens_to_remove:
            raise UserError(
                "A state has no places: what it has read cannot be taken back.",
                "Decode without drafts.",
            )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences `beam_idx`, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`."""
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence so many times."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)


def state_of(cache: Cache, place: int) -> StateLayer:
    """Return a layer's entry, put there where the cache has none yet.

    Args:
        cache: Growing, as those of transformers' `DynamicCache`.
        place: The layer's.

    Raises:
        UserError: When keys and values are kept there, as a cache of fixed size does.
    """
    layers: list[Any] = cache.layers
    while len(layers) <= place:
        layers.append(StateLayer() if len(layers) == place else DynamicLayer())
    if type(layers[place]) is DynamicLayer and not layers[place].is_initialized:
        layers[place] = StateLayer()
    found = layers[place]
    if not isinstance(found, StateLayer):
        raise UserError(
            f"Layer {place} keeps a state, and a {type(found).__name__} has no room for one.",
            "Decode with a growing cache, which keeps everything.",
        )
    return found
