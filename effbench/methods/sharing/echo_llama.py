"""ECHO-LLaMA: upper layers take keys and values from one below, converted layer by layer.

Dialameh et al., ECHO-LLaMA: Efficient Caching for High-Performance LLaMA Training, EMNLP 2025
(industry track), arXiv 2505.17331. Its abstract, and one caption, were all that we could read.

A consumer has its own queries, output projection and MLP, and takes the keys (after RoPE) and
values of its source; its k_proj and v_proj are gone, and it adds nothing to the cache. With mode=qk
it takes queries and keys instead, so the attention map, and caches values alone.

The consumers are converted one after the other. While one is, for M steps,

    k = (1 - a) k_own + a k_source,    v likewise,    a = 1/M, 2/M ... 1

and then its projections are removed, which changes nothing more. The loss is next-token
cross-entropy, plus `kl` times KL(original || student) if that is asked for.

Our choices, for the paper's are not known: the layer maps (`top` is YOCO's, arXiv 2405.05254;
`pairs` is CLA's, arXiv 2405.12981), the schedule, what is trained and how.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.objectives import DISTILLED
from effbench.api.parts import low_rank
from effbench.api.points import Point
from effbench.api.schema import Fraction, NonNegativeFloat, PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.sharing import (
    TAKEN,
    LayerMap,
    Mode,
    check_share,
    listed_map,
    pair_map,
    require_unshared,
    top_map,
)
from effbench.methods.sharing.shares import Shares
from effbench.methods.trains import START
from effbench.nn.adapters import growth
from effbench.nn.llama import shared_attention
from effbench.nn.losses import token
from effbench.nn.sharing import conversion
from effbench.util.lazy import torch


@dataclass(frozen=True)
class EchoLLaMA(Shares):
    """Cross-layer sharing by conversion, or from scratch on a model with random weights."""

    paper: ClassVar[Paper | None] = Paper(
        "ECHO-LLaMA: Efficient Caching for High-Performance LLaMA Training",
        "EMNLP 2025 industry track",
        "2505.17331",
    )
    learning_rate: ClassVar[float] = 1e-4
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    identity: ClassVar[dict[str, Any] | None] = {"share": 0.0}

    map: Literal["top", "pairs"] = "top"
    """Who takes from whom: the uppermost layers from the one below them, or odd layers from the
    even one before, the uppermost first."""
    share: Fraction = 0.5
    """Share of the layers that are consumers."""
    layers: tuple[PositiveInt, ...] = ()
    """The consumers themselves, instead of `map` and `share`; each takes from the nearest earlier
    layer that is not listed."""
    mode: Mode = "kv"
    """What is taken: keys and values, or queries and keys (the attention map)."""
    blend: bool = True
    """Convert layer by layer, with a rising; false converts all before the first step."""
    adapt: Fraction = 0.5
    """Share of the run's steps in which layers are converted; 0 is like blend=false."""
    order: Literal["down", "up"] = "down"
    """Whether the last consumer is converted first, or the first one."""
    producer_init: Literal["keep", "mean"] = "keep"
    """Whether a source starts from its own weights, or from the mean over all that share them."""
    kl: NonNegativeFloat = 0.0
    """Weight of KL(original || student) in the loss; the original is a frozen copy."""
    trains: Literal["full", "lora"] = "full"
    """Every weight, or adapters where sharing changes something: q and o of consumers, k and v of
    sources (with mode=qk: v and o, q and k). They are merged at the end."""
    rank: PositiveInt = 16
    """Rank of those adapters; their scale is 1."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters where it trains."""
        return "float32" if self.trains == "full" else "compute"

    @property
    def abrupt(self) -> bool:
        """Whether all layers are converted before the first step."""
        return not self.blend or not self.adapt

    # -- who takes from whom -------------------------------------------------------------------

    def sharing(self, num_layers: int) -> LayerMap:
        """Return the layer map that a model of so many layers ends with."""
        if self.layers:
            return listed_map(num_layers, self.layers, self.mode)
        make = top_map if self.map == "top" else pair_map
        return make(num_layers, round(self.share * num_layers), self.mode)

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse a model that shares or is sliced, and more consumers than a map can have."""
        require_unshared(shape, self.name)
        if not self.layers:
            check_share(self.share, shape.num_layers, self.map)
        self.sharing(shape.num_layers)
        return self

    def aux_models(self) -> dict[str, str]:
        """Return the original, a frozen copy of what it starts from."""
        return {"original": START} if self.kl else {}

    def spans(self, num_layers: int, total_steps: int) -> dict[int, tuple[int, int]]:
        """Return the first step of each consumer's conversion and the one after its last."""
        consumers = self.sharing(num_layers).consumers
        ordered = consumers if self.order == "up" else consumers[::-1]
        return conversion.spans(ordered, max(1, round(self.adapt * total_steps)))

    def adapted(self, num_layers: int) -> Iterator[tuple[int, str]]:
        """Yield `(layer, linear)` of every adapter that `trains=lora` has."""
        sharing = self.sharing(num_layers)
        own = ("q_proj", "o_proj") if self.mode == "kv" else ("v_proj", "o_proj")
        for layer in range(num_layers):
            if layer in sharing.consumers:
                yield from ((layer, name) for name in own)
            elif layer in sharing.givers:
                yield from ((layer, name) for name in TAKEN[self.mode])

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Make the model ready to share, or let it share at once; mark what trains."""
        config: Any = model.config
        sharing = self.sharing(config.num_hidden_layers)
        if self.producer_init == "mean":
            conversion.average_sources(model, sharing)
        put = shared_attention.share if self.abrupt else shared_attention.put_sharing
        model = put(model, sharing)
        model.requires_grad_(self.trains == "full")
        if self.trains == "lora":
            adapted = self.adapted(config.num_hidden_layers)
            names = (f"model.layers.{layer}.self_attn.{name}" for layer, name in adapted)
            growth.adapt(model, names, self.rank, 1, ctx.seed)
        return model

    # -- training ------------------------------------------------------------------------------

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what converts the consumers, one after the other."""
        spans = self.spans(int(model.config.num_hidden_layers), ctx.total_steps)  # type: ignore[union-attr,arg-type]
        return conversion.LayerByLayer(model, ctx, spans)

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the cross-entropy of one micro-batch, with the distance to the original added."""
        if not self.kl:
            return super().loss(model, batch, ctx)
        logits = self.logits(model, batch)
        with torch.no_grad():
            target = self.logits(ctx.aux["original"], batch)
        hard = batch.weighed(token.token_nll(logits, batch.labels)).sum()
        soft = batch.weighed(token.token_kl(target, logits, batch.labels, 1.0)).sum()
        return (hard + self.kl * soft) / batch.window_tokens

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the model with every consumer converted and adapters merged."""
        conversion.convert_rest(model)
        if self.trains == "lora":
            model = growth.merge(model).requires_grad_(False)
        return model

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Share states; while it trains, only if all layers are converted before the first step."""
        shares = self.shared(base, folder)
        if phase == "use":
            return shares.trained() if self.trains == "full" else shares
        first = shares if self.abrupt else base
        if self.trains == "full":
            model = first.trained()
        else:
            chosen = set(self.adapted(base.num_layers))
            model = first.adapted(
                lambda i, x: low_rank(x.d_in, x.d_out, self.rank) if (i, x.name) in chosen else None
            )
        return replace(model, objective=DISTILLED) if self.kl else model
