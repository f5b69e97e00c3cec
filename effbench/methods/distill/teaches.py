"""Distillation on rows of which only a few have a label: over next tokens, or over answers.

Over answers, a question of C answers gives the distribution softmax(l_1, ..., l_C), l_c being the
log-likelihood of answer c in nats, summed over its tokens, for teacher and student alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from effbench.api.batch import Batch, collate
from effbench.api.evolution import Evolution
from effbench.api.examples import Example
from effbench.api.method_types import Context, Weights
from effbench.api.objectives import perturbed_in_chunks
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import NonNegativeFloat, PositiveInt
from effbench.api.shape import Anatomy, ModelShape, Phase
from effbench.api.spec import DatasetSpec
from effbench.data.kinds import base as kinds
from effbench.methods.trains import START, Trains
from effbench.nn.losses import fitting, labelled, perturbed, teaching
from effbench.util.errors import UserError
from effbench.util.lazy import torch

LABELLED = "labelled"
"""Key of the rows whose label is known in `ctx.state`, until something is fitted to them."""
LABEL = "label"
"""Column of the right answer's place; `UNKNOWN` where it must not be known."""
UNKNOWN = -1
OWN_START = "start"
"""Teacher that the model itself was before training."""
ENTRIES = 64
"""Tokens whose probabilities are held one by one where coefficients are searched."""


@dataclass(frozen=True)
class Teaches(Trains):
    """Training of every weight towards a teacher's distribution, as `teaching` says."""

    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier"})
    learning_rate: ClassVar[float] = 5e-5

    teacher: str = ""
    """Name of the teacher's model config, the path of its folder, or `start`, a frozen copy of what
    training starts from; has to be set."""
    over: Literal["tokens", "answers"] = "tokens"
    """What p is over: next tokens, or the answers of a question (`dataset.kind=choices`)."""
    labels: PositiveInt = 200
    """Rows, drawn by the seed, whose label may be known."""
    label_split: str = "train"
    """The split that they are of. Rows of `train` are trained on all the same, without their label;
    those of another split are not."""
    search_tokens: PositiveInt = 500
    """Tokens of these rows that are looked at, where distributions are over tokens."""
    beta: NonNegativeFloat = 0.0
    """Weight of cross-entropy to the labels that are known; over tokens all are."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters."""
        return "float32"

    @property
    def teaching(self) -> teaching.Teaching:
        """How the student is held against the teacher."""
        return teaching.Teaching()

    def aux_models(self) -> dict[str, str]:
        """Return the teacher."""
        named = START if self.teacher == OWN_START else self.teacher
        return {"teacher": named} if self.teacher else {}

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse rows without answers to choose from, where distributions are over answers."""
        if self.over == "answers" and not kinds.find(dataset.kind).choices:
            raise UserError(
                f"method.over=answers needs questions with answers; dataset {dataset.called!r} is "
                f"of kind {dataset.kind!r}.",
                "Use dataset.kind=choices, or method.over=tokens.",
            )

    # -- rows ----------------------------------------------------------------------------------

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Return all rows, with the labels of a few; `ctx.state` has those few."""
        own = self.label_split == "train"
        source = examples if own else ctx.splits[self.label_split]
        draws = torch.Generator().manual_seed(ctx.seed)
        order = torch.randperm(len(source), generator=draws)[: self.labels].tolist()
        ctx.state[LABELLED] = [source[i] for i in sorted(order)]
        if self.over == "tokens":
            return list(examples)
        known = set(order) if own else set()
        places = [e.right if i in known else UNKNOWN for i, e in enumerate(examples)]
        return [
            replace(e, columns={**e.columns, LABEL: place})
            for e, place in zip(examples, places, strict=True)
        ]

    def splits(self) -> tuple[str, ...]:
        """Return the split of the labelled rows, where it is another one."""
        return () if self.label_split == "train" else (self.label_split,)

    def unit(self, example: Example) -> Example:
        """Return a question with all its answers, in the order of the classes."""
        if self.over == "tokens":
            return example
        columns = {LABEL: example.right, **example.columns}
        return replace(example, sequences=example.choices, columns=columns)

    def known(self, rows: Sequence[Example], ctx: Context) -> labelled.Labelled:
        """Return the teacher's distributions on rows whose label is known.

        Over tokens they are of `search_tokens` positions, as many of each row as there are of it,
        evenly spaced.
        """
        find = self._known_tokens if self.over == "tokens" else self._known_answer
        most = -(-self.search_tokens // len(rows))
        parts = []
        for number, row in enumerate(rows):
            batch = collate([self.unit(row)], pad_token_id=0).to(ctx.device)  # alone: not padded
            with torch.no_grad():
                log_t, labels = find(ctx.aux["teacher"], batch, most)
            parts.append((log_t, labels, torch.full_like(labels, number)))
        return labelled.joined([labelled.labelled(*part, entries=ENTRIES) for part in parts])

    def _known_answer(
        self, teacher: torch.nn.Module, batch: Batch, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.teaching.teacher(self.scores(teacher, batch)[None]), batch.columns[LABEL]

    def _known_tokens(
        self, teacher: torch.nn.Module, batch: Batch, most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        read = teaching.readout(teacher, batch)
        count = len(read.states)
        places = torch.linspace(0, max(0, count - 1), min(most, count), device=batch.labels.device)
        log_t = self.teaching.teacher(read.head(read.states[places.long()]).float())
        return log_t, teaching.counted_labels(batch)[places.long()]

    # -- training ------------------------------------------------------------------------------

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what has been fitted to labels: here nothing, and so plain KL."""
        return fitting.Fitting(fitting.Fit(fitting.zeros(1, 0)))

    @property
    def loss_unit(self) -> str:
        """Losses are those of tokens, or of questions."""
        return "nats/token" if self.over == "tokens" else "nats/row"

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of a micro-batch over the tokens or the questions of the window."""
        return (self._token_loss if self.over == "tokens" else self._answer_loss)(model, batch, ctx)

    def _answer_loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        with torch.no_grad():
            teacher = self.scores(ctx.aux["teacher"], batch)
        losses = self.teaching.losses(
            perturbed.padded(teacher, batch.sizes),
            perturbed.padded(self.scores(model, batch), batch.sizes),
            batch.columns[LABEL],
            ctx.evolution.fit,
        )
        if "weight" in batch.columns:
            losses = losses * batch.columns["weight"]
        return losses.sum() / batch.window_examples

    def _token_loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        student = teaching.readout(model, batch)
        with torch.no_grad():
            teacher = teaching.readout(ctx.aux["teacher"], batch)
        labels = teaching.counted_labels(batch)
        weights = batch.weighed(torch.ones_like(labels, dtype=torch.float32))
        total = self.teaching.token_loss(teacher, student, labels, weights, ctx.evolution.fit)
        return total / batch.window_tokens

    def validation(
        self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
    ) -> tuple[torch.Tensor, int]:
        """Return each token's loss, or each question's cross-entropy over its answers, [E]."""
        if self.over == "tokens":
            return super().validation(model, batch, point)
        scores = perturbed.padded(self.scores(model, batch, point), batch.sizes)
        losses = teaching.known_nll(scores, batch.columns[LABEL])
        return losses, len(losses)

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Train every weight; over tokens, with both models' logits a few positions at a time."""
        model = super().shape(base, point, phase, folder)
        if self.over == "answers" or phase == "use":
            return model
        return replace(model, objective=perturbed_in_chunks(base.vocab_size))
