"""MixLoRA: a dense model's MLPs become mixtures of low-rank experts, chosen by a router.

Li et al., MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts,
2024, arXiv 2404.15159. Each MLP stays frozen below E experts, k of which a token goes through:

    E_e(x) = (Wd + s Bd_e Ad_e) (act((Wg + s Bg_e Ag_e) x) * ((Wu + s Bu_e Au_e) x))  s = alpha/R
    y = sum over the k chosen e of w_e E_e(x)      w = softmax(Wr x), the k largest over their sum
    loss = cross-entropy + balance * E * sum over choices and e of f_e P_e

f is the share of tokens that chose e, P its mean probability over tokens and layers, padding left
out. Attention has plain LoRA. Nothing can be merged. The router is float32, N(0, 0.02) at first.

Our choices: A starts as in our other methods, so that one expert is LoRA; Wd is applied once to the
weighted sum of hidden states, for it is linear; the balancing term adds its gradient and not its
value to the loss, so that training losses can be compared, and steps say its value; sizes for small
models (the paper has R = 16, E = 8 for 7B).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper
from effbench.api.parts import LayerShape, Linear, low_rank
from effbench.api.points import Point
from effbench.api.schema import NonNegativeFloat, PositiveFloat, PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.weights import FLOAT32
from effbench.methods.adapters.lora import Dropout
from effbench.methods.adapters.targets import check_rank_fits
from effbench.methods.trains import Trains
from effbench.nn.adapters import lowrank, mixture
from effbench.nn.llama import surgery
from effbench.util.errors import UserError
from effbench.util.lazy import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MixLoRA(Trains):
    """Low-rank experts with a router on the MLPs, low-rank updates on attention."""

    paper: ClassVar[Paper | None] = Paper(
        "MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts",
        "arXiv 2024",
        "2404.15159",
    )
    learning_rate: ClassVar[float] = 1e-3
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense", "packed"})
    produces: ClassVar[str] = "adapted"
    identity: ClassVar[dict[str, Any] | None] = {"experts": 1, "top_k": 1}

    experts: PositiveInt = 4
    """Experts of each MLP, E."""
    top_k: PositiveInt = 2
    """Experts that a token goes through, k."""
    rank: PositiveInt = 4
    """Rank R of every update."""
    alpha: PositiveFloat = 8.0
    """Numerator of the updates' scale alpha / R."""
    dropout: Dropout = 0.0
    """Probability of dropping an update's input in training."""
    balance: NonNegativeFloat = 0.01
    """Weight of the balancing term; 0 lets the router do as it likes."""

    def __post_init__(self) -> None:
        if self.top_k > self.experts:
            raise UserError(
                f"method.top_k={self.top_k} is more than method.experts={self.experts}.",
                "Lower method.top_k.",
            )

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse a rank that is more than full for a linear."""
        check_rank_fits(shape, self.rank, (*ATTENTION, *MLP))
        return self

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Freeze the base, make mixtures of its MLPs, and adapt its attention."""
        model.requires_grad_(False)
        control, scale = lowrank.RankControl(self.rank), self.alpha / self.rank

        def adapt(name: str, linear: torch.nn.Module) -> lowrank.LowRankLinear:
            return lowrank.adapter(linear, name, control, self.alpha, ctx.seed, self.dropout)

        surgery.replace_linears(model, adapt, ATTENTION)
        sizes = self.experts, self.top_k, self.rank, scale, self.dropout, ctx.seed
        gated = [n for n, m in model.named_modules() if all(hasattr(m, part) for part in MLP)]
        if not gated:
            raise UserError(
                f"{type(model).__name__} has no gated MLP to make experts of.",
                "Choose a model of the Llama family.",
            )
        for name in gated:
            surgery.replace_module(
                model, name, mixture.MixtureMLP(model.get_submodule(name), *sizes, name)
            )
        return model

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what remembers a step's balance for its event."""
        return Balance()

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch, with the gradient of its share of the balance."""
        with mixture.router_logits(model) as logits:
            loss = super().loss(model, batch, ctx)
        mask = batch.attention_mask.flatten().repeat(len(mixture.mixtures(model)))
        term = mixture.balance(torch.cat(logits), mask, self.top_k)
        ctx.evolution.seen.append(float(term.detach()))
        share = self.balance * batch.weighted_tokens / batch.window_tokens
        return loss + share * (term - term.detach()) if share else loss

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Put routers and experts on the MLPs, and low-rank updates on attention."""

        def expert(linear: Linear) -> Linear:
            adapter = low_rank(linear.d_in, linear.d_out, self.rank)
            return replace(linear, adapter=replace(adapter, copies=self.experts, active=self.top_k))

        def mixed(_: int, layer: LayerShape) -> LayerShape:
            if layer.mlp is None:
                return layer
            router = Linear("router", base.hidden_size, self.experts, FLOAT32, trains=True)
            linears = (router, *(expert(x) for x in layer.mlp.linears))
            return replace(layer, mlp=replace(layer.mlp, linears=linears))

        return base.low_rank(self.rank, ATTENTION).map(mixed)


class Balance(Evolution):
    """Remembers how evenly a step's micro-batches used the experts."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def before_step(self) -> None:
        """Forget the step before."""
        self.seen.clear()

    def metrics(self) -> dict[str, float]:
        """Return the mean over micro-batches: k where experts are used alike."""
        return {"expert_balance": sum(self.seen) / len(self.seen)} if self.seen else {}
