"""LoRA-Drop: most tokens skip part of the layers and a low-rank map stands in for them.

Rajabzadeh et al., "LoRA-Drop: Temporal LoRA Decoding for Efficient LLM Inference", 2026,
arXiv 2601.02569. Another paper has the same name (Zhou et al., "LoRA-drop: Efficient LoRA Parameter
Pruning based on Output Evaluation", COLING 2025, arXiv 2402.07721); it prunes adapters and has no
part in this file.

A set S of layers is droppable. Every layer reads the prompt; then k tokens drop S, one token
refreshes it, and so on with cycle w = k + 1:

    refresh:  h_l = layer_l(h_{l-1});  c_l = h_l                            [B, 1, d]
    drop:     h_l = c_l + (alpha / r) B_l A_l h_{l-1}    A_l: [r, d]  B_l: [d, r]  (zero at first)

A dropped token writes nothing into the key/value cache of S, and its input is not added as a
residual: the map is its only way past a dropped layer, so untrained maps give useless text. Only A
and B train, with cross-entropy under the schedule, in one parallel pass that equals stepwise
decoding.

Evaluated beside it, as points of one artefact and without further training: the same schedule with
the anchor alone (`k3-reuse`, B = 0), with layers that a dropped token simply leaves out
(`k3-identity`, h_l = h_{l-1}), and windows longer than any text (never refreshed).

From the authors' code rather than from reports of the paper: the map reads the current token and
the anchor is the last refresh. Rank, alpha and window are the reported ones. Ours: which layers are
droppable (all but the first three and the last, evenly spaced; fewer first ones below 12 layers),
hiding from droppable layers the keys that decoding would not have (`kv_accurate`), random prompts
and phases in training, and the learning rate, far above the authors' 1e-5 because runs here are
thousands of times shorter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper
from effbench.api.points import Point
from effbench.api.schema import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.skipping import skipping, with_stand_ins
from effbench.methods.depth.choosing import ChoosesDroppable
from effbench.methods.depth.points import Window, check_windows
from effbench.nn.decode.decoder import Decoder, Drops
from effbench.nn.depth import droppable
from effbench.nn.losses import token
from effbench.util.lazy import torch


@dataclass(frozen=True)
class LoRADrop(ChoosesDroppable):
    """Low-rank stand-ins for layers that most decoded tokens skip."""

    paper: ClassVar[Paper | None] = Paper(
        "LoRA-Drop: Temporal LoRA Decoding for Efficient LLM Inference",
        "arXiv, January 2026",
        "2601.02569",
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    learning_rate: ClassVar[float] = 1e-3
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    produces: ClassVar[str] = "adapted"
    identity: ClassVar[dict[str, Any] | None] = {"window": 0}
    eval_settings: ClassVar[frozenset[str]] = frozenset({"windows", "baselines"})
    nested_points: ClassVar[bool] = True

    rank: PositiveInt = 16
    """Rank r of each stand-in."""
    alpha: PositiveFloat = 16.0
    """Scale numerator: a stand-in is multiplied by alpha / rank."""
    window: NonNegativeInt = 3
    """Dropped tokens between two refreshes, k; 0 drops nothing."""
    windows: tuple[NonNegativeInt, ...] | None = None
    """Windows that are evaluated, rising; null is every one from 0 to `window`. One longer than any
    text never refreshes."""
    baselines: tuple[Literal["reuse", "identity"], ...] = ()
    """What is evaluated beside the stand-ins, at the same windows: dropped tokens that take the
    anchor alone, or that pass droppable layers unchanged."""
    anchor: Literal["refresh", "previous", "input", "residual"] = "refresh"
    """What a dropped token starts from: the layer's output at the last refresh, or at the previous
    token, dropped or not, or the layer's input, as in a residual adapter; `residual` is that input
    and what the layer added at the last refresh."""
    kv: Literal["skip", "fill"] = "skip"
    """Whether dropped tokens enter the key/value cache of droppable layers. `fill` computes their
    attention for that alone: it shows what the gaps cost in quality, and saves no cache."""
    kv_accurate: bool = True
    """Whether training hides the keys and values that decoding would not have; evaluation always
    does."""
    prefix: Fraction = 0.5
    """Longest share of a training sequence that counts as prompt, on top of its unlabelled start;
    the length is drawn for each sequence. 0 starts the schedule at once."""
    random_phase: bool = True
    """Whether a training sequence leaves its prompt at a random place of the cycle rather than at
    its start."""

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse droppable layers that cannot be, and windows that make no list."""
        check_windows(self.window, self.windows)
        return super().resolve(shape)

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base and add one float32 stand-in per droppable layer."""
        model.requires_grad_(False)
        config: Any = model.config
        stand_ins = droppable.DroppableLayers(
            config.hidden_size,
            self.chosen(config.num_hidden_layers, ctx),
            self.rank,
            self.alpha / self.rank,
            self.window,
            fill=self.kv == "fill",
            start=self.anchor,
            seed=ctx.seed,
        )
        droppable.attach(model, "lora_drop", stand_ins.to(ctx.device))
        return model

    # -- training and evaluation ---------------------------------------------------------------

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the cross-entropy under a schedule drawn for each sequence."""
        stand_ins = _stand_ins(model)
        if not stand_ins.active:
            return super().loss(model, batch, ctx)
        drawn = ctx.generator, self.prefix, self.random_phase
        starts = droppable.draw_starts(batch, stand_ins.window, *drawn)
        refreshed = droppable.schedule(*starts, batch.input_ids.shape[1], stand_ins.window)
        inputs = batch.input_ids, batch.attention_mask, refreshed
        logits = droppable.masked_logits(model, stand_ins, *inputs, not self.kv_accurate)
        return batch.weighed(token.token_nll(logits, batch.labels)).sum() / batch.window_tokens

    # -- use -----------------------------------------------------------------------------------

    def indices(self, model: torch.nn.Module) -> Sequence[int]:
        """Return the layers that have stand-ins, ascending."""
        return _stand_ins(model).indices

    def points(self) -> tuple[Point, ...]:
        """Return a point for each window, `k0` being the base; baselines like `k3-reuse` first."""
        windows = tuple(range(self.window + 1)) if self.windows is None else self.windows
        others = (Window(k, baseline) for baseline in self.baselines for k in windows if k)
        return (*others, *map(Window, windows))

    def full_point(self, shape: AnyShape) -> Point:
        """Return `k0`: what reads all layers, and has the stand-ins in memory too."""
        return Window(0)

    def at(self, model: torch.nn.Module, point: Point) -> AbstractContextManager[None]:
        """Work with the window of `point`, and in its way, inside the context."""
        return _stand_ins(model).using(*astuple(self.window_at(point)))

    def window_at(self, point: Point) -> Window:
        """Return what holds at a point; without a name it is the window of training."""
        return point if isinstance(point, Window) else Window(self.window)

    def decoder(self, point: Point) -> Decoder:
        """Return the route of a point's window; the module's own schedule is what holds."""
        return Decoder(Drops("lora_drop", self.window_at(point).window))

    def parts(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return which tokens were predicted in each place of the cycle, [B, T - 1] bool each.

        `j0` follows a refresh or the prompt, and is predicted by a token that read every layer;
        `j1` is predicted by the first dropped one, and so on. Long windows stop at `j8`.
        """
        stand_ins = _stand_ins(model)
        return droppable.cycle_parts(batch.labels, stand_ins.window) if stand_ins.active else {}

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put a stand-in beside each droppable layer, which runs on 1 / (k + 1) of the tokens.

        While it trains, layers and stand-ins both see every token.
        """
        layers = self.stored(base.num_layers, folder)
        if phase == "train":
            return with_stand_ins(base, layers, self.rank, active=self.window > 0)
        window, baseline = astuple(self.window_at(point))
        how = {"mapped": baseline is None, "fill": self.kv == "fill"}
        return skipping(base, layers, self.rank, window, **how)


def _stand_ins(model: torch.nn.Module) -> droppable.DroppableLayers:
    return cast("droppable.DroppableLayers", model.lora_drop)
