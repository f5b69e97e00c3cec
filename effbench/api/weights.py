"""How weights lie in memory: dense in some dtype, or packed in a format of `nn/quant/formats/`.

A packed format is one file there with one class: `find` knows it by the file's name. What is
counted of a format needs no torch; what packs and multiplies is imported where it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effbench.util.rooms import Room

if TYPE_CHECKING:
    from effbench.util.lazy import torch


@dataclass(frozen=True)
class WeightFormat:
    """How the weights of a linear layer lie in memory."""

    name: ClassVar[str] = ""
    packed: ClassVar[bool] = False
    """Whether a weight is expanded, or decoded by a kernel, each time it is multiplied."""
    fused: ClassVar[bool] = False
    """Whether a GPU multiplies packed weights in one kernel, which never expands them."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of a [d_out, d_in] matrix, all that belongs to it included.

        Args:
            d_in: Columns.
            d_out: Rows.
            element: Bytes of a compute element.
        """
        raise NotImplementedError

    def read_bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of such a matrix that one product reads. Default: all of them."""
        return self.bytes(d_in, d_out, element)

    def used(self) -> WeightFormat:
        """Return the format in which the weights are once nothing trains any more."""
        return self


@dataclass(frozen=True)
class Dense(WeightFormat):
    """Weights as a plain matrix."""

    name: ClassVar[str] = "dense"

    element: int = 0
    """Bytes of a weight; 0 takes the compute dtype's."""
    master: bool = False
    """Whether these are masters that are cast to the compute dtype after training."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of a matrix."""
        return d_in * d_out * (self.element or element)

    def used(self) -> WeightFormat:
        """Return the compute dtype's format for masters."""
        return COMPUTE if self.master else self


@dataclass(frozen=True)
class Packed(WeightFormat):
    """Base of the formats of `nn/quant/formats/`: frozen codes that a layer expands."""

    packed: ClassVar[bool] = True
    tolerance: ClassVar[float] = 0.0
    """Largest error of a product by a fused kernel, relative to the largest output in float32."""

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return a layer in the place of `linear`, its weight packed.

        Args:
            linear: A dense layer; its bias is shared.
            compute_dtype: What weights are expanded to; None takes the input's dtype.
        """
        raise NotImplementedError

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer in the place of `linear` that waits for a state dict."""
        raise NotImplementedError

    def measured(self, layer: torch.nn.Linear) -> Packed:
        """Return the format as it is in a layer, where the bytes depend on the weights' values.

        `bytes` of a format that has seen no weights is an estimate then.
        """
        return self


@dataclass(frozen=True)
class Lookup(WeightFormat):
    """A table of vectors in the format of a linear that has them as its rows."""

    name: ClassVar[str] = "lookup"
    packed: ClassVar[bool] = True

    rows: WeightFormat
    """Of that linear."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of a table, which takes one of `d_in` tokens to a vector of `d_out`."""
        return self.rows.bytes(d_out, d_in, element)


COMPUTE = Dense()
"""Weights in the compute dtype."""
MASTERS = Dense(4, master=True)
"""Float32 weights that train, and are cast to the compute dtype afterwards."""
FLOAT32 = Dense(4)
"""Float32 weights that stay so."""
HELD = {"compute": COMPUTE, "float32": MASTERS}
"""Names of the ways to hold a base that are no packed formats."""


ROOM = Room("nn.quant.formats", Packed, "There is no weight format {!r}.", "formats")
names, find = ROOM.names, ROOM.find


def held(name: str) -> WeightFormat:
    """Return how a base is held that a method asks for by name: see `HELD`, or a packed format."""
    return HELD[name] if name in HELD else find(name)()


def is_packed(name: str) -> bool:
    """Return whether a name is that of a packed format, and not `dense`, `adapted` or of `HELD`."""
    return name in names()


CODED_TABLES = "coded_tables"
"""The kind of what has dense linears between an embedding and a head in codes."""


def kinds(name: str) -> frozenset[str]:
    """Return all that layers of a kind are: a packed format is `packed` besides, as coded tables
    are.
    """
    packed = is_packed(name) or name == CODED_TABLES
    return frozenset({name, "packed"} if packed else {name})
