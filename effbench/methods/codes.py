"""Methods whose cache may hold its entries in few bits."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.schema import PositiveInt
from effbench.methods.base import Method
from effbench.nn.decode.quantised_cache import CodeBits, QuantisedCache


@dataclass(frozen=True)
class HoldsCodes(Method):
    """A method with a cache of its own, whose entries are then held as `kv_quant` holds them."""

    bits: CodeBits | None = None
    """Bits of an element of what the cache keeps, as `kv_quant` holds it; null for the compute
    dtype."""
    group_size: PositiveInt = 32
    """With `bits`: entries over which a channel of keys has one range."""
    recent: PositiveInt = 128
    """With `bits`: last entries that stay in full precision."""

    @property
    def codes(self) -> QuantisedCache | None:
        """How entries are held in few bits; None where they are not."""
        return QuantisedCache(self.bits, self.group_size, self.recent) if self.bits else None
