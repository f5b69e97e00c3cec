"""What a model's own generation settings ask of whoever lets it write, and decoding does not do.

transformers' `generate` follows the `generation_config` of a model unless it is told otherwise.
Here answers end at its end tokens and, in encoder-decoders, begin with its forced first token. All
else that changes which token is taken is named, in the record of an evaluation and in a chat.
"""

from __future__ import annotations

from typing import Any

CHOOSING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ({}, []),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "watermarking_config": (),
    "stop_strings": ([], ""),
    "token_healing": (False,),
}
"""Settings that change what is written even where the most likely token is taken, each with the
values that do nothing, besides none at all."""
DRAWING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
SHOWN = 24
"""Most characters of a value that are shown."""


def not_followed(model: Any, drawing: bool = False) -> list[str]:
    """Return a sentence that names the settings which are not followed, if there are any.

    Args:
        model: The one that writes.
        drawing: Whether to name also how it would draw, where it says that it draws.
    """
    settings = getattr(model, "generation_config", None)
    found = [name for name, idle in CHOOSING.items() if _is_set(settings, name, idle)]
    if drawing and getattr(settings, "do_sample", None):
        found += ["do_sample", *(name for name in DRAWING if _is_set(settings, name, ()))]
    named = ", ".join(_shown(name, getattr(settings, name)) for name in found)
    return [f"Not followed of the model's own generation settings: {named}."] if named else []


def _is_set(settings: Any, name: str, idle: tuple[Any, ...]) -> bool:
    value = getattr(settings, name, None)
    return value is not None and value not in idle


def _shown(name: str, value: Any) -> str:
    text = f"{name}={value}"
    return text if len(text) <= len(name) + SHOWN else f"{name} ({len(value)})"
