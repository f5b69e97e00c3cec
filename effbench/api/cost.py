"""What a model needs, counted from its shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple

from effbench.api.parts import Adapter, Cache, LayerShape, Linear, Norm, Readout, Recurrence, Share
from effbench.api.shape import DTYPE_BYTES, AnyShape, ModelShape
from effbench.api.weights import COMPUTE

Saving = Literal["none", "physical", "simulated"]
_LONG = 2**24
"""Tokens of a prompt at which what a cache keeps at the most is reached, whatever it is."""


@dataclass(frozen=True)
class Cost:
    """What a model under a method needs, counted from shapes alone."""

    params: int
    """All parameters, adapters included, tied ones once."""
    trainable: int
    """Parameters that receive gradients."""
    resident_bytes: int
    """Bytes of all weights as they lie in memory, scales and adapters included."""
    bytes_per_token: float
    """Weight bytes read to decode one token at batch 1 (embedding rows not counted)."""
    flops_per_token: float
    """Forward FLOPs of one token at context 0, matrix products only."""
    kv_bytes_per_token: float
    """Bytes that one more token adds to the key/value cache, on average."""
    kv_bytes_per_sequence: float = 0
    """Bytes of cache that a sequence has however long it is: those of states."""
    saving: Saving = "none"
    """Whether smaller figures here are real on the device or only modelled."""
    caches: tuple[tuple[Cache, int], ...] = ()
    """What layers keep of the tokens read, and how many of them do."""
    attending: tuple[tuple[Cache, int], ...] = ()
    """What layers keep, and the query heads of those that keep it, times their width."""
    element: int = 0
    """Bytes of an element of the compute dtype."""
    per_token: bool = True
    """Whether each token goes through all layers; where not, figures per token are of one that an
    encoder reads and one that a decoder writes together, and nobody is told of them."""

    def cached(self, tokens: float, sequences: int = 1, prompt: int = 0) -> float:
        """Return the bytes of the caches of some sequences.

        Args:
            tokens: Of each.
            sequences: How many there are.
            prompt: The first tokens of each, that were read as a prompt.
        """
        return sequences * sum(n * c.bytes(tokens, self.element, prompt) for c, n in self.caches)

    def attention(self, tokens: float, prompt: int = 0) -> float:
        """Return the FLOPs of one token that attends to what is kept of all tokens so far.

        Args:
            tokens: Of its sequence, itself among them.
            prompt: The first of them, that were read as a prompt.
        """
        return 4 * sum(width * c.places(tokens, prompt) for c, width in self.attending)

    @property
    def kept(self) -> list[str]:
        """What caches keep at the most, in words: each bound once, the narrowest first."""
        bounds = sorted({(n, of) for c, _ in self.caches for n, of in c.bounds})
        return [f"at most {n:,} {of}" for n, of in bounds]

    def told(self) -> dict[str, float | str]:
        """Return the numbers that a record has of it."""
        hidden = {"caches", "attending", "element", "per_token"}
        if not self.per_token:
            hidden |= {name for name in vars(self) if "_per_" in name}
        return {k: v for k, v in vars(self).items() if k not in hidden}


class Piece(NamedTuple):
    """A part's share of a cost."""

    params: int = 0
    trainable: int = 0
    resident: int = 0
    read: Share = 0
    flops: Share = 0


def cost_of(shape: AnyShape, dtype: str, base: AnyShape | None = None) -> Cost:
    """Return the cost of a model.

    Args:
        shape: The model.
        dtype: Compute dtype, a key of `DTYPE_BYTES`.
        base: What nothing was done to, for the kind of saving; None states none.
    """
    model, element = ModelShape.of(shape), DTYPE_BYTES[dtype]
    pieces = list(_pieces(model, element))
    fixed = model.embed.format.bytes(1, model.fixed, element) if model.fixed else 0
    cost = Cost(
        params=sum(p.params for p in pieces),
        trainable=sum(p.trainable for p in pieces),
        resident_bytes=sum(p.resident for p in pieces) + fixed + model.held_bytes,
        bytes_per_token=_plain(sum(p.read for p in pieces)),
        flops_per_token=_plain(sum(p.flops for p in pieces)),
        kv_bytes_per_token=model.kv_bytes_per_token(element),
        kv_bytes_per_sequence=model.kv_bytes_per_sequence(element),
        caches=tuple(Counter(x.mixer.cache for x in model.layers if x.mixer).items()),
        attending=tuple(_attending(model).items()),
        element=element,
        per_token=not model.encoder,
    )
    return replace(cost, saving=_saving(model, cost, cost_of(base, dtype))) if base else cost


def _attending(model: ModelShape) -> Counter[Cache]:
    """Return the width of all query heads by what they attend to."""
    found = Counter[Cache]()
    for mixer in (x.mixer for x in model.layers if x.mixer):
        found[mixer.cache] += mixer.heads * mixer.head_dim
    return found


def _saving(model: ModelShape, cost: Cost, base: Cost) -> Saving:
    """Return whether anything is smaller than in the base, or its weights packed."""
    if model.simulated:
        return "simulated"
    smaller = (
        cost.resident_bytes < base.resident_bytes
        or cost.bytes_per_token < base.bytes_per_token
        or cost.flops_per_token < base.flops_per_token
        or cost.kv_bytes_per_token < base.kv_bytes_per_token
        or cost.cached(_LONG, prompt=_LONG) < base.cached(_LONG, prompt=_LONG)
    )
    return "physical" if smaller or model.formats else "none"


def cache_bytes(
    shape: AnyShape, dtype: str, tokens: int, sequences: int = 1, prompt: int = 0
) -> float:
    """Return the bytes of the caches of so many sequences of so many tokens; see `Cost.cached`."""
    return cost_of(shape, dtype).cached(tokens, sequences, prompt)


def _pieces(model: ModelShape, element: int) -> Iterator[Piece]:
    """Yield what every part of a model adds: embedding rows are not read, exits neither."""
    for unread in (model.embed, *model.tables, *model.more):
        yield from _linear(unread, element, 0, 0)
    for norm in model.norms:
        yield _norm(norm, element, 1)
    yield Piece(model.grown, model.grown, 4 * model.grown)
    for layer in model.layers:
        yield from _layer(layer, element)
    yield from _readout(model.readout, element)
    for further in model.exits:
        yield from _readout(further, element)


def _layer(layer: LayerShape, element: int) -> Iterator[Piece]:
    for part, norm in zip((layer.mixer, layer.mlp), layer.norms, strict=True):
        runs: Share = 1 if part is None else part.runs
        reads = runs if part is None or part.reads is None else part.reads
        for one in (norm, *(part.norms if part else ())):
            yield _norm(one, element, reads)
        for linear in part.linears if part else ():
            yield from _linear(linear, element, runs, reads)
            if linear.adapter:
                yield _adapter(linear.adapter, element, runs, reads)
    if layer.mixer and layer.mixer.recurrence:
        yield _recurrence(layer.mixer.recurrence, layer.mixer.runs)
    if layer.bypass:
        yield _adapter(layer.bypass, element, 1, 1)


def _readout(readout: Readout, element: int) -> Iterator[Piece]:
    reads = readout.runs if readout.reads is None else readout.reads
    yield _norm(readout.norm, element, reads)
    for linear in readout.before:
        yield from _linear(linear, element, readout.runs, reads)
    weight, bias = _linear(readout.head, element, readout.runs, reads)
    yield weight._replace(params=0, trainable=0, resident=0) if readout.tied else weight
    yield bias


def _norm(norm: Norm, element: int, reads: Share) -> Piece:
    held = norm.format.bytes(1, norm.params, element)
    return Piece(norm.params, norm.params * norm.trains, held, reads * held)


def _linear(linear: Linear, element: int, runs: Share, reads: Share) -> tuple[Piece, Piece]:
    """Return what the weight adds and what the bias does."""
    held = linear.format.bytes(linear.d_in, linear.d_out, element)
    read = linear.format.read_bytes(linear.d_in, linear.d_out, element)
    weight = Piece(
        linear.params,
        linear.params * linear.trains,
        linear.copies * held,
        reads * linear.active * read,
        2 * runs * linear.active * linear.d_in * linear.d_out,
    )
    if not linear.bias:
        return weight, Piece()
    dense = COMPUTE if linear.format.packed else linear.format
    held = dense.bytes(1, linear.d_out, element)
    return weight, Piece(
        linear.biases,
        linear.biases * linear.trains,
        linear.copies * held,
        reads * linear.active * held,
    )


def _adapter(adapter: Adapter, element: int, runs: Share, reads: Share) -> Piece:
    each = adapter.format.bytes(1, 1, element)
    products = sum(f.products for f in adapter.factors)
    return Piece(
        adapter.params,
        adapter.trainable,
        adapter.params * each,
        reads * adapter.active * (products + adapter.scales + adapter.gains) * each,
        2 * runs * adapter.active * products,
    )


def _recurrence(own: Recurrence, runs: Share) -> Piece:
    flops = 2 * runs * (own.mapping + own.stepping)
    return Piece(resident=own.held, read=runs * own.held, flops=flops)


def _plain(number: Share) -> float:
    return float(number) if isinstance(number, Fraction) else number
