"""Encoders with a masked-LM head: what word belongs where a text has a mask token.

They give states of texts, and words; nothing is trained of them. A row is a text, closed as its
tokenizer closes one, with its answers behind it, which the model never reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from effbench.api.examples import Example
from effbench.nn.model_kinds.base import closed
from effbench.nn.model_kinds.classifier import Classifier, padding_of
from effbench.util.errors import UserError
from effbench.util.lazy import torch


class Masked(Classifier):
    """What transformers loads for masked language modelling."""

    noun: ClassVar[str] = "encoder with a masked-LM head"
    instead: ClassVar[str] = "Give an encoder of those that transformers calls ...ForMaskedLM."
    auto: ClassVar[str] = "AutoModelForMaskedLM"
    endings: ClassVar[tuple[str, ...]] = ("ForMaskedLM",)
    speaks: ClassVar[bool] = True
    fills: ClassVar[bool] = True
    forms: ClassVar[tuple[str, ...]] = ("transformers",)
    task: ClassVar[str] = "FEATURE_EXTRACTION"
    evaluator: ClassVar[str] = "preference"
    other_rows: ClassVar[tuple[str, str]] = (
        "What works on an encoder says which of several classes a text is of, and the rows have "
        "none.",
        "Use texts with the same answers for each: dataset.kind=choices",
    )

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return what is read by an encoder and a decoder."""
        return "it has a decoder beside its encoder" if config.get("is_encoder_decoder") else ""

    def example(self, example: Example, closing: list[int], outputs: int) -> Example:
        """Return a text closed, with its answers behind it."""
        if not example.choices:
            raise UserError(*self.other_rows)
        choices = tuple(closed(c, closing) for c in example.choices)
        return replace(example, sequences=(choices[example.right],), choices=choices)

    def logits(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return what token belongs to each position, as far as the model tells, [B, T, V]."""
        ids = ids.masked_fill(mask == 0, padding_of(model))
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
        return found

    def heads(self, model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield what stands beside the body."""
        body = str(model.base_model_prefix)
        for name, module in model.named_children():
            if name != body and next(module.parameters(), None) is not None:
                yield name, module

    def ready(self, model: Any) -> None:
        """Leave it as it is: its head is in the dtype of its body."""
