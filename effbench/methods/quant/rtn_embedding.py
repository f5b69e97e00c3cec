"""Round-to-nearest codes of the embedding and of the output head, which other quantisers leave.

The rounding is that of `rtn` (Dettmers and Zettlemoyer, "The case for 4-bit precision", ICML 2023,
arXiv 2212.09720), over groups of neighbours in the vector of a token: with L = 2^b - 1,

    s = (max(w, 0) - min(w, 0)) / L,   z = round(-min(w, 0) / s)
    q = clamp(round(w / s) + z, 0, L),   ŵ = s · (q - z)

Per table [V, d]: codes [⌈V · d · b / 8⌉] uint8, scales [V, ⌈d / group_size⌉] float16, zeros
[⌈V · ⌈d / group_size⌉ · b / 8⌉] uint8; none when symmetric. Tied tables are one.

Our choices: a method of its own, run before one for the decoder's linears, so that it goes with
each of these; 8 bits in groups of 64, by which SmolLM2-135M loses nothing that shows. No data is
used. The memory is saved for real: vectors of tokens are expanded one by one, and the head is
multiplied as codes where kernels do that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import Bits, PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.weights import CODED_TABLES, Lookup
from effbench.methods.compresses import Compresses, Part, with_buffers
from effbench.methods.quant.groups import PacksGroups
from effbench.nn.llama import weights
from effbench.nn.quant import embedding as tables
from effbench.util.lazy import torch

HEAD, EMBEDDING = "head", "embedding"
PIECE, ROUNDING = 2**20, 32
"""Weights that are rounded at once, and bytes that each of them takes then."""


@dataclass(frozen=True)
class RTNEmbedding(PacksGroups, Compresses):
    """Rounds the vectors of tokens and the rows of the head to the nearest of 2^bits levels."""

    paper: ClassVar[Paper | None] = Paper(
        "The case for 4-bit precision: k-bit Inference Scaling Laws", "ICML 2023", "2212.09720"
    )
    produces: ClassVar[str] = CODED_TABLES

    bits: Bits = 8
    """Bits per weight, scales not counted."""
    group_size: PositiveInt = 64
    """Neighbouring weights of a vector that share one scale."""

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return the number of tables."""
        return 1 if tables.is_tied(model) else 2

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Yield the head and, where it is another table, the embedding."""
        for part, linear in self._dense(model).items():
            yield Part(part, partial(self._made, linear), partial(_put, model, part, self, linear))

    def _dense(self, model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
        """Return the dense tables as linears, by name, none of their weights copied."""
        _, embedding, head = tables.dense_tables(model)
        own = {} if tables.is_tied(model) else {EMBEDDING: tables.as_linear(embedding)}
        return {HEAD: head, **own}

    def held(self, shape: AnyShape, tokens: int, element: int) -> int:
        """Return the bytes of a table's codes, and of some of its rows while they are rounded."""
        codes = self.format.bytes(shape.hidden_size, shape.vocab_size, element)
        return codes + ROUNDING * min(PIECE, shape.hidden_size * shape.vocab_size)

    def _made(self, linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
        """Return the codes of a table, made of some rows after the other."""
        step = 8 * max(1, PIECE // (8 * linear.in_features))
        made = dict(self.format.empty(linear).named_buffers())
        done = dict.fromkeys(made, 0)
        for begin in range(0, linear.out_features, step):
            piece = tables.some_rows(linear, begin, begin + step)
            for key, part in self.format.quantise(piece).named_buffers():
                made[key][done[key] : done[key] + len(part)] = part
                done[key] += len(part)
        return made

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the buffers of both tables."""
        root: Any = model
        held = {HEAD: root.get_output_embeddings()}
        if not tables.is_tied(model):
            held[EMBEDDING] = root.get_input_embeddings().table
        return {f"{n}.{key}": t for n, table in held.items() for key, t in table.named_buffers()}

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the tables of `folder`."""
        self._empty(model)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model

    def _empty(self, model: torch.nn.Module) -> None:
        """Put packed tables in place that wait for their codes; the dense ones go."""
        for part, linear in self._dense(model).items():
            _put(model, part, self, linear, dict(self.format.empty(linear).named_buffers()))

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Pack both tables."""
        embed = replace(base.embed, format=Lookup(self.format), trains=False)
        head = replace(base.readout.head, format=self.format, trains=False)
        return replace(base, embed=embed, readout=replace(base.readout, head=head))


def _put(
    model: torch.nn.Module,
    part: str,
    method: RTNEmbedding,
    linear: torch.nn.Linear,
    stored: Mapping[str, torch.Tensor],
) -> None:
    """Put a table in its place."""
    put = tables.put_head if part == HEAD else tables.put_embedding
    rows = method.format.empty(linear)
    with_buffers(rows, stored)
    put(model, rows)
