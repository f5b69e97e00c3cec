"""EchoAtt: layers take the attention map of an earlier layer; distillation makes up for it.

Rajabzadeh et al., EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models,
NeurIPS 2024 ENLSP-IV workshop, arXiv 2409.14595.

    source i:  A = softmax(Q_i K_i^T / sqrt(d_head) + mask)                  [B, H, T, T]
               O_i = A V_i
    shared j:  O_j = A V_j        V_j = v_proj_j(norm_j(h)); own o_proj, MLP and norms

The source of a shared layer is the nearest earlier layer that is not shared. q_proj and k_proj of
shared layers are gone, and decoding caches only their values. Every other weight starts as the
model's own and trains, against the unchanged model as its teacher and then on the labels:

    stage 1:  a L_I + b L_S + c L_H    (nn.losses.distill has the three terms)
    stage 2:  cross-entropy to the labels

From the paper: sharing, a = b = 0.25, c = 0.5, student first in the divergence, learning rate, and
a quarter as many tokens in stage 2. Ours: one schedule of the learning rate over both stages, terms
over the positions whose next token counts, L_I as a mean over features, and the choice of layers
where none are given (`effbench.nn.sharing.ranking`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution, UntilNeeded
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.objectives import distilled_in_chunks
from effbench.api.points import Point
from effbench.api.schema import Fraction, NonNegativeFloat
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.sharing import listed_map
from effbench.methods.sharing.choice import ChoosesLayers
from effbench.methods.trains import START
from effbench.nn.decode.decoder import CopiedMaps, Decoder
from effbench.nn.llama import shared_attention
from effbench.nn.losses import distill
from effbench.nn.sharing.ranking import block_ends
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class EchoAtt(ChoosesLayers):
    """Attention maps copied between layers, and distillation from the unchanged model."""

    paper: ClassVar[Paper | None] = Paper(
        "EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models",
        "NeurIPS 2024 ENLSP-IV workshop",
        "2409.14595",
    )
    learning_rate: ClassVar[float] = 1e-4
    version: ClassVar[int] = 2
    """2: the teacher keeps its buffers, rotary frequencies among them, in float32."""
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    identity: ClassVar[dict[str, Any] | None] = {"layers": []}
    needs: ClassVar[dict[str, Any]] = {"layers": [2]}

    block_weight: NonNegativeFloat = 0.25
    """a, of L_I: the outputs of blocks."""
    soft_weight: NonNegativeFloat = 0.25
    """b, of L_S: the distributions."""
    hard_weight: NonNegativeFloat = 0.5
    """c, of L_H: the teacher's most likely tokens."""
    kl: Literal["student_teacher", "teacher_student"] = "student_teacher"
    """Whose distribution comes first in the divergence."""
    refine: Fraction = 0.2
    """Share of the steps, at the end, that train on the labels alone; 1 distils nothing."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters."""
        return "float32"

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse layers that cannot be shared, more than there are, and a loss without terms."""
        if self.distils and not (self.block_weight + self.soft_weight + self.hard_weight):
            raise UserError(
                "All three weights of the distillation are 0.",
                "Raise one of them, or distil nothing: method.refine=1",
            )
        return super().resolve(shape)

    def aux_models(self) -> dict[str, str]:
        """Return the teacher, a frozen copy of what it starts from."""
        return {"teacher": START} if self.distils else {}

    @property
    def distils(self) -> bool:
        """Whether any step needs the teacher."""
        return self.refine < 1

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Let the chosen layers share; every weight that is left trains."""
        config: Any = model.config
        length = config.num_hidden_layers
        model = shared_attention.share(model, listed_map(length, self.chosen(length, ctx), "qk"))
        model.requires_grad_(True)
        return model

    # -- training ------------------------------------------------------------------------------

    def refining(self, ctx: Context) -> bool:
        """Whether a step belongs to the second stage."""
        return ctx.step >= ctx.total_steps - round(self.refine * ctx.total_steps)

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what lets go of the teacher once the second stage begins."""
        return UntilNeeded(ctx.aux, lambda: not self.refining(ctx))

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch in the stage that its step belongs to."""
        if self.refining(ctx):
            return super().loss(model, batch, ctx)
        sharing = shared_attention.map_of(model)
        terms = distill.three_terms(
            model,
            ctx.aux["teacher"],
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
            batch.labels,
            block_ends(sharing.consumers if sharing else ()),
            self.kl,
            batch.token_weights,
        )
        mixed = self.block_weight * terms.blocks
        mixed = mixed + self.soft_weight * terms.soft + self.hard_weight * terms.hard
        return mixed / batch.window_tokens

    # -- use -----------------------------------------------------------------------------------

    def decoder(self, point: Point) -> Decoder:
        """Return that maps are handed on where our engine does not apply."""
        return Decoder(CopiedMaps())

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Share the maps of the chosen layers, any as many before they are, and train the rest."""
        model = self.shared(base, folder).trained()
        if phase == "use" or not self.distils:
            return model
        return replace(model, objective=distilled_in_chunks(base.vocab_size))
