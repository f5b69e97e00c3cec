"""Round-to-nearest weights with one scale per group: what every other quantiser must beat.

Sources: block-wise rounding as studied by Dettmers and Zettlemoyer, "The case for 4-bit precision:
k-bit inference scaling laws", ICML 2023, arXiv 2212.09720; the zero point per group is common use.

With L = 2^b - 1, over each group of `group_size` neighbours w in a row of W [d_out, d_in]:

    s = (max(w, 0) - min(w, 0)) / L,   z = round(-min(w, 0) / s)
    q = clamp(round(w / s) + z, 0, L),   ŵ = s · (q - z)

Per linear: codes [⌈d_out · d_in · b / 8⌉] uint8, scales [d_out, ⌈d_in / group_size⌉] float16, zeros
[⌈d_out · ⌈d_in / group_size⌉ · b / 8⌉] uint8; no zeros when symmetric (z fixed in the middle).

Our choices: integer codes (the paper finds quantile and float codes better at equal bits), groups
of 128 inside a row, float16 scales and zero points of b bits. All linears of the decoder blocks are
quantised; embeddings, norms and head are not. No data is used. The memory is saved for real; time
is not, as each product first expands its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.schema import Bits, PositiveInt
from effbench.api.shape import ModelShape, Phase
from effbench.methods.base import Method, Part
from effbench.nn.quant.formats.grouped import Grouped
from effbench.util.lazy import torch


@dataclass(frozen=True)
class RTN(Method):
    """Rounds every decoder weight to the nearest of 2^bits levels of its group."""

    paper: ClassVar[Paper | None] = Paper(
        "The case for 4-bit precision: k-bit Inference Scaling Laws", "ICML 2023", "2212.09720"
    )
    stage: ClassVar[Literal["train", "compress", "eval"]] = "compress"
    leaves: ClassVar[str] = "grouped"
    identity: ClassVar[dict[str, Any] | None] = None

    bits: Bits = 4
    """Bits per weight, scales not counted."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share one scale."""
    symmetric: bool = False
    """Levels around zero, without a zero point of each group."""

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Round one linear after the other."""
        from effbench.nn.quant.linears import dense_linears

        for name, linear in dense_linears(model):
            yield Part(name, partial(self._round, linear), partial(self._pack, model, name, linear))

    def _round(self, linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
        """Return the codes, scales and zero points of a linear."""
        from effbench.nn.quant.linears import PackedLinear

        packed = PackedLinear.quantise(linear, self.bits, self.group_size, self.symmetric)
        return dict(packed.named_buffers())

    def _pack(
        self,
        model: torch.nn.Module,
        name: str,
        linear: torch.nn.Linear,
        stored: Mapping[str, torch.Tensor],
    ) -> None:
        """Put what a linear was rounded to in its place."""
        from effbench.nn.llama.replace import replace_module
        from effbench.nn.quant.linears import PackedLinear

        settings = self.bits, self.group_size, self.symmetric
        replace_module(model, name, PackedLinear.holding(linear, stored, *settings))

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the codes, scales and zero points of every linear."""
        from effbench.nn.llama.replace import decoder_linears

        return {
            f"{name}.{key}": tensor
            for name, linear in decoder_linears(model)
            for key, tensor in linear.named_buffers()
        }

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the packed linears of `folder`."""
        from effbench.nn.llama.replace import replace_module
        from effbench.nn.llama.weights import load_tensors
        from effbench.nn.quant.linears import PackedLinear, dense_linears

        for name, linear in dense_linears(model):
            part = PackedLinear.empty(linear, self.bits, self.group_size, self.symmetric)
            replace_module(model, name, part)
        load_tensors(self.tensors(model), folder / "weights.safetensors")
        return model

    def shape(self, base: ModelShape, point: str, phase: Phase, folder: Path | None) -> ModelShape:
        """Pack every decoder linear."""
        return base.packed(Grouped(self.bits, self.group_size, self.symmetric))
