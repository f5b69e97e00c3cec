"""Structured pruning in one shot: the baseline of methods that prune while they train.

Blocks are key/value groups with their query heads, MLP neurons, and dimensions of the residual
stream. What is ranked:

    magnitude   sum of w^2 over the weights of the block
    wanda       sum of |w| * ||x|| over the weights that read the block's activations x
                (Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
                ICLR 2024, arXiv 2306.11695, there for single weights; sums over blocks are ours)
    random      a seeded draw

`layer` keeps the same share of each layer; `global` takes the longest prefix by score per weight
over all layers, as `apt` does (`nn.pruning.blocks`). The model is sliced, without training; go on
from it with `effbench train from=RUN`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from annotated_types import Interval

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import PositiveInt
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.api.sharing import require_own_states
from effbench.api.slices import planned_slice, slice_in
from effbench.methods.compresses import Compresses, Part
from effbench.nn.llama import attention, surgery, weights
from effbench.nn.pruning import blocks as pruning_blocks
from effbench.nn.pruning import checkpoint, slicing
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Structured(Compresses):
    """One-shot pruning of groups, neurons and dimensions."""

    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "ICLR 2024",
        "2306.11695",
    )
    anatomy: ClassVar[Anatomy] = "plain"

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

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse a budget that the prunable blocks cannot meet."""
        require_own_states(shape, self.name)
        check_budget(shape, self.keep, self.blocks)
        return self

    @property
    def calibrates(self) -> bool:
        """Whether it needs the norms of what weights read."""
        return self.criterion == "wanda"

    def num_parts(self, model: Any, calibration: Sequence[Batch]) -> int:
        """Return rows that are read, layers that are scored, and the choice."""
        scored = 0 if self.criterion == "random" else len(model.model.layers)
        return scored + len(calibration) * self.calibrates + 1

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Score the blocks, choose among those of the whole model, then cut."""
        attention.require_llama(model)
        layout, root = slicing.layout_of(model), cast("Any", model)
        scores = torch.zeros(layout.size, device=root.model.embed_tokens.weight.device)
        yield from self.score(model, layout, scores, calibration, ctx.seed)
        yield Part(
            "blocks",
            partial(self._choose, layout, scores),
            lambda found: slicing.slice_model(model, slicing.kept_blocks(layout, found["kept"])),
        )

    def score(
        self,
        model: Any,
        layout: pruning_blocks.Layout,
        scores: torch.Tensor,
        calibration: Sequence[Batch],
        seed: int,
    ) -> Iterator[Part]:
        """Fill `scores`, [N], zeros at first, with the score of every block."""
        if self.criterion == "random":
            draws = torch.Generator().manual_seed(seed)
            scores.copy_(torch.rand(layout.size, generator=draws))
            return
        squares: dict[str, torch.Tensor] = {}
        if self.criterion == "wanda":
            for row, batch in enumerate(calibration):
                yield Part(f"rows.{row}", partial(input_squares, model, batch), _adding_to(squares))
        norms = {model.get_submodule(name): total.sqrt() for name, total in squares.items()}

        def of(linear: Any) -> torch.Tensor:
            weight = linear.weight.float()
            return weight.abs() * norms[linear] if norms else weight.square()

        for index in range(len(layout.layers)):
            yield _layer_score(model, layout, scores, index, of, self.criterion == "wanda")

    def _choose(
        self, layout: pruning_blocks.Layout, scores: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return which blocks stay, [N] bool."""
        budget = self.keep * layout.weights(torch.ones(layout.size))
        find = pruning_blocks.search if self.scope == "global" else pruning_blocks.search_uniform
        found = find(layout, scores, budget, prunable=self.blocks, align=self.align)
        return {"kept": found.kept}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write all weights and the sizes they have."""
        super().save(model, folder)
        checkpoint.write_sizes(model, folder, {})

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` cut to the artefact's sizes, with the artefact's weights."""
        checkpoint.fit_sizes(model, folder)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model

    def export(self, model: torch.nn.Module, point: Point, folder: Path) -> None:
        """Write a folder that `model=folder` loads, and transformers where all layers are alike."""
        checkpoint.write_folder(model, folder)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Cut the model to the artefact's sizes; without one, layers have fewer neurons."""
        return slice_in(base, folder) or planned_slice(base, self.keep)


def check_budget(shape: AnyShape, keep: float, blocks: Sequence[str]) -> None:
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


def _layer_score(
    model: Any,
    layout: pruning_blocks.Layout,
    scores: torch.Tensor,
    index: int,
    of: Callable[[Any], torch.Tensor],
    reads: bool,
) -> Part:
    """Return the part that scores the blocks of one layer, and adds to those of the stream."""

    def make() -> dict[str, torch.Tensor]:
        mine = scores.clone()
        view, dims = list(layout.views(mine))[index], layout.dims(mine)
        pruning_blocks.add_layer_sums(
            model.model.layers[index], layout.layers[index], view, dims, of, reads
        )
        return {**{n: part.clone() for n, part in view._asdict().items()}, "dims": dims.clone()}

    def put(found: Mapping[str, torch.Tensor]) -> None:
        view = list(layout.views(scores))[index]
        view.groups.copy_(found["groups"])
        view.neurons.copy_(found["neurons"])
        layout.dims(scores).copy_(found["dims"])

    return Part(f"scores.{index}", make, put)


def _adding_to(
    sums: dict[str, torch.Tensor],
) -> Callable[[Mapping[str, torch.Tensor]], None]:
    """Return what adds the squares of one more batch."""

    def add(squares: Mapping[str, torch.Tensor]) -> None:
        for name, square in squares.items():
            sums[name] = sums[name] + square if name in sums else square

    return add


def input_squares(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the squares of each input feature of every decoder linear, [d_in], by its name.

    Args:
        model: A causal language model.
        batch: What it reads; the squares are summed over tokens, and padding does not count.
    """
    found: dict[str, torch.Tensor] = {}
    real = batch.attention_mask.bool()

    def look(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        found[name] = inputs[0][real].float().square().sum(0)

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, n=name: look(n, inputs))
        for name, linear in surgery.decoder_linears(model)
    ]
    try:
        with torch.no_grad():  # the head reads no block of the decoder
            model.model(batch.input_ids, batch.attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
