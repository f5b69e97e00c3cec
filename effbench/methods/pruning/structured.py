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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.methods.compresses import Compresses, Part
from effbench.methods.pruning.slices import Slices
from effbench.nn.llama import attention
from effbench.nn.pruning import blocks as block_search
from effbench.nn.pruning import scores, slicing
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Structured(Slices, Compresses):
    """One-shot pruning of groups, neurons and dimensions."""

    paper: ClassVar[Paper | None] = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models",
        "ICLR 2024",
        "2306.11695",
    )

    criterion: Literal["magnitude", "wanda", "random"] = "magnitude"
    """What blocks are ranked by."""
    scope: Literal["layer", "global"] = "layer"
    """Whether layers lose alike, or blocks of all layers compete."""
    blocks: tuple[Literal["groups", "neurons", "dims"], ...] = ("groups", "neurons")
    """Kinds of blocks that may go."""

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
        zeros = torch.zeros(layout.size, device=root.model.embed_tokens.weight.device)
        ranking = scores.BlockScores(model, layout, zeros)
        yield from self.rank(ranking, calibration, ctx.seed)
        yield Part(
            "blocks",
            partial(self._choose, ranking),
            lambda found: slicing.slice_model(model, slicing.kept_blocks(layout, found["kept"])),
        )

    def rank(
        self, ranking: scores.BlockScores, calibration: Sequence[Batch], seed: int
    ) -> Iterator[Part]:
        """Fill in the score of every block."""
        if self.criterion == "random":
            ranking.draw(seed)
            return
        if self.criterion == "wanda":
            squares: dict[str, torch.Tensor] = {}
            for row, batch in enumerate(calibration):
                look = partial(scores.input_squares, ranking.model, batch)
                yield Part(f"rows.{row}", look, partial(scores.add_squares, squares))
            ranking = replace(ranking, norms={name: x.sqrt() for name, x in squares.items()})
        for index in range(len(ranking.layout.layers)):
            score, put = partial(ranking.of_layer, index), partial(ranking.put, index)
            yield Part(f"scores.{index}", score, put)

    def _choose(self, ranking: scores.BlockScores) -> dict[str, torch.Tensor]:
        """Return which blocks stay, [N] bool."""
        layout = ranking.layout
        budget = self.keep * layout.weights(torch.ones(layout.size))
        find = block_search.search if self.scope == "global" else block_search.search_uniform
        found = find(layout, ranking.scores, budget, prunable=self.blocks, align=self.align)
        return {"kept": found.kept}
