"""Encoders with a classification head: one answer to a text, the class that it is of.

A row is the text and after it, as if it were a token, the number of its class. So a class has the
log-likelihood log softmax(z)_c of the head's logits z [C], and what is said of answers of language
models holds of it: losses, distillation, choices. The model itself never reads that number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from effbench.api.examples import IGNORED, Classed, Example, Tokens
from effbench.nn.model_kinds.base import ModelKind, closed
from effbench.util.errors import UserError
from effbench.util.lazy import torch

POOLER = "pooler"
"""What of BERT's body belongs to the head: it reads the first token's last state."""

OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer")
"""Model types whose positions are counted from the number of the padding token on."""


class Classifier(ModelKind):
    """What transformers loads for the classification of sequences."""

    noun: ClassVar[str] = "encoder with a classification head"
    instead: ClassVar[str] = (
        "Give an encoder, or one of those that transformers calls ...ForSequenceClassification."
    )
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    endings: ClassVar[tuple[str, ...]] = ("ForSequenceClassification",)
    caches: ClassVar[bool] = False
    speaks: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    fills: ClassVar[bool] = False
    forms: ClassVar[tuple[str, ...]] = ("transformers", "peft")
    task: ClassVar[str] = "SEQ_CLS"
    evaluator: ClassVar[str] = "choices"
    rows: ClassVar[str] = "choices"
    other_rows: ClassVar[tuple[str, str]] = (
        "A classifier learns which of several classes a text is of, and the rows have none.",
        "Use texts with the same answers for each: dataset.kind=choices",
    )

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether the weights are those of a classifier."""
        classes = config.get("architectures") or []
        return any(name.endswith(self.endings) for name in classes)

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return what is read by an encoder and a decoder, or gives numbers and no classes."""
        if config.get("is_encoder_decoder"):
            return "it has a decoder beside its encoder"
        if config.get("problem_type") not in (None, "single_label_classification"):
            return f"it is for {config['problem_type']}"
        return ""

    def adjust(self, model: Any, config: Mapping[str, Any]) -> None:
        """Refuse a model that cannot tell where a text ends: decoders answer at its last token."""
        if getattr(model.config, "pad_token_id", None) is None:
            raise UserError(
                f"A classifier of type {model.config.model_type!r} needs a token for padding.",
                "Set pad_token_id in its config.json to a token that no text ends with.",
            )

    def positions(self, config: Any) -> int:
        """Return the longest text; RoBERTa's positions begin behind that of its padding."""
        found = super().positions(config)
        offset = config.pad_token_id + 1 if config.model_type in OFFSET else 0
        return found - offset

    def example(self, example: Example, closing: list[int], outputs: int) -> Example:
        """Return a text with its class, and with each of the classes in order."""
        if not example.choices:
            raise UserError(*self.other_rows)
        if len(example.choices) != outputs:
            raise UserError(
                f"The model has {outputs} classes, but the rows {len(example.choices)} answers.",
                f"Set model.classes={len(example.choices)}, or take other rows.",
            )
        longest = max(example.choices, key=lambda c: c.prompt_length)
        text = closed(replace(longest, ids=longest.ids[: longest.prompt_length]), closing)
        choices = tuple(_classed(text, n, c) for n, c in enumerate(example.choices))
        return replace(example, sequences=(choices[example.right],), choices=choices)

    def logits(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of each text's class at all its positions, [B, T, C].

        The same text with several classes after it is read once.
        """
        asked = mask * (labels == IGNORED)
        width = max(1, int(asked.sum(1).max()))
        asked, texts = asked[:, :width], ids[:, :width]
        texts = texts.masked_fill(asked == 0, padding_of(model))
        both, rows = torch.stack([texts, asked], 1).unique(dim=0, return_inverse=True)
        found = model(input_ids=both[:, 0], attention_mask=both[:, 1]).logits
        each: torch.Tensor = found[rows][:, None].expand(-1, ids.shape[1], -1)
        return each

    def states(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states of texts, [B, T, d]."""
        inner = getattr(model, str(model.base_model_prefix))
        ids = ids.masked_fill(mask == 0, padding_of(model))
        found: torch.Tensor = inner(input_ids=ids, attention_mask=mask).last_hidden_state
        return found

    def heads(self, model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield the pooler, if there is one, and what stands beside the body."""
        body = str(model.base_model_prefix)
        pooler = getattr(getattr(model, body), POOLER, None)
        if pooler is not None:
            yield f"{body}.{POOLER}", pooler
        for name, module in model.named_children():
            if name != body and next(module.parameters(), None) is not None:
                yield name, module

    def ready(self, model: Any) -> None:
        """Let the head read states of any dtype, for it may be held in float32."""
        for _, head in self.heads(model):
            for module in head.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(_in_its_dtype)


def _classed(text: Tokens, number: int, answer: Tokens) -> Tokens:
    """Return a text with the number of a class after it, whose answer in words is known too."""
    size, said = answer.answer_bytes, tuple(answer.ids[answer.prompt_length :])
    ids = [*text.ids, number]
    return Classed(ids, text.prompt_length, size, (text.cut[0], 0), text.columns, said)


def padding_of(model: Any) -> int:
    """Return the token that stands where a text has ended."""
    found = getattr(model.config, "pad_token_id", None)
    return found if isinstance(found, int) else 0


def _in_its_dtype(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].to(module.weight.dtype), *inputs[1:])
