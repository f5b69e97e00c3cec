"""Encoder-decoders: the encoder reads a prompt, the decoder writes the answer to it.

A row is prompt and answer as one sequence, as for every other kind, and is split at its first
labelled token: what stands before it goes to the encoder, closed as the tokenizer closes a text,
and what follows goes to the decoder, shifted behind the token that its answers begin with. The
logits of the decoder stand at the places of the row that predict them, so that losses,
distillation and choices are what they are for causal models. No answer reaches the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from effbench.api.examples import IGNORED, Example, Turns
from effbench.nn.model_kinds.base import ModelKind, closed
from effbench.util.errors import UserError
from effbench.util.lazy import torch

FAMILIES = ("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus")
"""Model types whose decoder starts with one token, perhaps with a second that is always the same,
and then writes the answer, nothing else."""
START, FORCED = "decoder_start_token_id", "forced_bos_token_id"


class Seq2Seq(ModelKind):
    """What transformers loads as a sequence-to-sequence language model of T5's or BART's family."""

    noun: ClassVar[str] = "encoder-decoder of T5's or BART's family"
    instead: ClassVar[str] = (
        f"Give a decoder-only model, or one whose model_type is one of {', '.join(FAMILIES)}."
    )
    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    caches: ClassVar[bool] = False
    windows: ClassVar[bool] = False
    fills: ClassVar[bool] = False
    forms: ClassVar[tuple[str, ...]] = ("transformers", "peft")
    task: ClassVar[str] = "SEQ_2_SEQ_LM"
    rows: ClassVar[str] = "asks"
    other_rows: ClassVar[tuple[str, str]] = (
        "A model with an encoder answers prompts, and the rows are plain text.",
        "Use rows with prompts and answers, such as dataset.kind=pairs.",
    )

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether it has an encoder beside its decoder."""
        return bool(config.get("is_encoder_decoder"))

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return what is not known of how its answers begin."""
        if not config.get("is_encoder_decoder"):
            return "it has no encoder beside a decoder"
        if config.get("model_type") not in FAMILIES:
            return "it has an encoder, and how its decoder begins an answer is not known here"
        if not isinstance(config.get(START), int):
            return f"it has an encoder, and its config has no {START}"
        return ""

    def made(self, model: Any) -> bool:
        """Whether a loaded model has an encoder and a decoder."""
        return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def adjust(self, model: Any, config: Mapping[str, Any]) -> None:
        """Give a new model a head of its own where its files have one.

        transformers ties it whatever the config says, until it finds one in the files.
        """
        if config.get("tie_word_embeddings") is False:
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
            model.all_tied_weights_keys.pop("lm_head.weight", None)

    def stated(self, model: Any) -> dict[str, Any]:
        """Return whether the head is tied: transformers' own config holds it to be, always."""
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return {"tie_word_embeddings": tied}

    def example(self, example: Example, closing: list[int], outputs: int) -> Example:
        """Return a row whose prompts end as texts of their own do."""
        if any(isinstance(s, Turns) and s.silent for s in example.sequences):
            raise UserError(
                "A model with an encoder gives one answer to a prompt, and a row has several.",
                "Train on the last one alone: dataset.turns=last",
            )
        sequences = tuple(closed(s, closing) for s in example.sequences)
        choices = tuple(closed(c, closing) for c in example.choices)
        return replace(example, sequences=sequences, choices=choices)

    def prompt(self, ids: list[int], closing: list[int]) -> list[int]:
        """Return a prompt that ends as a text of its own does."""
        return [*ids, *closing]

    def logits(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of rows, [B, T, V]; zero where nothing of an answer is predicted."""
        places = torch.arange(ids.shape[1], device=ids.device)
        unlabelled = (labels == IGNORED).long().cumprod(1) * mask
        prompts = unlabelled.sum(1, keepdim=True).clamp(min=1)
        asked = (places >= prompts) * mask.bool()
        width, longest = int(prompts.max()), max(1, int(asked.sum(1).max()))
        at = prompts + places[:longest]
        known = at < mask.sum(1, keepdim=True)
        answers = ids.gather(1, at.clamp(max=ids.shape[1] - 1))
        start = beginning(model, ids)
        found = model(
            input_ids=ids[:, :width],
            attention_mask=(places < prompts)[:, :width].long(),
            decoder_input_ids=torch.cat([start, answers[:, :-1]], 1),
            use_cache=False,
        ).logits[:, start.shape[1] - 1 :]
        logits: torch.Tensor = found.new_zeros(*ids.shape, found.shape[-1])
        rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(at)
        logits[rows[known], at[known] - 1] = found[known]
        return logits

    def blocks(self, model: Any) -> torch.nn.ModuleList:
        """Return the blocks of the encoder, and after them those of the decoder."""
        of = super().blocks
        return torch.nn.ModuleList([*of(model.get_encoder()), *of(model.get_decoder())])

    def encoding(self, model: Any) -> int:
        """Return how many of its blocks read prompts alone."""
        return len(super().blocks(model.get_encoder()))

    def ready(self, model: Any) -> None:
        """Let feed-forward layers take adapters and packed weights, which T5's own would not.

        Theirs casts what the last linear reads to the dtype of its weight, whatever stands there.
        """
        for block in self.blocks(model):
            for module in block.modules():
                if hasattr(module, "wo"):
                    vars(module)["forward"] = partial(_feed_forward, module)


def beginning(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the tokens that the decoder reads before an answer to each row of ids, [B, 1 or 2].

    The second is what `generate` of transformers lets every answer begin with, where the model's
    settings name it: it is no part of the answer.
    """
    forced = getattr(model.generation_config, FORCED, None)
    tokens = [getattr(model.config, START), *([] if forced is None else [forced])]
    return torch.tensor([tokens], device=ids.device, dtype=ids.dtype).expand(len(ids), -1)


def _feed_forward(module: Any, states: torch.Tensor) -> torch.Tensor:
    """Return what a feed-forward layer of T5 makes of states [B, T, d]."""
    if hasattr(module, "wi"):
        inner = module.act(module.wi(states))
    else:
        inner = module.act(module.wi_0(states)) * module.wi_1(states)
    out: torch.Tensor = module.wo(module.dropout(inner))
    return out
