"""What a stretch of queries sees of a layer's cache, whatever the cache keeps.

Blocks run through their own modules: a module projects, hands keys and values to its entry of the
cache, and gives what comes back to an attention function, as all of transformers' do. So a cache
that forgets, moves or compresses needs nothing of the modules, and a new module nothing of the
caches: between the two stands the `View` that the entry made.

A cache may keep keys as they were projected, and have them turned at their places in the cache.
Then the modules turn by an angle of zero, which changes no bit, and `attend` does the turning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward, rotate_half

from effbench.nn.decode import entries
from effbench.nn.decode.scratch import GATHERED
from effbench.util.errors import UserError

Own = Callable[[torch.Tensor, "View"], torch.Tensor]
"""From queries [B, H, W, D] and what they see to what the model's attention makes, [B, W, H, D]."""
Answer = Callable[[torch.Tensor, Own], torch.Tensor]
"""From queries [B, H, W, D] and that attention to what they are given, [B, W, H, D]."""
NAME = "effbench_view"
"""Under which transformers knows `attend`."""


@dataclass(frozen=True)
class View:
    """Columns of keys and values, in the order of time, and which of them each query sees.

    The W queries belong to the last W columns. A key's place is its rank among what a query sees,
    counted from 0; a query has the place of its own key, the last one.
    """

    keys: torch.Tensor
    """[B, G, S, D]."""
    values: torch.Tensor
    """[B, G, S, D], or [B, G, S, r] where they are coordinates."""
    empty: torch.Tensor | None = None
    """Columns on the left with nothing in them, [B]; None where there are none."""
    chosen: torch.Tensor | None = None
    """For each of the last U queries the columns that it sees, [B or 1, U, T], the last one its
    own; columns that are empty are not seen. Earlier queries see all up to their own."""
    seen: torch.Tensor | None = None
    """Which columns each query sees, [B or 1, W, S] bool; nothing else then says so, and columns
    may lie in any order."""
    places: torch.Tensor | None = field(default=None, kw_only=True)
    """With `seen`: the place of each column, [B or 1, S], for keys that are not turned yet."""
    expand: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, kw_only=True)
    """From mixed coordinates [B, W, H, r] to mixed values [B, W, H, D]; None where values are no
    coordinates."""
    answer: Answer | None = field(default=None, kw_only=True)
    """What an entry makes of the queries themselves, where these decide what it keeps; None where
    the columns say all."""
    direct: Callable[[torch.Tensor, float], torch.Tensor] | None = field(default=None, kw_only=True)
    """From the queries of a step [B, H, 1, D], and what scores are multiplied by, to what they are
    given [B, 1, H, D], where an entry attends by itself; the columns are then but a part."""

    def of_whole(self) -> View:
        """Return the part of the queries that see all columns up to their own."""
        later = 0 if self.chosen is None else self.chosen.shape[1]
        end = self.keys.shape[2] - later
        return View(self.keys[:, :, :end], self.values[:, :, :end], self.empty)


class LayerCache(DynamicLayer):
    """A layer's entry of a cache that gives views.

    A subclass has `append`, and what of `crop` and `reorder_cache` the base does not do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.view: View | None = None
        """What the last keys and values to come in see, until their queries have looked."""
        self.empty: torch.Tensor | None = None
        """Columns on the left of each sequence with nothing in them, [B]; None for none at all."""
        self.prompt = 0
        """Columns of the prompt, padding included, all of which come in together."""
        self.final = True
        """Whether queries look at what it shows, and nobody makes something of that before."""
        self.attends = False
        """Whether views may be `direct`: attention is softmax over scaled products and no more."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        """Take in keys and values [B, G, W, D] and return what their queries see."""
        raise NotImplementedError

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in keys and values, as a module of transformers gives them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.view = self.append(key_states.contiguous(), value_states.contiguous())
        return self.view.keys, self.view.values

    def pad(self, starts: torch.Tensor) -> None:
        """Note how many columns of the prompt are padding, on its left, [B]."""
        if not self.is_initialized:
            self.empty = starts

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the sequences `beam_idx`, in this order."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.empty = None if self.empty is None else self.empty[beam_idx]

    def kv_bytes(self) -> int:
        """Return the bytes of all that is kept."""
        held = [t for t in (self.keys, self.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in held)


@dataclass
class Stretch:
    """One pass of some tokens through some blocks."""

    cache: Cache
    kind: str
    """The attention of the model."""
    angles: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosine and sine of every place, [places, D]; None where keys are kept turned."""

    def take(self, keys: torch.Tensor) -> View:
        """Return the view to which the keys that a module looks at belong.

        Its entry lets go of it, for it may hold more than the entry keeps.
        """
        for layer in self.cache.layers:
            view = getattr(layer, "view", None)
            if view is not None and view.keys is keys:
                layer.view = None  # type: ignore[union-attr]
                return view
        raise RuntimeError("these keys come from no entry of the cache")


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    stretch: Stretch,
    **context: Any,
) -> tuple[torch.Tensor, None]:
    """Return what each query sees, in the form of an attention function of transformers.

    Args:
        module: The attention layer.
        query: [B, H, W, D].
        key: The keys of a view, [B, G, S, D]; H is a multiple of G.
        value: Its values.
        attention_mask: Of whole sequences without a past, where some end early; None otherwise, for
            the view says who sees what.
        stretch: Of this pass.
        context: What the model's own attention is given besides.

    Returns:
        [B, W, H, D], and no weights.
    """
    view = stretch.take(key)
    mixed = _mixed(module, query, view, attention_mask, stretch, context)
    return (mixed if view.expand is None else view.expand(mixed)), None


def _mixed(
    module: Any,
    query: torch.Tensor,
    view: View,
    attention_mask: torch.Tensor | None,
    stretch: Stretch,
    context: dict[str, Any],
) -> torch.Tensor:
    """Return the values that each query sees, mixed, [B, W, H, D]."""
    if view.direct is not None:
        return view.direct(query, context["scaling"])
    if view.answer is not None:
        return view.answer(query, lambda q, v: _mixed(module, q, v, None, stretch, context))
    width = query.shape[2]
    if view.seen is not None:
        seen, keys = as_mask(view.seen[:, None], stretch.kind, query.dtype), view.keys
        if stretch.angles is not None:
            assert view.places is not None
            query = turned(query, stretch.angles, view.places[:, -width:])
            keys = turned(keys, stretch.angles, view.places, step=width == 1)
        return _plain(module, query, keys, view.values, seen, stretch, context)
    later = 0 if view.chosen is None else view.chosen.shape[1]
    parts = []
    if later < width:
        mask = attention_mask
        if mask is not None:
            mask = mask[..., : width - later, : width - later]
        first = query[:, :, : width - later]
        parts.append(_whole(module, first, view, stretch, mask, context))
    if view.chosen is not None and later:
        parts.append(_chosen(module, query[:, :, width - later :], view, stretch, context))
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _whole(
    module: Any,
    query: torch.Tensor,
    view: View,
    stretch: Stretch,
    mask: torch.Tensor | None,
    context: dict[str, Any],
) -> torch.Tensor:
    """Return what queries [B, H, W, D] see that see all columns up to their own."""
    width = query.shape[2]
    part = view.of_whole()
    keys, columns = part.keys, torch.arange(part.keys.shape[2], device=query.device)[None]
    places = columns if part.empty is None else (columns - part.empty[:, None]).clamp(min=0)
    if stretch.angles is not None:
        query = turned(query, stretch.angles, places[:, -width:])
        keys = turned(keys, stretch.angles, places, step=width == 1)
    causal = width > 1 and (width < columns.shape[1] or stretch.kind != "sdpa")
    if mask is None and (part.empty is not None or causal):
        own = columns[0, -width:, None]
        real = columns if part.empty is None else columns.where(columns >= part.empty[:, None], -1)
        # What is empty sees itself, for a row of attention with nothing in it is NaN.
        seen = ((real[:, None] >= 0) & (columns[:, None] <= own)) | (columns[:, None] == own)
        mask = as_mask(seen[:, None], stretch.kind, query.dtype)
    return _plain(module, query, keys, part.values, mask, stretch, context)


def _chosen(
    module: Any, query: torch.Tensor, view: View, stretch: Stretch, context: dict[str, Any]
) -> torch.Tensor:
    """Return what queries [B, H, U, D] see that each see columns of their own.

    Each is then a row with one query, as it is in a step.
    """
    assert view.chosen is not None
    rows, heads, many, size = query.shape
    kv_heads, room = view.keys.shape[1], view.chosen.shape[2]
    step = max(1, GATHERED // (rows * kv_heads * room * size))
    found = []
    for start in range(0, many, step):
        columns = view.chosen[:, start : start + step].expand(rows, -1, -1)
        count = columns.shape[1]
        empty = 0 if view.empty is None else view.empty[:, None, None]
        seen = columns >= empty
        index = columns.clamp(min=0).reshape(rows, 1, -1, 1).expand(-1, kv_heads, -1, size)
        keys, values = (
            t.gather(2, index).view(rows, kv_heads, count, room, size).transpose(1, 2).flatten(0, 1)
            for t in (view.keys, view.values)
        )
        asked = query[:, :, start : start + step].transpose(1, 2).reshape(-1, heads, 1, size)
        all_seen, seen = bool(seen.all()), seen.reshape(-1, room)
        if stretch.angles is not None:
            places = (seen.cumsum(1) - 1).clamp(min=0)
            places = places[:1] if all_seen else places
            asked = turned(asked, stretch.angles, places[:, -1:])
            keys = turned(keys, stretch.angles, places, step=many == 1)
        mask = None if all_seen else as_mask(seen[:, None, None], stretch.kind, query.dtype)
        mixed = _plain(module, asked, keys, values, mask, stretch, context)
        found.append(mixed.view(rows, count, heads, -1))
    return torch.cat(found, dim=1)


def _plain(
    module: Any,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    stretch: Stretch,
    context: dict[str, Any],
) -> torch.Tensor:
    """Return what the model's own attention gives, [B, W, H, D]."""
    own = ALL_ATTENTION_FUNCTIONS.get_interface(stretch.kind, eager_attention_forward)
    mixed: torch.Tensor = own(module, query, keys, values, mask, **context)[0]
    return mixed


def turned(
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    places: torch.Tensor,
    step: bool = False,
) -> torch.Tensor:
    """Return [B, H, T, D] turned at places [B or 1, T], as Llama turns queries and keys.

    What the one query of a step looks at is turned by a kernel where there is one; what those of a
    prompt look at is not, as its peak is planned with what torch has beside it.
    """
    found = entries.turned(x, angles, places) if step else None
    if found is not None:
        return found
    cos, sin = (table[places][:, None] for table in angles)
    return x * cos + rotate_half(x) * sin


def as_mask(seen: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """Return which key each query sees in the form that an attention takes.

    A query of padding may see nothing; what it is given is then any number, but a number: NaN would
    reach the others through its values. Eager attention has its softmax in float32, where what is
    added must be finite too.

    Args:
        seen: [B, 1, W, S] bool.
        kind: Name of the attention.
        dtype: Of what is attended to.

    Raises:
        UserError: When the attention takes no mask.
    """
    if kind == "sdpa":
        return seen
    if kind == "eager":
        least = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, least)
    raise UserError(
        f"What a token sees cannot be chosen under {kind} attention.", "Use sdpa attention."
    )


@contextmanager
def looking(model: Any) -> Iterator[str]:
    """Let a model's modules attend to views inside the context; yield its own attention's name."""
    config = model.config
    before: str = config._attn_implementation
    AttentionInterface.register(NAME, attend)
    config._attn_implementation = NAME
    try:
        yield before
    finally:
        config._attn_implementation = before
