"""DFloat11: bfloat16 weights whose exponents are Huffman codes, and which lose nothing.

Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float", NeurIPS 2025, arXiv 2504.11651. A bfloat16 number is sign, 8 bits of exponent
and 7 of mantissa. The exponents of trained weights have some 2.6 bits of entropy; they are encoded
(`huffman`), sign and mantissa are kept as a byte. Weights that are used together, those of a
decoder block, are one unit with one code, and are decoded together into a buffer that all units of
a model share.

Our extension: a float32 number is its upper half, a bfloat16 number, and 16 further bits of
mantissa, which are kept as they are. That is as exact, and saves as many bits of twice as many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F

from effbench.nn.quant import huffman, triton_dfloat11
from effbench.nn.quant.huffman import Stream
from effbench.nn.quant.linears import QuantisedLinear, triton_runs
from effbench.util import cpp
from effbench.util.errors import UserError

SOURCE = Path(__file__).with_name("kernels") / "dfloat11.cpp"
LARGEST_EXPONENT = huffman.POINTER - 1
"""Of a weight that can be encoded: below 2^113, and neither infinite nor NaN."""


class Encoded(NamedTuple):
    """Weights of a unit, one after the other; N in all, in C chunks of codes."""

    codes: torch.Tensor
    """Exponents; see `huffman.Stream` for this and the next three."""
    gaps: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor
    rest: torch.Tensor
    """[N] uint8: the sign, and 7 bits of mantissa."""
    low: torch.Tensor
    """[N] int16: the lower halves of float32 numbers; [0] where weights are bfloat16."""

    @property
    def stream(self) -> Stream:
        """The exponents."""
        return Stream(self.codes, self.gaps, self.positions, self.tables)

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(tensor.nbytes for tensor in self)


def encode(weights: Mapping[str, torch.Tensor]) -> Encoded:
    """Return weights of one dtype by their names, each of any shape, as one unit.

    Raises:
        UserError: For another dtype than bfloat16 and float32, or a weight of 2^113 and more.
    """
    return Encoded(*encode_exponents(weights), *split_rest(weights))


def encode_exponents(weights: Mapping[str, torch.Tensor]) -> Stream:
    """Return the exponents of weights, encoded; see `encode`."""
    exponents = [(_upper_halves(n, w) >> 7 & 0xFF).to(torch.uint8) for n, w in weights.items()]
    for name, own in zip(weights, exponents, strict=True):
        if len(own) and int(own.max()) > LARGEST_EXPONENT:
            raise UserError(
                f"{name} has a weight that is infinite, not a number, or not below 2^113.",
                "DFloat11 has no code for it: look at where the model comes from.",
            )
    return huffman.encode(torch.cat(exponents))


def split_rest(weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is kept of weights as it is: `rest` and `low` of `Encoded`; see `encode`."""
    rest = torch.cat([_rest(_upper_halves(name, weight)) for name, weight in weights.items()])
    exact = [weight for weight in weights.values() if weight.dtype == torch.float32]
    low = [_words(weight).to(torch.int16) for weight in exact]
    return rest, torch.cat([rest.new_empty(0, dtype=torch.int16), *low])


def _rest(high: torch.Tensor) -> torch.Tensor:
    return (high >> 8 & 0x80 | high & 0x7F).to(torch.uint8)


def _upper_halves(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return the bits of the bfloat16 parts of weights, [n] int32 from 0 on."""
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise UserError(
            f"{name} is {str(weight.dtype).removeprefix('torch.')}: DFloat11 encodes the exponents "
            "of bfloat16 and float32.",
            "Load the model in bfloat16: hardware.dtype=bfloat16.",
        )
    words = _words(weight)
    return (words >> 16 if weight.dtype == torch.float32 else words) & 0xFFFF


def _words(weight: torch.Tensor) -> torch.Tensor:
    """Return the bits of weights, [n] int32."""
    as_int = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return weight.detach().reshape(-1).view(as_int).int()


def decode(encoded: Encoded, out: torch.Tensor, trusted: bool = False) -> None:
    """Decode the upper halves of weights into a buffer.

    Args:
        encoded: A unit of N weights.
        out: [N] bfloat16, contiguous.
        trusted: Whether it has been decoded as it is: then nobody waits for a GPU's kernel.

    Raises:
        UserError: When no encoder wrote the unit. Nothing beyond it is read or written.
    """
    stream, rest, positions = encoded.stream, encoded.rest, encoded.positions
    if triton_runs(out.device) and stream.fits and triton_dfloat11.decodes(stream, rest):
        damaged = triton_dfloat11.decode(stream, rest, out)
        if not trusted and bool(damaged.any()):
            raise UserError(*huffman.DAMAGED)
        return
    if int(positions[0]) != 0 or int(positions[-1]) != len(rest):
        raise UserError(*huffman.DAMAGED)
    library = _library() if out.device.type == "cpu" and not cpp.why_off() else None
    if library is None:
        _decode_in_torch(encoded, out)
    else:
        _decode_natively(library, encoded, out)


TOGETHER = 64
"""Blocks of chunks that torch decodes at a time."""


def _decode_in_torch(encoded: Encoded, out: torch.Tensor) -> None:
    """Decode some blocks of chunks after the other."""
    blocks, at = len(encoded.positions) - 1, 0
    for first in range(0, blocks, TOGETHER):
        exponents = huffman.decode(encoded.stream, first, min(first + TOGETHER, blocks)).int()
        rest = encoded.rest[at : at + len(exponents)].int()
        bits = (exponents << 7 | rest & 0x7F) - ((rest & 0x80) << 8)
        out.view(torch.int16)[at : at + len(exponents)] = bits.to(torch.int16)
        at += len(exponents)


class _Stream(ctypes.Structure):
    """The fields of `struct Stream`."""

    _fields_ = [
        *((name, c_void_p) for name in ("codes", "gaps", "tables", "rest", "positions")),
        *((name, c_int64) for name in ("chunks", "tables_count", "symbols")),
    ]


def _decode_natively(library: ctypes.CDLL, encoded: Encoded, out: torch.Tensor) -> None:
    """Decode by the C++ kernel, on as many threads as torch uses."""
    codes, gaps, positions, tables, rest, _ = encoded
    whole = encoded.stream.fits and all(tensor.is_contiguous() for tensor in encoded)
    arrays = [t.data_ptr() for t in (codes, gaps, tables, rest, positions)]
    stream = _Stream(*arrays, encoded.stream.chunks, len(tables) - 1, len(rest))
    threads = torch.get_num_threads()
    if not whole or library.decode_bf16(ctypes.byref(stream), out.data_ptr(), threads):
        raise UserError(*huffman.DAMAGED)


@cache
def _library() -> ctypes.CDLL | None:
    """Return the C++ kernel, compiled at the first call of all; None where it cannot be had."""
    library = cpp.loaded(SOURCE)
    if library is None:
        return None
    library.decode_bf16.argtypes = [c_void_p, c_void_p, c_int64]
    library.decode_bf16.restype = c_int64
    return library


class Scratch:
    """The buffer into which the units of a model are decoded in turn, as large as the largest."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.bfloat16)
        self.holds: Unit | None = None
        """Whose weights are in it."""

    def decoded(self, unit: Unit) -> torch.Tensor:
        """Return the upper halves of a unit's weights, [N] bfloat16, until another one's come."""
        own = self.room(unit)
        if self.holds is not unit:
            self.holds = None
            decode(unit.encoded, own, unit.sound)
            self.holds, unit.sound = unit, True
        return own

    def room(self, unit: Unit) -> torch.Tensor:
        """Return where the weights of a unit go, [N] bfloat16."""
        rest = unit.get_buffer("rest")
        if self.buffer.device != rest.device or len(self.buffer) < len(rest):
            self.clear()  # gone before there is a larger one
            with torch.inference_mode(False):  # whoever comes next may train
                self.buffer = torch.empty(len(rest), dtype=torch.bfloat16, device=rest.device)
        return self.buffer[: len(rest)]

    def forget(self) -> None:
        """Have whatever comes next decoded."""
        self.holds = None

    def clear(self) -> None:
        """Give the buffer back."""
        self.forget()
        self.buffer = torch.empty(0, dtype=torch.bfloat16)


class Unit(torch.nn.Module):
    """The encoded weights of several linears; its buffers are those of `Encoded`.

    Args:
        encoded: Their weights, one after the other.
        sizes: Rows and columns of each.
        scratch: Into which it is decoded.
        name: What the linears are part of.
    """

    def __init__(
        self,
        encoded: Encoded,
        sizes: Sequence[tuple[int, int]],
        scratch: Scratch,
        name: str = "",
    ) -> None:
        super().__init__()
        for key, tensor in encoded._asdict().items():
            self.register_buffer(key, tensor)
        self.sizes, self.scratch, self.name = list(sizes), scratch, name
        self.sound = False
        """Whether it has been decoded as it is."""

    @property
    def encoded(self) -> Encoded:
        """The buffers as one value."""
        return Encoded(*(self.get_buffer(key) for key in Encoded._fields))

    def weight(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight of a linear, [d_out, d_in]; it may be gone at the next call."""
        first = sum(rows * columns for rows, columns in self.sizes[:index])
        size = self.sizes[index]
        own = slice(first, first + size[0] * size[1])
        weight, low = self.scratch.decoded(self)[own], self.get_buffer("low")
        if len(low):
            words = weight.view(torch.int16).int() << 16 | low[own].int() & 0xFFFF
            weight = words.view(torch.float32)
        return weight.view(size).to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._change()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *rest: Any
    ) -> None:
        """Take buffers of any length: it is the weights that decide on it."""
        for key, own in self.encoded._asdict().items():
            if (given := state_dict.get(prefix + key)) is not None:
                setattr(self, key, torch.empty_like(given, device=own.device))
        self._change()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _change(self) -> None:
        self.sound = False
        self.scratch.forget()


class DFloat11Linear(QuantisedLinear):
    """A linear whose weight is one of a unit's.

    Args:
        linear: The layer it stands for; its bias is shared.
        unit: Has the weight.
        index: Of the weight in the unit.
    """

    def __init__(self, linear: torch.nn.Linear, unit: Unit, index: int) -> None:
        super().__init__(linear)
        self.unit, self.index = unit, index

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The codes of the unit, uint8."""
        return self.unit.get_buffer("codes")

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W decoded, [d_out, d_in] in `dtype`."""
        return self.unit.weight(self.index, dtype).clone()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T, [..., d_out], without a gradient."""
        return F.linear(x, self._passing_weight(x.dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return [..., d_out]: without gradients, the bits of the layer that it stands for."""
        if self.bias is None or torch.is_grad_enabled():
            return super().forward(input)
        return F.linear(input, self._passing_weight(input.dtype), self.bias)

    def _passing_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W where it has been decoded; inside `expanded_once` a copy that stays."""
        if self._kept is None:
            return self.unit.weight(self.index, dtype)
        return self._kept_weight(dtype)


def pack(
    linears: dict[str, torch.nn.Linear], encoded: Encoded, scratch: Scratch, name: str
) -> dict[str, DFloat11Linear]:
    """Return what takes the place of linears whose weights were encoded together, by name."""
    sizes = [(x.out_features, x.in_features) for x in linears.values()]
    unit = Unit(encoded, sizes, scratch, name)
    return {n: DFloat11Linear(x, unit, i) for i, (n, x) in enumerate(linears.items())}


def nothing(device: torch.device) -> Encoded:
    """Return a unit without any weight, which waits for a state dict."""
    none = torch.empty(0, dtype=torch.uint8, device=device)
    positions = torch.zeros(1, dtype=torch.int32, device=device)
    tables = torch.zeros(2, 256, dtype=torch.uint8, device=device)
    low = torch.empty(0, dtype=torch.int16, device=device)
    return Encoded(none, none.clone(), positions, tables, none.clone(), low)
