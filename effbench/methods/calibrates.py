"""Methods that compress block after block, by what the blocks read on calibration rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Self, cast

from effbench.api.batch import Batch
from effbench.api.method_types import Context
from effbench.api.shape import AnyShape
from effbench.api.sharing import require_own_states
from effbench.methods.compresses import CompressesLinears, DrawsRows, Part
from effbench.nn.llama import stack, surgery
from effbench.nn.quant import calibration as calibrating
from effbench.util.lazy import torch

SQUARES = 3
"""Matrices as large as the widest linear's inputs squared that are in memory at once, float32."""


@dataclass(frozen=True)
class CompressesBlocks(DrawsRows, CompressesLinears):
    """A method that replaces the linears of one block at a time.

    In memory are the model, the activations of the calibration rows before one block, and what one
    group of linears needs. Each block is a part; an interrupted run computes none of them again,
    but sends the rows through those that are put.
    """

    replays: ClassVar[bool] = True

    propagate: bool = True
    """Whether a block is calibrated on what the compressed blocks before it make, or the dense."""

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that take states from others: they cannot run alone."""
        require_own_states(shape, self.name)
        return self

    @property
    def calibrates(self) -> bool:
        """It does."""
        return True

    def held(self, shape: AnyShape, tokens: int, element: int) -> int:
        """Return the bytes of the rows' activations and of the statistics of one group."""
        widest = max(d_in for _, _, d_in, _ in shape.linears())
        return tokens * shape.hidden_size * element + SQUARES * 4 * widest**2

    def num_parts(self, model: torch.nn.Module, calibration: Sequence[Batch]) -> int:
        """Return the number of blocks."""
        return len(stack.decoder_layers(model))

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Yield one block after the other."""
        walk = calibrating.Walk(model, calibration)
        for index in range(len(walk.blocks)):
            make, put = partial(self.block_tensors, walk), partial(self._put_next, walk)
            yield Part(f"blocks.{index}", make, put)

    def block_tensors(self, walk: calibrating.Walk) -> dict[str, torch.Tensor]:
        """Return what becomes of the block that the walk stands before, and leave it as it is.

        Returns:
            Buffers of every linear's replacement, and parameters that have other values from then
            on, by their names in the block.
        """
        raise NotImplementedError

    def _put_next(self, walk: calibrating.Walk, stored: Mapping[str, torch.Tensor]) -> None:
        """Put the next block's tensors in place and send the rows through it."""
        block = walk.block
        if not self.propagate:
            walk.advance()
        self._put_block(block, stored)
        if self.propagate:
            walk.advance()

    def _put_block(self, block: torch.nn.Module, stored: Mapping[str, torch.Tensor]) -> None:
        """Put the replacements of linears in place, then the parameters that have other values."""
        buffers: dict[str, dict[str, torch.Tensor]] = {}
        parameters = {name for name, _ in block.named_parameters()}
        for path in stored.keys() - parameters:
            name, _, key = path.rpartition(".")
            buffers.setdefault(name, {})[key] = stored[path]
        for name, own in buffers.items():
            linear = cast("torch.nn.Linear", block.get_submodule(name))
            surgery.replace_module(block, name, self.holding(linear, own))
        for name in stored.keys() & parameters:
            block.get_parameter(name).data = stored[name]
