"""Methods that compress a model part by part, without training it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from effbench.api.batch import Batch
from effbench.api.method_types import CALIBRATION_ROWS, Context
from effbench.api.points import Point
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.spec import Stage
from effbench.api.weights import CODED_TABLES, Packed
from effbench.methods.base import Method
from effbench.nn.llama import surgery, weights
from effbench.nn.quant import linears
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Part:
    """A part of a compression. What is computed for it is kept, so that nothing is computed twice.

    All that takes time belongs into `make`, a pass over calibration rows too (a part for each).
    """

    name: str
    make: Callable[[], dict[str, torch.Tensor]]
    """Computes the part's tensors and changes nothing."""
    put: Callable[[Mapping[str, torch.Tensor]], None]
    """Puts the tensors in their place, whether computed just now or before an interruption."""


@dataclass(frozen=True)
class Compresses(Method):
    """A method whose artefact comes from one pass over the model's parts."""

    stage: ClassVar[Stage] = "compress"
    identity: ClassVar[dict[str, object] | None] = None
    replays: ClassVar[bool] = False
    """Whether an interrupted run sends calibration rows through its finished parts once more, in
    `put`, so that no activation has to be kept on disk."""

    backward: ClassVar[bool] = False
    """Whether calibration takes the gradients of all linears, of one row after the other."""

    @property
    def calibrates(self) -> bool:
        """Whether compression runs the model on training rows."""
        return False

    def calibration_rows(self, count: int, seed: int) -> list[int]:
        """Return which of `count` training rows it looks at. Default: the first ones.

        Args:
            count: Of the train split.
            seed: Of the run.
        """
        return list(range(min(count, CALIBRATION_ROWS)))

    def held(self, shape: AnyShape, tokens: int, element: int) -> int:
        """Return the bytes that it holds beside the model while it compresses, at the most.

        Args:
            shape: Of the model that it compresses.
            tokens: Of all calibration rows; 0 where it reads none.
            element: Bytes of an element in the compute dtype.
        """
        return 0

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return how many parts `compress` will yield, for progress; 0 where it is not known."""
        return 0

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Yield the parts of the work, each from the model as the parts before have left it.

        Who iterates makes each part, or takes what an interrupted run kept of it, and puts it in
        place before asking for the next one. The model is compressed when the iterator is done.
        """
        raise NotImplementedError(f"{self.name} does not compress")


@dataclass(frozen=True)
class DrawsRows(Compresses):
    """A method whose calibration rows can be drawn, so that seeds differ in them."""

    draw: bool = False
    """Whether calibration rows are drawn by the run's seed; else they are the first ones."""

    def calibration_rows(self, count: int, seed: int) -> list[int]:
        """Return which training rows it looks at, in the order of the split."""
        if not self.draw:
            return super().calibration_rows(count, seed)
        draws = torch.Generator().manual_seed(seed)
        return sorted(torch.randperm(count, generator=draws)[:CALIBRATION_ROWS].tolist())


@dataclass(frozen=True)
class CompressesLinears(Compresses):
    """A method that replaces every dense linear of the decoder blocks by another module."""

    accepts: ClassVar[frozenset[str]] = frozenset({"dense", CODED_TABLES})

    def compressed(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return what takes the place of a linear; its buffers are the artefact."""
        raise NotImplementedError

    @property
    def format(self) -> Packed:
        """What weights become, for a method that makes one format of all of them."""
        raise NotImplementedError

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return the same module with nothing in its buffers yet. Default: that of `format`."""
        return self.format.empty(linear)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Pack every decoder linear."""
        return base.packed(self.format)

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return the number of dense linears."""
        return len(list(linears.dense_linears(model)))

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Yield one linear after the other."""
        for name, linear in linears.dense_linears(model):
            yield Part(
                name, partial(self._make, name, linear), partial(self._put, model, name, linear)
            )

    def _make(self, name: str, linear: torch.nn.Linear) -> dict[str, torch.Tensor]:
        try:
            return dict(self.compressed(linear).named_buffers())
        except UserError as problem:
            raise UserError(f"{name}: {problem.message}", problem.hint) from None

    def _put(
        self,
        model: torch.nn.Module,
        name: str,
        linear: torch.nn.Linear,
        stored: Mapping[str, torch.Tensor],
    ) -> None:
        surgery.replace_module(model, name, self.holding(linear, stored))

    def holding(
        self, linear: torch.nn.Linear, stored: Mapping[str, torch.Tensor]
    ) -> torch.nn.Module:
        """Return what takes the place of a linear, with buffers that were computed for it."""
        return with_buffers(self.empty(linear), stored)

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the buffers of every linear."""
        return {
            f"{name}.{key}": tensor
            for name, linear in surgery.decoder_linears(model)
            for key, tensor in linear.named_buffers()
        }

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` with the compressed linears of `folder`."""
        for name, linear in linears.dense_linears(model):
            surgery.replace_module(model, name, self.empty(linear))
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model


def with_buffers(module: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module with its buffers in place of its own ones, none of them copied."""
    for name in dict(module.named_buffers()):
        setattr(module, name, stored[name])
    return module


def compress_whole(
    method: Compresses, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
) -> None:
    """Compress a model in place from the first part to the last, and keep none of them."""
    for part in method.compress(model, calibration, ctx):
        part.put(part.make())
