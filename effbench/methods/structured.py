"""Structured pruning in one shot: the baseline of methods that prune while they train.

Blocks are key/value groups with their query heads, MLP neurons, and dimensions of the residual
stream. What is ranked:

    magnitude   sum of w^2 over the weights of the block
    wanda       sum of |w| * ||x|| over the weights that read the block's activations x
                (Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
                ICLR 2024, arXiv 2306.11695, there for single weights; sums over blocks are ours)
    random      a seeded draw

`layer` keeps the same share of each layer; `global` takes the longest prefix by score per weight
over all layers, as `apt` does (`nn.blocks`). The model is sliced, without training; go on from it
with `effbench train from=RUN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from effbench.errors import UserError
from effbench.lazy import torch
from effbench.methods.base import Batch, Context, Cost, Method, Paper, dense_cost
from effbench.schema import PositiveInt
from effbench.shapes import DTYPE_BYTES, Shape, planned_slice, slice_in

if TYPE_CHECKING:
    from effbench.nn.blocks import Layout


@dataclass(frozen=True)
class Structured(Method):
    """One-shot pruning of groups, neurons and dimensions."""

    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "ICLR 2024",
        "2306.11695",
    )
    stage: ClassVar[Literal["train", "compress", "eval"]] = "compress"
    identity: ClassVar[dict[str, Any] | None] = None

    keep: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """Largest share of the decoder's linear weights that stays."""
    criterion: Literal["magnitude", "wanda", "random"] = "magnitude"
    """What blocks are ranked by."""
    scope: Literal["layer", "global"] = "layer"
    """Whether layers lose alike, or blocks of all layers compete."""
    blocks: tuple[Literal["groups", "neurons", "dims"], ...] = ("groups", "neurons")
    """Kinds of blocks that may go."""
    align: PositiveInt = 1
    """Neurons of a layer, and dimensions, go this many at a time."""

    def check(self, shape: Shape) -> None:
        """Refuse a budget that the prunable blocks cannot meet."""
        check_budget(shape, self.keep, self.blocks)

    @property
    def calibrates(self) -> bool:
        """Whether it needs the norms of what weights read."""
        return self.criterion == "wanda"

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """Choose blocks of the whole model, then cut one module after the other."""
        from effbench.nn.blocks import search, search_uniform
        from effbench.nn.slicing import kept_blocks, layout_of, require_llama, slices

        require_llama(model)
        layout = layout_of(model)
        scores = self.scores(model, layout, calibration, ctx.seed)
        budget = self.keep * layout.weights(torch.ones(layout.size))
        find = search if self.scope == "global" else search_uniform
        found = find(layout, scores, budget, prunable=self.blocks, align=self.align)
        yield from slices(model, kept_blocks(layout, found.kept))

    def scores(
        self, model: Any, layout: Layout, calibration: Sequence[Batch], seed: int
    ) -> torch.Tensor:
        """Return the score of every block, [N]; see the module's text."""
        from effbench.nn.blocks import block_sums

        if self.criterion == "random":
            return torch.rand(layout.size, generator=torch.Generator().manual_seed(seed))
        if self.criterion == "magnitude":
            return block_sums(model, layout, lambda linear: linear.weight.float().square())
        norms = input_norms(model, calibration)
        return block_sums(
            model, layout, lambda linear: linear.weight.float().abs() * norms[linear], reads=True
        )

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return every weight."""
        return {n: p.detach() for n, p in model.named_parameters()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write all weights and the sizes they have."""
        from effbench.nn.sliced_folder import write_sizes

        super().save(model, folder)
        write_sizes(model, folder, {})

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` cut to the artefact's sizes, with the artefact's weights."""
        from effbench.nn.sliced_folder import fit_sizes
        from effbench.nn.state import load_tensors

        fit_sizes(model, folder)
        load_tensors(self.tensors(model), folder / "weights.safetensors")
        return model

    def export(self, model: torch.nn.Module, point: str, folder: Path) -> None:
        """Write a folder that `model=folder` loads, and transformers where all layers are alike."""
        from effbench.nn.sliced_folder import write_folder

        write_folder(model, folder)

    def left(self, shape: Shape, folder: Path | None = None) -> Shape:
        """Return the shape of the artefact; without one, that of layers with fewer neurons."""
        return slice_in(shape, folder) or planned_slice(shape, self.keep)

    def cost(self, shape: Shape, dtype: str, point: str = "", base: Cost | None = None) -> Cost:
        """Count a dense model of the shape that is left."""
        cost = dense_cost(shape, DTYPE_BYTES[dtype])
        return replace(cost, saving="physical" if self.keep < 1 else "none")


def check_budget(shape: Shape, keep: float, blocks: Sequence[str]) -> None:
    """Refuse a share of weights to keep that is below what may not go.

    Raises:
        UserError: With the fields to change.
    """
    mlp = ("gate_proj", "up_proj", "down_proj")
    fixed = sum(
        i * o
        for _, name, i, o in shape.linears()
        if ("neurons" if name in mlp else "groups") not in blocks
    )
    share = 0.0 if "dims" in blocks else fixed / shape.linear_params
    if keep < share:
        raise UserError(
            f"method.keep={keep} cannot be reached: {share:.3f} of the weights belong to "
            "blocks that may not go.",
            "Raise method.keep, or list more of groups, neurons, dims in method.blocks.",
        )


def input_norms(model: Any, batches: Sequence[Batch]) -> dict[torch.nn.Module, torch.Tensor]:
    """Return the L2 norm over all tokens of each input feature of every decoder linear, [d_in].

    Args:
        model: A causal language model.
        batches: What it reads; padding does not count.
    """
    from effbench.nn.linears import decoder_linears

    sums: dict[torch.nn.Module, torch.Tensor] = {}
    real: Any = None

    def add(linear: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        square = inputs[0][real].float().square().sum(0)
        sums[linear] = sums[linear] + square if linear in sums else square

    hooks = [m.register_forward_pre_hook(add) for _, m in decoder_linears(model)]
    try:
        for batch in batches:
            real = batch.attention_mask.bool()
            with torch.no_grad():  # the head reads no block of the decoder
                model.model(batch.input_ids, batch.attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {linear: square.sqrt() for linear, square in sums.items()}
