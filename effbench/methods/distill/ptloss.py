"""PTLoss: distillation by a perturbed loss, which teaches what a better teacher would say.

Zhang et al., Knowledge Distillation with Perturbed Loss: From a Vanilla Teacher to a Proxy Teacher,
KDD 2024, doi 10.1145/3637528.3671851, arXiv 2305.05010.

    loss = T^2 [ KL(p_t || p_s) + sum_c p_t sum_{m=1}^{M} eps_{c,m} (1 - p_s)^m ]  + beta CE

p_t and p_s are the teacher's and the student's distributions over C classes. The loss is least not
at p_t but at a proxy teacher's distribution. eps [C, M] is searched before training, so that the
proxy is near to the labels of a few rows (`nn.losses.proxy_search`); all other rows have no label.

The paper's: the loss, the proxy, the choice of eps by labels, M = 5, text classification. Ours: the
solver, the search and its guard; as classes a question's answers, p being the softmax of their
log-likelihoods; language models, where all tokens or those of similar rank share coefficients;
T^2, as in `kd`; every other default. At eps = 0 it is `kd` with weight 1 and the same temperature.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Interval

from effbench.api.evolution import Evolution
from effbench.api.examples import Example
from effbench.api.method_types import Context, Paper
from effbench.api.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from effbench.api.shape import AnyShape
from effbench.methods.distill.teaches import LABELLED, Teaches
from effbench.nn.losses import convexity, fitting, recalibration, teaching
from effbench.util.errors import UserError
from effbench.util.files import write_atomic
from effbench.util.lazy import torch

FOUND = "perturbation.json"
"""File of the artefact with the coefficients and how they were found."""
GROUPS = {"all": 1, "rank": 3}
"""Groups of coefficients, where that does not depend on the classes."""
FEWEST = 10
"""Labelled rows that a search needs: two for each fold."""


@dataclass(frozen=True)
class PTLoss(Teaches):
    """Training of every weight towards the proxy of a teacher."""

    paper: ClassVar[Paper | None] = Paper(
        "Knowledge Distillation with Perturbed Loss: From a Vanilla Teacher to a Proxy Teacher",
        "KDD 2024",
        "2305.05010",
    )
    needs: ClassVar[dict[str, Any]] = {"teacher": "tiny", "draws": 8}

    groups: Literal["all", "rank", "class"] = "all"
    """Classes that share coefficients: all; the teacher's first, its next nine and the rest; none,
    where all questions have the same answers."""
    orders: Annotated[int, Interval(gt=0, le=50)] = 5
    """M, terms of the series that are perturbed."""
    eps: tuple[tuple[float, ...], ...] | None = None
    """Coefficients, a list of M for each group; null searches them."""
    fit: Literal["eps", "temperature", "vector", "none"] = "eps"
    """What is fitted to labels: the coefficients, or, with plain KL, the teacher's temperature, or
    it and a bias for each class (vector scaling), or nothing."""
    draws: PositiveInt = 400
    """Random candidates of the search."""
    temperature: PositiveFloat = 1.0
    """T, by which the scores of both models are divided."""
    divergence: Literal["kl", "reverse_kl", "focal"] = "kl"
    """Baselines in the place of the perturbed KL."""
    gamma: NonNegativeFloat = 2.0
    """Exponent of the focal loss."""
    smoothing: Fraction = 0.0
    """Share of the uniform distribution that is mixed into the teacher's."""
    to_proxy: bool = False
    """Whether the proxy itself is solved for and taught by plain KL: the same minimum."""
    sharpen: PositiveFloat = 1.0
    """Factor by which the teacher's log-probabilities are multiplied, to spoil it on purpose."""
    bias: tuple[float, ...] = ()
    """What is added to the teacher's score of each answer, likewise."""

    @property
    def fits(self) -> bool:
        """Whether labels are looked at before training."""
        return self.eps is None and self.fit != "none"

    @property
    def perturbs(self) -> bool:
        """Whether the loss has coefficients."""
        return self.eps is not None or self.fit == "eps"

    @property
    def teaching(self) -> teaching.Teaching:
        """How the student is held against the teacher."""
        return teaching.Teaching(
            groups=self.groups if self.perturbs else "all",
            divergence=self.divergence,
            gamma=self.gamma,
            temperature=self.temperature,
            beta=self.beta,
            smoothing=self.smoothing,
            to_proxy=self.to_proxy,
            spoiled=recalibration.Recalibration(self.sharpen, self.bias),
        )

    # -- what is refused -----------------------------------------------------------------------

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse to run without a teacher, and settings that contradict each other."""
        if not self.teacher:
            raise UserError("ptloss has no teacher.", "Set method.teacher to the name of a model.")
        if self.over == "tokens":
            self._check_tokens()
        if self.perturbs and self.divergence != "kl":
            stated = f"method.divergence={self.divergence} has no coefficients."
            raise UserError(stated, "It is a baseline: method.fit=none")
        if self.fits and (self.temperature != 1 or self.smoothing):
            raise UserError(
                "Labels are fitted to at method.temperature=1, without method.smoothing.",
                "Leave both out, or fit nothing: method.fit=none",
            )
        convexity.check(self.eps, GROUPS.get(self.groups))
        return self

    def _check_tokens(self) -> None:
        """Refuse what depends on classes, of which a vocabulary has too many."""
        asked = {
            "groups=class": self.groups == "class",
            "fit=vector": self.fit == "vector",
            "to_proxy=true": self.to_proxy,
            "bias": bool(self.bias),
        }
        for setting in (name for name, is_so in asked.items() if is_so):
            raise UserError(
                f"method.{setting} is for few classes, not for a vocabulary.",
                "Set method.over=answers, or leave it out.",
            )

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Return all rows, with the labels of a few.

        Raises:
            UserError: For questions whose answers are no classes, and too few labels.
        """
        if self.groups == "class" or self.fit == "vector" or self.bias:
            self._check_classes([*examples, *ctx.splits.get(self.label_split, [])])
        rows = super().dataset(examples, model, ctx)
        if self.fits and (count := len(ctx.state[LABELLED])) < FEWEST:
            raise UserError(
                f"{count} labelled rows are too few to fit to.",
                f"Raise method.labels to {FEWEST} or more, or the rows of {self.label_split}.",
            )
        return rows

    def _check_classes(self, examples: Sequence[Example]) -> None:
        first, *rest = ([c.ids[c.prompt_length :] for c in e.choices] for e in examples)
        if any(answers != first for answers in rest):
            raise UserError(
                "Not all questions have the same answers, so that there are no classes.",
                "Set method.groups=all, method.fit=eps and no method.bias, or take other rows.",
            )
        convexity.check(self.eps, len(first) if self.groups == "class" else None)
        if self.bias and len(self.bias) != len(first):
            raise UserError(f"method.bias has {len(self.bias)} numbers for {len(first)} classes.")

    # -- training ------------------------------------------------------------------------------

    def reads_first(self, rows: int) -> int:
        """Return the labelled rows, which the teacher reads: over answers two sequences or more."""
        each = 2 if self.over == "answers" else 1
        known = min(self.labels, rows) if rows and self.label_split == "train" else self.labels
        return each * known if self.fits else 0

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what is fitted to the labelled rows before the first step."""
        rows = ctx.state.pop(LABELLED, [])
        classes = len(rows[0].choices) if rows else 1
        start = fitting.Fit(
            self.eps or fitting.zeros(GROUPS.get(self.groups, classes), self.orders)
        )
        how = partial(self._fit, rows, start, ctx) if self.fits else None
        return fitting.Fitting(start, how, ctx.note)

    def _fit(self, rows: Sequence[Example], start: fitting.Fit, ctx: Context) -> fitting.Fit:
        passes = sum(len(self.unit(row).sequences) for row in rows)
        return fitting.fit(
            self.known(rows, ctx), self.fit, self.groups, start, self.draws, ctx.seed, passes
        )

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the model with what was fitted, for its artefact."""
        model.fitted_to_labels = ctx.evolution.state_dict()
        return model

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the weights and what was fitted."""
        super().save(model, folder)
        if (found := getattr(model, "fitted_to_labels", None)) is not None:
            write_atomic(folder / FOUND, json.dumps(found, indent=1) + "\n")
