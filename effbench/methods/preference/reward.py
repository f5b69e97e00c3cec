"""Reward model: a scalar head that scores preferred answers above the others.

Ouyang et al., Training language models to follow instructions with human feedback, NeurIPS 2022,
arXiv 2203.02155; the pairwise loss is that of Bradley and Terry, 1952.

    r(x, y) = w . h_last(x, y)                      h_last [d]: last token, after the last norm
    loss    = - mean over the others y' of log sigmoid(r(x, y) - r(x, y'))       y preferred to y'

h comes from the model itself, whose base is frozen under LoRA or learns whole. The head has no
bias, which would cancel in the loss. Of a question with several wrong answers the right one is
preferred to each, and the question counts once. Our choices: w from N(0, 1 / (d + 1)) by the run's
seed, in float32; `head_rate` times the learning rate for it; the language model's own head stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.examples import Example
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.parts import Linear, Objective
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import PositiveFloat
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.spec import DatasetSpec
from effbench.api.weights import FLOAT32, MASTERS
from effbench.data.kinds import base as kinds
from effbench.methods.adapters.lora import LoRA
from effbench.methods.trains import Trains
from effbench.nn.adapters import peft_lora
from effbench.nn.losses import preference
from effbench.util.errors import UserError
from effbench.util.lazy import torch

HEAD = "reward_head"
"""Name of the head in the model."""


@dataclass(frozen=True)
class Reward(LoRA):
    """A Bradley-Terry reward model on preference pairs."""

    paper: ClassVar[Paper | None] = Paper(
        "Training language models to follow instructions with human feedback",
        "NeurIPS 2022",
        "2203.02155",
    )
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal"})
    learning_rate: ClassVar[float] = 2e-4
    merges: ClassVar[bool] = False
    answers_with: ClassVar[str] = "a head of its own"

    trains: Literal["lora", "full"] = "lora"
    """Adapters on a frozen base, or every weight; the head learns in both."""
    head_rate: PositiveFloat = 1.0
    """Share of the learning rate for the head."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters where it learns whole."""
        return "float32" if self.trains == "full" else "compute"

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse adapters that do not fit, and ranks to cut where there are no adapters."""
        if self.trains == "lora":
            return super().resolve(shape)
        if self.eval_ranks:
            raise UserError(
                "method.eval_ranks cuts adapters, and method.trains=full has none.",
                "Leave it out, or set method.trains=lora.",
            )
        return self

    @property
    def outputs(self) -> int:
        """Numbers that the head gives of an answer."""
        return 1

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse rows without an answer that is worse than another."""
        if not kinds.find(dataset.kind).choices:
            raise UserError(
                f"{self.name} learns from answers that are preferred to others; dataset "
                f"{dataset.called!r} is of kind {dataset.kind!r}.",
                "Use preference pairs (dataset.kind=preference) or questions with choices.",
            )

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Put the head in, and adapters where the base is frozen."""
        full = self.trains == "full"
        model = Trains.prepare(self, model, ctx) if full else super().prepare(model, ctx)
        width = model.get_input_embeddings().embedding_dim  # type: ignore[operator]
        draws = torch.Generator().manual_seed(ctx.seed)
        head = torch.nn.Linear(width, self.outputs, bias=False)
        first = torch.randn(self.outputs, width, generator=draws)
        with torch.no_grad():
            head.weight.copy_(first / (width + 1) ** 0.5)
        model.add_module(HEAD, head.to(next(model.parameters()).device))
        return model

    def param_groups(self, model: torch.nn.Module) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Return the head, and all else that trains."""
        head = list(model.get_submodule(HEAD).parameters())
        rest = [p for p in model.parameters() if p.requires_grad and p is not head[0]]
        return [(rest, 1.0), (head, self.head_rate)]

    # -- training ------------------------------------------------------------------------------

    def unit(self, example: Example) -> Example:
        """Return a question with its right answer and then all others."""
        return example.compared()

    def scores(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        """Return each sequence's reward, [B] float32, wherever the padding is."""
        return self.read(model, batch).squeeze(1)

    def read(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return what the head gives of each sequence, [B, outputs] float32."""
        head: Any = model.get_submodule(HEAD)
        found: torch.Tensor = head(last_states(model, batch).to(head.weight.dtype))
        return found.float()

    @property
    def loss_unit(self) -> str:
        """Losses are those of questions."""
        return "nats/row"

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the losses of a micro-batch's pairs over the examples of the window, a scalar."""
        losses, _ = self.validation(model, batch)
        if "weight" in batch.columns:
            losses = losses * batch.columns["weight"]
        return losses.sum() / batch.window_examples

    def validation(
        self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
    ) -> tuple[torch.Tensor, int]:
        """Return the loss of each example, [E], and how many there are."""
        losses = preference.bradley_terry(self.scores(model, batch), batch.sizes)
        return losses, len(losses)

    # -- artefact ------------------------------------------------------------------------------

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return None: an adapter alone would lose the head."""
        return None

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Add the head in float32, which decoding does not read; a step makes no logits."""
        full = self.trains == "full"
        model = base.trained() if full else super().shape(base, point, phase, folder)
        held = MASTERS if full else FLOAT32
        head = Linear(HEAD, base.hidden_size, self.outputs, held, trains=True)
        objective = Objective(logit_bytes=0, reads_out=False)
        return replace(model, more=(head,), objective=objective)


def last_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the hidden state of each sequence's last token, after the last norm, [B, d]."""
    decoder: Any = getattr(model, str(model.base_model_prefix))
    states: torch.Tensor = decoder(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    last = batch.attention_mask.shape[1] - 1 - batch.attention_mask.flip(1).argmax(1)
    return states[torch.arange(len(last), device=last.device), last]
