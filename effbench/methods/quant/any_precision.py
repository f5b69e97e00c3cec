"""Any-Precision LLM: one nested artefact that holds the model at every width from 3 to 8 bits.

Park et al., Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs, ICML 2024,
arXiv 2402.10517; the seed is that of SqueezeLLM (Kim et al., ICML 2024, arXiv 2306.07629).

For each row of W [N, K], with F = sum over sequences of (dL / dW)^2 on calibration rows:

    seed      2^s intervals of the sorted weights with the least sum of F (w - mean)^2
    upscale   s -> s + 1 -> ... -> B: the best cut of each interval in two; codes 2c and 2c + 1
    at b      code_b = code_B >> (B - b),  ŵ = table_b[n, code_b],  y = ŵ x

    mixed     b_l of linear l: min sum of F (w - ŵ)^2 over all linears, in at most `budget` bytes

F = 0 where W = 0; a row without any F has ones. Per linear: bit planes [B, N, ⌈K / 8⌉] uint8 and
tables [N, 2^b] float16 for every width b from s to B.

Our choices: seed and cuts are optima, by dynamic programming and by trying every cut, where the
authors' are local ones (`seed=released`: `nn/quant/released.py`); equal weights share a code; L is
the mean over all tokens of a training row after the first, its prompt too; planes lie as
`effbench.nn.quant.planes` says, in another order than the authors'; widths for a budget are the
best ones for that sum, found exactly (`effbench.nn.quant.knapsack`). All linears of the decoder
blocks are quantised; embeddings, norms and head are not. The memory is what the planes and tables
that are loaded take; time is saved where codes are multiplied as they are
(`nn/decode/kernels/planes.h`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Interval

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.parts import Linear
from effbench.api.points import Point
from effbench.api.schema import Bits, NonNegativeInt
from effbench.api.shape import LINEARS, Anatomy, AnyShape, ModelShape, Phase
from effbench.methods.compresses import CompressesLinears, DrawsRows, Part
from effbench.nn.llama import surgery
from effbench.nn.quant import linears, mixed, nested_linear, sensitivity
from effbench.nn.quant.formats.any_precision import AnyPrecisionCodes
from effbench.util.errors import UserError
from effbench.util.lazy import torch

LOST = "losses"
"""Name of what each width of a linear loses, beside its buffers."""


@dataclass(frozen=True)
class Width(Point):
    """The leading bits of every code alone."""

    bits: int
    """How many."""

    @property
    def name(self) -> str:
        """`b<bits>`."""
        return f"b{self.bits}"


@dataclass(frozen=True)
class Mixed(Point):
    """The leading bits of every code, as many as the widths for the budget say."""

    @property
    def name(self) -> str:
        """`mixed`."""
        return "mixed"


@dataclass(frozen=True)
class AnyPrecision(DrawsRows, CompressesLinears):
    """Quantises every decoder weight to codes that can be read at several widths."""

    paper: ClassVar[Paper | None] = Paper(
        "Any-Precision LLM: Low-Cost Deployment of Multiple, Different-Sized LLMs",
        "ICML 2024",
        "2402.10517",
    )
    anatomy: ClassVar[Anatomy] = "other"
    produces: ClassVar[str] = "any_precision"
    eval_settings: ClassVar[frozenset[str]] = frozenset(
        {"eval_bits", "load_bits", "budget", "load_mixed"}
    )
    backward: ClassVar[bool] = True
    in_one_pass: ClassVar[bool] = True
    nested_points: ClassVar[bool] = True

    bits: Bits = 8
    """Width B of the widest codes."""
    seed_bits: Bits = 3
    """Lowest width s, whose clusters are found together; the time grows with 2^s."""
    seed: Literal["optimal", "released"] = "optimal"
    """How clusters and cuts are found: the best ones, or, for parity and slowly, those of the
    authors' program."""
    eval_bits: tuple[Bits, ...] = ()
    """Widths to evaluate; empty for all from `seed_bits` to `bits`."""
    load_bits: Annotated[int, Interval(ge=0, le=8)] = 0
    """Highest width that is loaded from an artefact, planes and tables above it staying on disk; 0
    for all."""
    budget: NonNegativeInt = 0
    """Bytes of planes and tables that all linears read together, at the most, at the point `mixed`,
    where each has a width of its own; 0 for no such point."""
    load_mixed: bool = False
    """Whether an artefact's linears are loaded at their widths of `budget` alone, all else staying
    on disk."""

    def __post_init__(self) -> None:
        self._check_widths()
        if self.load_mixed and not self.budget:
            raise UserError(
                "method.load_mixed=true loads the widths for a budget, of which there is none.",
                "Give method.budget=BYTES.",
            )
        if self.load_mixed and self.eval_bits:
            raise UserError(
                f"method.eval_bits={list(self.eval_bits)} are widths that method.load_mixed=true "
                "does not load.",
                "Leave one of the two out.",
            )

    def _check_widths(self) -> None:
        if self.seed_bits > self.bits:
            raise UserError(
                f"method.seed_bits={self.seed_bits} is more than method.bits={self.bits}.",
                "Seed with at most as many bits as the widest codes have.",
            )
        if out := [b for b in self.eval_bits if not self.seed_bits <= b <= self.bits]:
            raise UserError(
                f"method.eval_bits={list(self.eval_bits)} holds {out[0]}, which is not built.",
                f"Choose from {self.seed_bits} to {self.bits}.",
            )
        if self.load_bits and not self.seed_bits <= self.load_bits <= self.bits:
            raise UserError(
                f"method.load_bits={self.load_bits} is a width that is not built.",
                f"Choose from {self.seed_bits} to {self.bits}, or 0 for all.",
            )
        if self.eval_bits and max(self.eval_bits) > self.held_bits:
            raise UserError(
                f"method.eval_bits={list(self.eval_bits)} holds {max(self.eval_bits)}, which "
                f"method.load_bits={self.load_bits} does not load.",
                "Raise load_bits, or leave such widths out of eval_bits.",
            )

    @property
    def held_bits(self) -> int:
        """Width of the widest codes in memory."""
        return self.load_bits or self.bits

    @property
    def format(self) -> AnyPrecisionCodes:
        """What weights become."""
        return AnyPrecisionCodes(self.held_bits, self.seed_bits)

    @property
    def calibrates(self) -> bool:
        """Gradients of training rows say what an error costs."""
        return True

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse a budget that the lowest width goes beyond."""
        if not self.budget:
            return self
        sizes = mixed.sizes_of(shape, self.format).values()
        lowest, highest = (sum(size[i] for size in sizes) for i in (0, -1))
        if self.budget < lowest:
            raise UserError(
                f"method.budget={self.budget} bytes are too few: {self.seed_bits} bits take "
                f"{lowest:,}.",
                f"Give from {lowest} to {highest}, which {self.held_bits} bits take.",
            )
        return self

    def held(self, shape: AnyShape, tokens: int, element: int) -> int:
        """Return the bytes of the sensitivities, which are float32."""
        return 4 * shape.linear_params

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return the pass over the rows and the dense linears."""
        return 1 + super().num_parts(model, calibration)

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Take the gradients of all rows, then quantise one linear after the other.

        The rows are one part, since each alone would leave a number for every weight on disk.
        """
        self._require_all()
        _require_storable(model)
        found: dict[str, torch.Tensor] = {}
        yield Part(
            "sensitivity",
            partial(sensitivity.squared_gradients, model, calibration),
            found.update,
        )
        losses: dict[str, list[float]] = {}
        for name, linear in linears.dense_linears(model):
            make = partial(self._nested, linear, found.pop(name))
            yield Part(name, make, partial(self._put_measured, model, name, linear, losses))
        if self.budget:
            mixed.allot_model(model, self.format, losses, self.budget)

    def _require_all(self) -> None:
        """Refuse to make what is about loading."""
        for key in ("load_bits", "load_mixed"):
            if value := getattr(self, key):
                word = f"method.{key}={str(value).lower()}"
                raise UserError(
                    f"{word} is about an artefact that is there.",
                    f"Compress without it; then: effbench eval from=latest {word}",
                )

    def _nested(self, linear: torch.nn.Linear, sensitive: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the buffers of a linear in nested codes, and what each width loses."""
        widths = self.seed_bits, self.bits
        made = nested_linear.NestedLinear.quantise(linear, *widths, sensitive, self.seed)
        lost = made.measure(linear.weight.detach(), sensitive) if self.budget else None
        return dict(made.named_buffers()) | ({} if lost is None else {LOST: lost})

    def _put_measured(
        self,
        model: torch.nn.Module,
        name: str,
        linear: torch.nn.Linear,
        losses: dict[str, list[float]],
        stored: Mapping[str, torch.Tensor],
    ) -> None:
        self._put(model, name, linear, stored)
        if LOST in stored:
            losses[name] = stored[LOST].tolist()

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the codes and, with a budget, the widths."""
        super().save(model, folder)
        if self.budget:
            mixed.write(model, folder)

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the codes of `folder`, as far as they are held."""
        if not self.budget and self.held_bits == self.bits:
            return super().load(model, folder, ctx)
        found = self._found(mixed.sizes_in(model, self.format), folder) if self.budget else None
        groups = mixed.groups(model)
        for name, linear in linears.dense_linears(model):
            codes = self._codes(found.widths[groups[name]]) if found else self.format
            surgery.replace_module(model, name, codes.empty(linear))
        nested_linear.load_lowest(self.artefact_tensors(model), folder / "weights.safetensors")
        if found:
            mixed.give(model, found)
        return model

    def _found(self, sizes: mixed.Sizes, folder: Path) -> mixed.Found:
        """Return the widths as an artefact has them, or for another budget."""
        found = mixed.read(folder, sizes)
        if (self.budget, self.held_bits) == (found.budget, self.bits):
            return found
        widths = mixed.allot(sizes, found.losses, self.seed_bits, self.budget)
        return mixed.Found(self.budget, widths, found.losses)

    def _codes(self, width: int) -> AnyPrecisionCodes:
        """Return how a linear is held whose own width that is."""
        return AnyPrecisionCodes(width, width) if self.load_mixed else self.format.at(width)

    def points(self) -> tuple[Point, ...]:
        """Return a point for each width to evaluate, and that of the budget."""
        widths = self.eval_bits or range(self.seed_bits, self.held_bits + 1)
        uniform = () if self.load_mixed else tuple(map(Width, widths))
        return (*uniform, Mixed()) if self.budget else uniform

    def at(self, model: torch.nn.Module, point: Point) -> AbstractContextManager[Any]:
        """Read at the width of `point`; any that was built is one, listed or not."""
        return nested_linear.read_at(model, self._width(point))

    def _width(self, point: Point) -> int | None:
        """Return the width of all linears at a point, None where each has its own."""
        if self.load_mixed or isinstance(point, Mixed):
            return None
        return point.bits if isinstance(point, Width) else self.held_bits

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Pack every decoder linear; all that is loaded is in memory, what `point` says is read.

        Until there is an artefact, the widths for a budget are a guess.
        """
        width = self._width(point)
        if width is not None:
            return base.packed(self.format.at(width))
        sizes = mixed.sizes_of(base, self.format)
        if folder is not None and (folder / mixed.FILE).exists():
            widths = self._found(sizes, folder).widths
        else:
            guess = mixed.guessed(base, self.format)
            widths = mixed.allot(sizes, guess, self.seed_bits, self.budget)

        def pack(index: int, linear: Linear) -> Linear:
            return replace(linear, format=self._codes(widths[f"{index}.{linear.name}"]))

        return base.packed(self.format).map_linears(pack, base.chosen(LINEARS))


def _require_storable(model: torch.nn.Module) -> None:
    """Refuse weights that no float16 table can hold.

    Raises:
        UserError: Naming the layer.
    """
    for name, linear in linears.dense_linears(model):
        largest = float(linear.weight.detach().abs().max())
        if not largest <= nested_linear.LARGEST:
            raise UserError(
                f"{name} has a weight that no float16 table can hold: {largest:g}.",
                "Start from a model whose weights are finite.",
            )
