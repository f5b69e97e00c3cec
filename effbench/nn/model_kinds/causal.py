"""Decoders: each token is predicted from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from effbench.nn.model_kinds.base import ModelKind

ENDINGS = ("ForCausalLM", "LMHeadModel")
BOTH_WAYS = ("bert", "roberta", "xlm-roberta", "electra", "camembert", "megatron-bert", "rembert")
"""Model types that read in both directions unless their config says `is_decoder`."""


class Causal(ModelKind):
    """What transformers loads as a causal language model."""

    instead: ClassVar[str] = (
        "Give a decoder-only model: one of those that transformers calls ...ForCausalLM. "
        "An encoder can be a classifier: model.kind=classifier"
    )
    endings: ClassVar[tuple[str, ...]] = ENDINGS

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return what reads its text in both directions, or with an encoder."""
        classes = config.get("architectures") or []
        if config.get("is_encoder_decoder"):
            return "it has an encoder"
        if classes and not any(name.endswith(ENDINGS) for name in classes):
            return f"its weights are those of a {classes[0]}"
        if config.get("model_type") in BOTH_WAYS and not config.get("is_decoder"):
            return "each of its tokens sees those after it"
        return ""
