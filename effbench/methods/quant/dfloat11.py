"""DFloat11: bfloat16 weights with Huffman-coded exponents; the model gives the same bits.

Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float (DFloat11)", NeurIPS 2025, arXiv 2504.11651.

With sign S, exponent E (8 bits) and mantissa M (7 bits) of a weight, one Huffman code for each
decoder block, made from the frequencies p(e) of the exponents of all its linears, -Σ p log2 p being
some 2.6 bits:

    stored = code(E) | S M,   w = (-1)^S · 2^(E - 127) · 1.M

Per block of N weights whose codes take B bits, C = ⌈B / 64⌉: codes [8 C + 12] uint8, gaps
[⌈5 C / 8⌉] uint8, positions [⌈C / 512⌉ + 1] int32, tables [4 or so, 256] uint8, rest [N] uint8.

Our choices: canonical codes, without one for the end. Embedding, head, norms and biases stay as
they are. float32 weights are held as exactly, with 16 more raw bits each; float16 is refused. The
memory is saved for real: a block is decoded into a buffer that all blocks share when its first
linear runs. That takes time in every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.parts import LayerShape, Linear
from effbench.api.points import Point
from effbench.api.shape import LINEARS, Anatomy, AnyShape, ModelShape, Phase
from effbench.api.weights import CODED_TABLES
from effbench.methods.compresses import Compresses, Part
from effbench.nn.llama import stack, surgery, weights
from effbench.nn.quant import dfloat11, huffman, linears
from effbench.nn.quant.formats.dfloat11 import DFloat11Format
from effbench.util.errors import UserError
from effbench.util.lazy import torch
from effbench.util.tensor_files import stored_bytes

FILE = "weights.safetensors"
ENCODING, SPLIT = 3.5, 2
"""Bytes per weight of a block while it is encoded: its exponents, its codes and their words; and
while the lower halves of float32 weights are split off."""
CODED = 96
"""Bytes per weight whose code is written just now: twelve numbers of 64 bits."""


@dataclass(frozen=True)
class DFloat11(Compresses):
    """Encodes the exponents of the weights of each decoder block, and loses nothing."""

    paper: ClassVar[Paper | None] = Paper(
        "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via "
        "Dynamic-Length Float (DFloat11)",
        "NeurIPS 2025",
        "2504.11651",
    )
    anatomy: ClassVar[Anatomy] = "other"
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", CODED_TABLES})
    produces: ClassVar[str] = "dfloat11"

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return twice the number of blocks."""
        return 2 * len(_units(model))

    def held(self, shape: AnyShape, tokens: int, element: int) -> int:
        """Return the bytes for the largest block while it is encoded."""
        linears = (shape.linear_sizes(layer).values() for layer in range(shape.num_layers))
        count = max(sum(i * o for i, o in sizes) for sizes in linears)
        kept = count * (ENCODING + SPLIT * (element == 4))
        return int(kept) + CODED * min(count, huffman.PIECE)

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Yield for one block after the other its exponents, and then what is kept as it is."""
        scratch = dfloat11.Scratch()
        for block, names in _units(model).items():
            made: dict[str, torch.Tensor] = {}
            yield Part(f"{block}.exponents", partial(_exponents, model, names), made.update)
            yield Part(f"{block}.rest", partial(_rest, model, names), made.update)
            _put(model, block, names, scratch, made)

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the buffers of every block's unit."""
        units = [m for m in model.modules() if isinstance(m, dfloat11.Unit)]
        return {f"{u.name}.{key}": t for u in units for key, t in u.encoded._asdict().items()}

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the encoded linears of `folder`."""
        stored, scratch = weights.read_tensors(folder / FILE), dfloat11.Scratch()
        units = _units(model)
        fields = dfloat11.Encoded._fields
        if {f"{block}.{key}" for block in units for key in fields} != stored.keys():
            raise _unfit(folder, "other blocks")
        for block, names in units.items():
            own = {key: stored[f"{block}.{key}"].to(ctx.device) for key in fields}
            count = sum(weight.numel() for weight in _weights(model, names).values())
            if len(own["rest"]) != count:
                raise _unfit(folder, f"{len(own['rest']):,} weights in {block}, not {count:,}")
            _put(model, block, names, scratch, own)
        return model

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Encode every decoder linear; the bytes are an estimate until there is an artefact."""
        names = base.chosen(LINEARS)
        there = folder is not None and (folder / FILE).exists()
        held = _bytes_by_block(folder / FILE) if folder is not None and there else {}
        return base.map(lambda i, layer: _encoded(layer, names, held.get(i, 0)))


def _units(model: torch.nn.Module) -> dict[str, list[str]]:
    """Return the names of the linears of each decoder block that has some, in the order they run.

    Raises:
        UserError: When one of them does not have a dense weight any more.
    """
    modules = {module: name for name, module in model.named_modules()}
    blocks = [modules[block] for block in stack.decoder_layers(model)]
    names = [name for name, _ in linears.dense_linears(model)]
    units = {block: [n for n in names if n.startswith(f"{block}.")] for block in blocks}
    return {block: inside for block, inside in units.items() if inside}


def _dense(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.nn.Linear]:
    return {name: cast("torch.nn.Linear", model.get_submodule(name)) for name in names}


def _weights(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: linear.weight for name, linear in _dense(model, names).items()}


def _exponents(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    return dfloat11.encode_exponents(_weights(model, names))._asdict()


def _rest(model: torch.nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    rest, low = dfloat11.split_rest(_weights(model, names))
    return {"rest": rest, "low": low}


def _put(
    model: torch.nn.Module,
    block: str,
    names: Sequence[str],
    scratch: dfloat11.Scratch,
    stored: Mapping[str, torch.Tensor],
) -> None:
    encoded = dfloat11.Encoded(**stored)
    for name, new in dfloat11.pack(_dense(model, names), encoded, scratch, block).items():
        surgery.replace_module(model, name, new)


def _unfit(folder: Path, what: str) -> UserError:
    return UserError(
        f"{folder / FILE} does not fit this model: it has {what}.",
        "Use it with the model that it was made from.",
    )


def _bytes_by_block(path: Path) -> dict[int, int]:
    """Return the bytes of each block's unit, by the number of the block."""
    found: dict[int, int] = {}
    for name, size in stored_bytes(path).items():
        number = int(name.split(".")[-2])
        found[number] = found.get(number, 0) + size
    return found


def _encoded(layer: LayerShape, names: Sequence[str], held: int) -> LayerShape:
    """Return a block encoded as one unit of `held` bytes, 0 where that is not known.

    Each weight has the same share of them, and what is left over goes to the first linear.
    """
    inside = [x for x in layer.linears if x.name in names and not x.bare]
    count = sum(x.params for x in inside)
    shares = {x.name: held * x.d_in * x.d_out // count for x in inside}
    single = next((x.name for x in inside if x.copies == 1), "")
    if single:
        shares[single] += held - sum(x.copies * shares[x.name] for x in inside)

    def change(linear: Linear) -> Linear:
        if linear not in inside:
            return linear
        packed = DFloat11Format(unit=count, stored=shares[linear.name])
        return replace(linear, format=packed, trains=False)

    return layer.map(change)
