"""Settings of transformers' generate that come with a model, and are named where they change it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BartConfig, GenerationConfig

from effbench.nn.decode.not_followed import CHOOSING, DRAWING, not_followed
from effbench.runner.open import open_model
from effbench.testing.bench import Bench

OF_THE_OUTPUT = {
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "num_return_sequences", "pad_token_id"),
}
OF_ITS_LENGTH_AND_ENDS = {
    *("max_length", "max_new_tokens", "max_time", "bos_token_id", "eos_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "cache_config"),
}
OF_BEAMS = {
    *("early_stopping", "length_penalty", "diversity_penalty", "constraints", "force_words_ids"),
}
"""Nothing without `num_beams`, which is named."""
OF_HOW_IT_IS_COMPUTED = {
    *("use_cache", "cache_implementation", "max_cache_len", "renormalize_logits", "use_mtp"),
    *("remove_invalid_values", "is_assistant", "num_assistant_tokens", "compile_config"),
    *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "disable_compile"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
    *("continuous_batching_config", "low_memory", "prefill_chunk_size"),
}
QWEN = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}


def model(**settings: Any) -> Any:
    return SimpleNamespace(generation_config=GenerationConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "drawing", "named"),
    [
        ({}, True, ""),
        ({"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": []}, True, ""),
        ({"temperature": 0.7}, True, ""),  # it does not draw
        ({"repetition_penalty": 1.05, **QWEN}, False, "repetition_penalty=1.05"),
        (QWEN, True, "do_sample=True, temperature=0.7, top_k=20, top_p=0.8"),
        ({"suppress_tokens": list(range(99))}, False, "suppress_tokens (99)"),
        ({"suppress_tokens": [1, 2]}, False, "suppress_tokens=[1, 2]"),
    ],
)
def test_what_changes_an_answer_is_named(settings: Any, drawing: bool, named: str) -> None:
    sentence = f"Not followed of the model's own generation settings: {named}."
    assert not_followed(model(**settings), drawing) == ([sentence] if named else [])


def test_a_bart_forces_an_end() -> None:
    settings = GenerationConfig.from_model_config(BartConfig())
    [said] = not_followed(SimpleNamespace(generation_config=settings))
    assert said.endswith(": forced_eos_token_id=2.")
    assert not_followed(SimpleNamespace()) == []


def test_every_setting_of_transformers_is_thought_of() -> None:
    known = OF_THE_OUTPUT | OF_ITS_LENGTH_AND_ENDS | OF_BEAMS | OF_HOW_IT_IS_COMPUTED
    there = {name for name in vars(GenerationConfig()) if name[0] != "_"}
    known |= {*CHOOSING, *DRAWING, "do_sample", "top_h", "transformers_version"}
    assert there - known == set()


def test_a_record_says_once_what_was_not_followed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(run: Any) -> Any:
        made = open_model(run)
        made.model.generation_config.repetition_penalty = 1.3
        return made

    monkeypatch.setattr("effbench.runner.stages.train.open_model", opened)
    words = ["method=qdylora", "method.rank=2", "dataset=arithmetic", "train.max_steps=1"]
    asked = [
        "evaluator=generation",
        "+dataset.limit.test=2",
        "evaluator.generation.max_new_tokens=2",
    ]
    record = bench.run("train", *words, *asked)
    assert len({m.point for m in record.metrics if m.name == "exact_match"}) == 2
    [said] = [note for note in record.notes if "Not followed" in note]
    assert "repetition_penalty=1.3" in said
