"""Which layer takes its attention's states from which, and what can be counted from that.

A consumer takes from an earlier layer, its source:

    kv    the source's keys (after RoPE) and values; it has neither k_proj nor v_proj
    qk    the source's attention map, which is its queries and keys; neither q_proj nor k_proj

All three together would make two layers' attention equal before o_proj, so there is no such mode.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from effbench.api.parts import LayerShape
from effbench.api.shape import AnyShape, ModelShape
from effbench.util.errors import UserError

Mode = Literal["kv", "qk"]

TAKEN: dict[Mode, tuple[str, str]] = {"kv": ("k_proj", "v_proj"), "qk": ("q_proj", "k_proj")}
"""The projections whose place the source's states take."""
SHARED = "shared_llama"
"""`model_type` in the config of a saved model whose layers share states."""
FILE = "sharing.json"
"""File of an artefact that states its layer map."""


@dataclass(frozen=True)
class LayerMap:
    """The source of every layer; a layer that makes its own states is its own source.

    Raises:
        ValueError: When a source is no earlier layer that makes its own.
    """

    mode: Mode
    sources: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.mode not in TAKEN:
            raise ValueError(f"{self.mode!r} is no way of sharing; there are {', '.join(TAKEN)}")
        for layer, source in enumerate(self.sources):
            if not 0 <= source <= layer or self.sources[source] != source:
                raise ValueError(f"layer {layer} cannot take from layer {source}: {self.sources}")

    @property
    def consumers(self) -> tuple[int, ...]:
        """Layers that take from another one, rising."""
        return tuple(i for i, source in enumerate(self.sources) if source != i)

    @property
    def givers(self) -> tuple[int, ...]:
        """Layers that others take from, rising."""
        return tuple(sorted({self.sources[i] for i in self.consumers}))

    @property
    def tail(self) -> int:
        """Layers at the top that add nothing to a cache: a prompt's last position is enough there.

        Consumers in `qk` mode cache values, so they have to read the whole prompt.
        """
        own = [i for i, source in enumerate(self.sources) if source == i]
        return len(self.sources) - 1 - own[-1] if self.mode == "kv" and own else 0

    def cached(self, layer: int) -> tuple[bool, bool]:
        """Return whether a layer puts keys and whether it puts values in the cache."""
        own = self.sources[layer] == layer
        return own, own or self.mode == "qk"

    def only(self, consumers: Iterable[int]) -> LayerMap:
        """Return the map in which none but some of its consumers take."""
        chosen = set(consumers)
        sources = (s if i in chosen else i for i, s in enumerate(self.sources))
        return LayerMap(self.mode, tuple(sources))


# -- maps --------------------------------------------------------------------------------------


def top_map(num_layers: int, count: int, mode: Mode = "kv") -> LayerMap:
    """Return the map in which the `count` uppermost layers all take from the one below them."""
    first = num_layers - count
    sources = (min(i, max(first - 1, 0)) if count else i for i in range(num_layers))
    return LayerMap(mode, tuple(sources))


def pair_map(num_layers: int, count: int, mode: Mode = "kv") -> LayerMap:
    """Return the map in which `count` odd layers, the uppermost ones, take from the layer below."""
    odd = range(1, num_layers, 2)
    chosen = set(odd[len(odd) - count :])
    return LayerMap(mode, tuple(i - (i in chosen) for i in range(num_layers)))


def listed_map(
    num_layers: int, consumers: Iterable[int], mode: Mode = "kv", key: str = "layers"
) -> LayerMap:
    """Return the map in which some layers take from the nearest earlier one that is not listed.

    Raises:
        UserError: Naming `method.<key>`, when a layer is not there, is listed twice, or is layer 0.
    """
    listed = list(consumers)
    wrong = [i for i in listed if not 1 <= i < num_layers]
    if wrong or len(set(listed)) < len(listed):
        raise UserError(
            f"method.{key}={listed} is not possible with {num_layers} layers.",
            f"List different layers from 1 to {num_layers - 1}; layer 0 has none to take from.",
        )
    sources: list[int] = []
    for layer in range(num_layers):
        sources.append(sources[-1] if layer in set(listed) else layer)
    return LayerMap(mode, tuple(sources))


# -- shapes ------------------------------------------------------------------------------------


def shared_shape(shape: AnyShape, sharing: LayerMap) -> ModelShape:
    """Return a model in which layers share: without what they take, and its part of the cache."""
    model = ModelShape.of(shape)

    def take(index: int, layer: LayerShape) -> LayerShape:
        if sharing.sources[index] == index or layer.mixer is None:
            return layer
        mixer, taken = layer.mixer, TAKEN[sharing.mode]
        keys, values = sharing.cached(index)
        cache = replace(mixer.cache, keys=mixer.kv_heads * keys, values=mixer.kv_heads * values)
        own = tuple(x for x in mixer.linears if x.name not in taken)
        source = sharing.sources[index]
        return replace(layer, mixer=replace(mixer, linears=own, cache=cache, source=source))

    return model.map(take)


def require_unshared(shape: AnyShape, name: str) -> None:
    """Refuse to share in a model whose layers share or differ in size already.

    Raises:
        UserError: Naming the method.
    """
    if not shape.uniform:
        raise UserError(
            f"{name} cannot start from a model whose layers differ in size or share states.",
            "Use it first, and prune or share otherwise in another run.",
        )


def require_own_states(shape: AnyShape, name: str) -> None:
    """Refuse to leave out parts of layers where others take their states from them.

    Raises:
        UserError: Naming the method.
    """
    if shape.shares:
        raise UserError(
            "Some layers of this model take states from others, which may not be left out.",
            f"Use {name} first, and share afterwards.",
        )


def written(sharing: LayerMap) -> dict[str, Any]:
    """Return a map as plain values: the entries of a saved config and of an artefact's file."""
    return {"sharing_mode": sharing.mode, "layer_sources": list(sharing.sources)}


def read(values: Mapping[str, Any]) -> LayerMap | None:
    """Return what `written` gave, None where there is nothing of it.

    Raises:
        ValueError: When it is no layer map.
    """
    sources = values.get("layer_sources")
    return LayerMap(values["sharing_mode"], tuple(sources)) if sources else None


def shared_in(shape: ModelShape, folder: Path | None) -> ModelShape | None:
    """Return `shape` with the map that an artefact states, None where there is no artefact."""
    if folder is None or not (folder / FILE).is_file():
        return None
    sharing = read(json.loads((folder / FILE).read_text()))
    return shared_shape(shape, sharing) if sharing else shape


def check_share(share: float, num_layers: int, kind: Literal["top", "pairs"]) -> None:
    """Refuse more consumers than `top_map` or `pair_map` can have.

    Raises:
        UserError: Naming `method.share`.
    """
    most = num_layers - 1 if kind == "top" else num_layers // 2
    if round(share * num_layers) > most:
        raise UserError(
            f"method.share={share} of {num_layers} layers is more than the {most} consumers that "
            f"map={kind} can have.",
            f"Set method.share={most / num_layers:.3g} or less.",
        )
