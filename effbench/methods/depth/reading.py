"""Sub-models of the first layers, and ways of decoding through them: what such methods share.

A depth n is the first n layers under the model's own final norm and head. Decoding can mix depths:

- `exit`: each token leaves at the first exit whose most likely token is more probable than that
  exit's threshold (Kavehzadeh et al., Sorted LLaMA, arXiv 2309.08968, whose thresholds are the
  default);
- `speculative`: the shallowest exit drafts and all layers verify, which loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from effbench.api.points import UNNAMED, Point
from effbench.api.schema import NonNegativeFloat, PositiveInt
from effbench.api.shape import LAYERS_DIFFER, AnyShape, ModelShape, Phase
from effbench.api.submodels import check_depths, depth_set
from effbench.methods.base import Method
from effbench.methods.depth.points import Depth, Mixed, Way, check_exits, read_mixed
from effbench.nn.decode import early_exit
from effbench.nn.decode.decoder import Decoder, Drafts, Exits
from effbench.nn.llama import stack
from effbench.util.errors import UserError
from effbench.util.lazy import torch

READING = frozenset(
    {"eval_depths", "decoding", "thresholds", "kv", "draft_depth", "draft_tokens", "draft_window"}
)
"""Settings of how depths are read out, on which nothing that is trained depends."""


@dataclass(frozen=True)
class ReadsDepths(Method):
    """A method whose model can be read out at several depths."""

    shallowest: ClassVar[float] = 0.3
    """Share of the layers that the shallowest depth has at least, unless depths are given."""

    eval_depths: tuple[PositiveInt, ...] = ()
    """Depths to evaluate; empty for the default ones."""
    decoding: tuple[Way, ...] = ()
    """Ways of decoding that are operating points too."""
    thresholds: tuple[NonNegativeFloat, ...] = ()
    """Least probability to leave at each exit but the last; empty for the paper's. 0 always
    leaves, 1 and more never does."""
    kv: Literal["recompute", "propagate"] = "recompute"
    """How skipped layers get the keys and values of a token that left early: exactly, when a later
    token needs them, or approximately, at once."""
    draft_depth: PositiveInt | None = None
    """Depth that drafts; null for the shallowest."""
    draft_tokens: PositiveInt = 4
    """Drafted tokens of the first round."""
    draft_window: Literal["adaptive", "constant"] = "adaptive"
    """Whether their number follows what was kept."""

    # -- depths --------------------------------------------------------------------------------

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the depths of a model of `shape`.

        Raises:
            UserError: For depths that the model does not have, and exits that lead nowhere.
        """
        if not shape.uniform:
            raise UserError(*LAYERS_DIFFER)
        method = self.with_depths(shape.num_layers)
        check_depths("eval_depths", method.eval_depths, shape.num_layers)
        if method.decoding:
            method._check_exits(method.exits(shape.num_layers))
        return method

    def with_depths(self, num_layers: int) -> Self:
        """Return the method with the depths that are not given."""
        return replace(self, eval_depths=self.eval_depths or depth_set(num_layers, self.shallowest))

    def kept(self, depth: int, num_layers: int) -> list[int]:
        """Return the layers of the sub-model `depth`, counted from 0."""
        return list(range(depth))

    def listed(self) -> tuple[int, ...]:
        """Return the depths to evaluate, once resolved."""
        return self.eval_depths

    def full_depth(self, num_layers: int) -> int:
        """Return the depth of the deepest exit, which is the full model when tokens leave early."""
        return num_layers

    def exits(self, num_layers: int) -> tuple[int, ...]:
        """Return the depths at which decoding can leave, ascending."""
        full = self.full_depth(num_layers)
        return (*(n for n in self.listed() if n < full), full)

    def check_plain(self, earlier: Sequence[Method]) -> None:
        """Refuse an artefact that computes its logits in a way of its own."""
        last = earlier[-1] if earlier else Method()
        own = any(last.decoder(point) != Decoder() for point in last.points())
        if own or isinstance(last, ReadsDepths):
            raise UserError(
                f"{last.name} computes its logits in a way of its own, which {self.name} would "
                "leave out.",
                "Evaluate it without method=, through its own operating points.",
            )

    def _check_exits(self, exits: Sequence[int]) -> None:
        check_exits(self.decoding, exits, self.thresholds, "eval_depths")
        if self.draft_depth is not None and self.draft_depth >= exits[-1]:
            raise UserError(
                f"method.draft_depth={self.draft_depth} is not below {exits[-1]}, the depth that "
                "verifies.",
                f"Set it to {exits[0]}, for example.",
            )

    # -- use -----------------------------------------------------------------------------------

    def points(self) -> tuple[Point, ...]:
        """Return the ways of decoding and then the depths, the deepest last."""
        return (*map(Mixed, self.decoding), *map(Depth, self.listed())) or (UNNAMED,)

    def full_point(self, shape: AnyShape) -> Point:
        """Return the point of all layers: they are in memory at every depth."""
        return Depth(shape.num_layers)

    def depth_of(self, point: Point, num_layers: int) -> int:
        """Return the depth whose layers a point needs.

        Raises:
            ValueError: For one that the model does not have.
        """
        if not isinstance(point, Depth):
            return self.full_depth(num_layers) if isinstance(point, Mixed) else num_layers
        if not 1 <= point.depth <= num_layers:
            raise ValueError(f"There is no depth {point.depth} of 1 to {num_layers}.")
        return point.depth

    @contextmanager
    def at(self, model: torch.nn.Module, point: Point) -> Iterator[None]:
        """Be the sub-model of a depth inside the context, or that of the deepest exit."""
        stack.require_layers_alike(model)
        count = len(stack.decoder_layers(model))
        kept = self.kept(self.depth_of(point, count), count)
        with stack.at_layers(model, kept):
            yield

    def rule(self, exits: int) -> early_exit.Rule:
        """Return who leaves at each of so many exits."""
        return early_exit.chosen(self.thresholds, exits)

    def decoder(self, point: Point) -> Decoder:
        """Return the way of decoding that a point names; a depth decodes as a model of its own."""
        if not isinstance(point, Mixed):
            return Decoder()
        if point.decoding == "exit":
            return Decoder(Exits(self.listed(), self.rule, self.kv == "propagate"))
        depth = self.draft_depth or self.listed()[0]
        drafts = Drafts(depth, self.draft_tokens, self.draft_window == "adaptive")
        return Decoder(driver=drafts)

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Keep the layers of a depth, or read out as the point's way of decoding does."""
        return self.with_depths(base.num_layers).read_out(base, point)

    def read_out(self, whole: ModelShape, point: Point) -> ModelShape:
        """Return the sub-model of a point."""
        count = whole.num_layers
        cut = whole.only(self.kept(self.depth_of(point, count), count))
        if not isinstance(point, Mixed):
            return cut
        exits = self.exits(count)
        draft = self.draft_depth or exits[0]
        return read_mixed(cut, point.decoding, exits, draft, self.draft_tokens)
