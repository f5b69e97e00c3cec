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

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.parts import Objective, low_rank
from effbench.api.schema import Fraction, NonNegativeFloat, PositiveInt
from effbench.api.shape import ModelShape, Phase, Shape
from effbench.api.sharing import (
    TAKEN,
    LayerMap,
    Mode,
    listed_map,
    pair_map,
    require_unshared,
    shared_in,
    shared_shape,
    top_map,
)
from effbench.methods.base import Method
from effbench.methods.distill.kd import DISTILLED_BYTES
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class EchoLLaMA(Method):
    """Cross-layer sharing by conversion, or from scratch on a model with random weights."""

    paper: ClassVar[Paper | None] = Paper(
        "ECHO-LLaMA: Efficient Caching for High-Performance LLaMA Training",
        "EMNLP 2025 industry track",
        "2505.17331",
    )
    learning_rate: ClassVar[float] = 1e-4
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

    def check(self, shape: Shape) -> None:
        """Refuse a model that shares or is sliced, and more consumers than a map can have."""
        require_unshared(shape, self.name)
        most = shape.num_layers - 1 if self.map == "top" else shape.num_layers // 2
        if not self.layers and round(self.share * shape.num_layers) > most:
            raise UserError(
                f"method.share={self.share} of {shape.num_layers} layers is more than the {most} "
                f"consumers that map={self.map} can have.",
                f"Set method.share={most / shape.num_layers:.3g} or less.",
            )
        self.sharing(shape.num_layers)

    def spans(self, num_layers: int, total_steps: int) -> dict[int, tuple[int, int]]:
        """Return the first step of each consumer's conversion and the one after its last."""
        consumers = self.sharing(num_layers).consumers
        ordered = consumers if self.order == "up" else consumers[::-1]
        steps = max(1, round(self.adapt * total_steps))
        count = len(ordered)
        return {
            layer: (place * steps // count, (place + 1) * steps // count)
            for place, layer in enumerate(ordered)
        }

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
        from effbench.nn.llama.shared_attention import put_sharing, share

        if self.kl:
            self._keep_original(model, ctx)
        sharing = self.sharing(int(model.config.num_hidden_layers))  # type: ignore[union-attr,arg-type]
        if self.producer_init == "mean":
            average_sources(model, sharing)
        model = share(model, sharing) if self.abrupt else put_sharing(model, sharing)
        model.requires_grad_(self.trains == "full")
        if self.trains == "lora":
            self._adapt(model, ctx.seed)
        ctx.state["converted"] = list(sharing.consumers) if self.abrupt else []
        return model

    def _keep_original(self, model: torch.nn.Module, ctx: Context) -> None:
        from effbench.nn.llama.weights import cast_parameters

        original = copy.deepcopy(model).requires_grad_(False).eval()
        cast_parameters(original, ctx.dtype)
        # Straight in __dict__ it is no part of the model: neither trained, moved nor saved with it.
        vars(model)["original"] = original

    def _adapt(self, model: Any, seed: int) -> None:
        from effbench.nn.adapters.lowrank import LowRankLinear, RankControl, init_a
        from effbench.nn.llama.replace import replace_module

        for layer, name in self.adapted(len(model.model.layers)):
            path = f"model.layers.{layer}.self_attn.{name}"
            part = LowRankLinear(model.get_submodule(path), RankControl(self.rank), self.rank)
            init_a(part.lora_A, seed, path)
            replace_module(model, path, part)

    def rebuild(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Convert the layers that the interrupted run had converted."""
        from effbench.nn.llama.shared_attention import convert, sharing_layers

        done = {m.layer for m in sharing_layers(model) if m.takes}
        for layer in ctx.state["converted"]:
            if layer not in done:
                convert(model, layer)
        return model

    # -- training ------------------------------------------------------------------------------

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Set a of the layers that are on their way."""
        from effbench.nn.llama.shared_attention import sharing_layers

        layers = {m.layer: m for m in sharing_layers(model)}
        for layer, (first, end) in self.spans(len(layers), ctx.total_steps).items():
            if not layers[layer].takes:
                layers[layer].share = share_at(ctx.step, first, end)

    def on_gradients(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ctx: Context
    ) -> None:
        """Remove the projections of layers whose conversion ends with this step."""
        from effbench.nn.adapters.growth import drop
        from effbench.nn.llama.shared_attention import convert, sharing_layers

        layers = {m.layer: m for m in sharing_layers(model)}
        for layer, (_, end) in self.spans(len(layers), ctx.total_steps).items():
            if end <= ctx.step + 1 and not layers[layer].takes:
                drop(optimizer, convert(model, layer))
                ctx.state["converted"].append(layer)

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the cross-entropy of one micro-batch, with the distance to the original added."""
        if not self.kl:
            return super().loss(model, batch, ctx)
        from effbench.nn.losses.token import token_kl, token_nll

        logits = self.logits(model, batch)
        with torch.no_grad():
            target = self.logits(vars(model)["original"], batch)
        hard = token_nll(logits, batch.labels).sum()
        soft = token_kl(target, logits, batch.labels, 1.0).sum()
        return (hard + self.kl * soft) / batch.window_tokens

    def settled(self, model: torch.nn.Module, ctx: Context) -> bool:
        """Whether every consumer is converted."""
        from effbench.nn.llama.shared_attention import sharing_layers

        layers = sharing_layers(model)
        return not layers or len(ctx.state["converted"]) == len(layers[0].sharing.consumers)

    def facts(self, model: torch.nn.Module, ctx: Context) -> dict[str, float]:
        """Return how many layers are converted, those on their way in part."""
        from effbench.nn.llama.shared_attention import sharing_layers

        return {"converted": sum(m.share for m in sharing_layers(model))}

    def finish(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the model with every consumer converted and adapters merged."""
        from effbench.nn.adapters.growth import merge
        from effbench.nn.llama.shared_attention import convert, sharing_layers

        for attention in sharing_layers(model):
            if attention.source != attention.layer and not attention.takes:
                convert(model, attention.layer)
        if self.trains == "lora":
            model = merge(model).requires_grad_(False)
        vars(model)["whole"] = True
        return model

    def release(self, model: torch.nn.Module) -> None:
        """Let go of the original."""
        vars(model).pop("original", None)

    # -- artefact ------------------------------------------------------------------------------

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return what trains, and every weight once the model is finished."""
        if "whole" in vars(model):
            return {n: p.detach() for n, p in model.named_parameters()}
        return super().tensors(model)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write all weights and the layer map."""
        from effbench.nn.sharing.checkpoint import write_map

        super().save(model, folder)
        write_map(model, folder)

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` turned into the shared one of the artefact."""
        from effbench.nn.llama.weights import load_tensors
        from effbench.nn.sharing.checkpoint import follow_map

        model = follow_map(model, folder)
        vars(model)["whole"] = True
        load_tensors(self.tensors(model), folder / "weights.safetensors")
        return model.requires_grad_(False)

    def export(self, model: torch.nn.Module, point: str, folder: Path) -> None:
        """Write a folder that `model=folder` loads; no other tool knows the layer map."""
        from effbench.nn.sharing.checkpoint import write_shared

        write_shared(model, folder)

    # -- accounting ----------------------------------------------------------------------------

    def shape(self, base: ModelShape, point: str, phase: Phase, folder: Path | None) -> ModelShape:
        """Share states; while it trains, only if all layers are converted before the first step."""
        shares = shared_in(base, folder) or shared_shape(base, self.sharing(base.num_layers))
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
        objective = Objective(logit_bytes=DISTILLED_BYTES, every=True)
        return replace(model, objective=objective) if self.kl else model

    def holds(self) -> tuple[str, ...]:
        """Return the copy of what it starts from, if there is one."""
        return ("",) if self.kl else ()


def share_at(step: int, first: int, end: int) -> float:
    """Return a in a step (from 0) of a layer that is converted from step `first` until `end`."""
    if step < first:
        return 0.0
    return min(1.0, (step + 1 - first) / (end - first)) if end > first else 1.0


def average_sources(model: Any, sharing: LayerMap) -> None:
    """Set the projections of each source to the mean over itself and its consumers, in place."""
    layers = model.model.layers
    for source in sharing.givers:
        group = [i for i, s in enumerate(sharing.sources) if s == source]
        for name in TAKEN[sharing.mode]:
            parts = [getattr(layers[i].self_attn, name) for i in group]
            for mine, *others in zip(*(p.parameters() for p in parts), strict=True):
                mean = torch.stack([mine.data, *(o.data for o in others)]).float().mean(0)
                mine.data = mean.to(mine.dtype)
