"""Training on a share of the data, chosen by a model's loss or by lot.

After Marion et al., When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale,
2023, arXiv 2309.04564, who rank texts by a reference model's perplexity and keep one part of the
ranking.

    score(row) = mean over its loss tokens of -log p_reference(token | before)      in nats

Our choices: fine-tuning of a LoRA adapter instead of pretraining; the mean loss itself (perplexity
is its exponential, so the ranking is the same); rows kept in the data's own order, ties won by the
lower index; rows without loss tokens last in every ranking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from effbench.api.batch import collate
from effbench.api.examples import Example
from effbench.api.method_types import Context, Paper
from effbench.methods.adapters.lora import LoRA
from effbench.methods.trains import require_same_tokens
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Subset(LoRA):
    """LoRA on a share of the rows."""

    paper: ClassVar[Paper | None] = Paper(
        "When Less is More: Investigating Data Pruning for Pretraining LLMs at Scale",
        "arXiv 2023",
        "2309.04564",
    )

    fraction: Annotated[float, Interval(gt=0, le=1)] = 0.5
    """Share of the rows to train on; at least one row."""
    by: Literal["random", "lowest_loss", "highest_loss"] = "random"
    """Which rows: drawn by the seed, or those the reference finds easiest or hardest."""
    reference: str = ""
    """Name of the model config that scores the rows; empty for the model itself before training."""

    def consults(self) -> tuple[str, ...]:
        """Return the reference, where rows are scored by one."""
        scored = self.by != "random" and self.reference
        return (self.reference,) if scored else ()

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Return the chosen rows in order; `model` is the base, before anything is put into it.

        Raises:
            UserError: When the reference's vocabulary is not the model's.
        """
        keep = max(1, round(self.fraction * len(examples)))
        return [examples[i] for i in sorted(self.ranking(examples, model, ctx)[:keep])]

    def ranking(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[int]:
        """Return the places of all rows, those first that are to be kept."""
        if self.by == "random":
            generator = torch.Generator().manual_seed(ctx.seed)
            return torch.randperm(len(examples), generator=generator).tolist()
        judge = ctx.load_model(self.reference) if self.reference else model
        require_same_tokens("reference", self.reference, judge, model)
        losses = self.mean_losses(judge, examples, ctx)
        sign = 1 if self.by == "lowest_loss" else -1
        return sorted(
            range(len(examples)), key=lambda i: (math.isnan(losses[i]), sign * losses[i], i)
        )

    def mean_losses(
        self, model: torch.nn.Module, examples: Sequence[Example], ctx: Context
    ) -> list[float]:
        """Return each row's mean loss over its tokens that count, in nats; NaN where none does."""
        training = model.training
        model.eval()
        losses = []
        with torch.no_grad():
            for example in examples:
                batch = collate([example], pad_token_id=0).to(ctx.device)  # alone, so not padded
                total = float(self.token_nll(model, batch).sum())
                losses.append(total / batch.loss_tokens if batch.loss_tokens else math.nan)
        model.train(training)
        return losses
