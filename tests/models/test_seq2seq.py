"""Encoder-decoders: counted as they are, and trained as transformers' own loss would have it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from counting import context, counted, learn, require_counted, require_documented
from transformers import CONFIG_MAPPING

from effbench.api.batch import collate
from effbench.api.examples import IGNORED, Example, Tokens, Turns
from effbench.api.shape import ModelShape
from effbench.api.spec import ModelSpec
from effbench.api.weights import find as find_format
from effbench.api.weights import is_packed
from effbench.config.compose import compose
from effbench.evaluators.windows import cut
from effbench.methods.base import Method
from effbench.methods.chain import resolved
from effbench.models import load as models
from effbench.models.random import byte_tokenizer, random_of
from effbench.models.survey import empty_model, survey
from effbench.nn.decode import generate
from effbench.nn.decode.decoder import Decoder
from effbench.nn.decode.encoded import EncodedSession
from effbench.nn.model_kinds.base import find, kind_of
from effbench.nn.quant.linears import pack_linears
from effbench.testing.models import given, tiny_shape
from effbench.util.errors import UserError

KIND = find("seq2seq")
SIZES = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
OTHERS = {
    "vocab_size": 64,
    "d_model": 32,
    "max_position_embeddings": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "forced_eos_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "t5": SIZES,
    "mt5": SIZES,
    "umt5": {**SIZES, "feed_forward_proj": "gated-gelu"},
    "bart": OTHERS,
    "mbart": OTHERS,
    "marian": OTHERS,
    "pegasus": OTHERS,
}


SKIP = [IGNORED]
BEGUN = {"t5": [0], "bart": [0, 2], "mbart": [0], "pegasus": [0]}


def config(name: str, **more: Any) -> dict[str, Any]:
    return {**CONFIG_MAPPING[name](**MODELS[name]).to_dict(), **more}


@cache
def shape(name: str) -> ModelShape:
    return survey(empty_model(config(name), "seq2seq"))


def made(name: str) -> Any:
    model = random_of(config(name), KIND, 0)
    KIND.ready(model)
    if name == "bart":
        model.generation_config.forced_bos_token_id = 2
    for parameter in model.parameters():  # so that a token more is felt at all
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)
    return model


def row(prompt: list[int], answer: list[int]) -> Example:
    tokens = Tokens([*prompt, *answer], len(prompt), 1)
    return KIND.example(Example(str(prompt), (tokens,)), [1], 64)


ROWS = [row([5, 6, 7, 8, 9], [11, 12]), row([20], [21, 22, 23, 24, 1]), row([5, 6, 7], [30])]


def test_losses_are_those_of_transformers() -> None:
    for name in MODELS:
        model = made(name).double()
        batch = collate(ROWS, 0)
        logits = KIND.logits(model, batch.input_ids, batch.attention_mask, batch.labels)
        assert logits.dtype == torch.float64
        targets, counted = batch.labels[:, 1:], batch.labels[:, 1:] != -100
        nll = torch.nn.functional.cross_entropy(logits[:, :-1][counted], targets[counted])
        prompts = torch.tensor([[5, 6, 7, 8, 9, 1], [20, 1, 0, 0, 0, 0], [5, 6, 7, 1, 0, 0]])
        mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 4 + [0] * 2])
        answers = torch.tensor([[11, 12, *SKIP * 3], [21, 22, 23, 24, 1], [30, *SKIP * 4]])
        given: dict[str, Any] = {"labels": answers}
        if name in ("bart", "mbart"):  # from labels alone they would not make what is read
            begun = torch.tensor([BEGUN[name]] * 3)
            read = torch.cat([begun, answers[:, :-1].clamp(min=0)], 1)
            silent = answers.new_full((3, begun.shape[1] - 1), IGNORED)
            given = {"decoder_input_ids": read, "labels": torch.cat([silent, answers], 1)}
        theirs = model(input_ids=prompts, attention_mask=mask, **given).loss
        torch.testing.assert_close(nll, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_the_modules_have(name: str) -> None:
    model, one = made(name), torch.tensor([[5]])
    both = {"input_ids": one, "decoder_input_ids": one, "use_cache": False}
    cost = counted(model, shape(name), lambda: model(**both))
    assert kind_of(model) is KIND
    assert (shape(name).encoder, shape(name).num_layers) == (2, 5)
    assert not any("per" in key for key in cost.told())


def logits(model: Any, rows: list[Example]) -> torch.Tensor:
    batch = collate(rows, 0)
    with torch.no_grad():
        return KIND.logits(model, batch.input_ids, batch.attention_mask, batch.labels)


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus"])
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    model = made(name).double()
    together = logits(model, ROWS)
    for place, one in enumerate(ROWS):
        asked = [n - 1 for n, label in enumerate(one.labels()) if label != IGNORED]
        alone = logits(model, [one])[0, asked]
        assert alone.abs().max() > 0.1
        torch.testing.assert_close(together[place, asked], alone, rtol=1e-10, atol=1e-10)
        rest = [n for n in range(together.shape[1]) if n not in asked]
        assert not together[place, rest].any()


def test_no_answer_reaches_the_encoder() -> None:
    model, read = made("t5"), []
    model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    first, other = (logits(model, [row([5, 6, 7], [31, last, 33])]) for last in (40, 41))
    assert [ids.tolist() for ids in read] == [[[5, 6, 7, 1]]] * 2
    assert torch.equal(first[0, :5], other[0, :5])
    assert not torch.equal(first[0, 5], other[0, 5])


def test_choices_are_scored_after_one_prompt() -> None:
    tokens = [Tokens([5, 6, answer], 2, 1) for answer in (20, 21)]
    read = KIND.example(Example("a", (tokens[1],), tuple(tokens), 1), [1], 64)
    assert [c.ids for c in read.choices] == [[5, 6, 1, 20], [5, 6, 1, 21]]
    assert read.choices[read.right] == read.sequences[0]
    nll = Method().token_nll(made("t5"), collate([read.compared()], 0)).sum(1)
    at = logits(made("t5"), [read])[0, 2].log_softmax(0)
    torch.testing.assert_close(nll, -at[[21, 20]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus"])
def test_answers_are_those_of_transformers(name: str) -> None:
    model, asked = made(name), [[5, 6, 7, 8, 9], [20], [40, 41]]
    prompts = [generate.Prompt(KIND.prompt(ids, [1]), 6, frozenset([1])) for ids in asked]
    session = Decoder().session(model)
    assert isinstance(session, EncodedSession)
    found = generate.generate(session, prompts, str, device=torch.device("cpu"))
    assert session.kv_bytes() > 0
    for ids, answer in zip(asked, found, strict=True):
        # With a cache, transformers makes one for as many layers as the encoder has.
        begun = len(BEGUN[name])
        settings = {"max_new_tokens": 5 + begun, "do_sample": False, "use_cache": False}
        theirs = model.generate(torch.tensor([[*ids, 1]]), **settings)
        assert theirs[0, :begun].tolist() == BEGUN[name]
        assert answer.ids == theirs[0, begun:].tolist()
    with pytest.raises(ValueError, match="no static engine"):
        Decoder().session(model, "static")


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus"])
def test_a_step_is_what_a_whole_pass_says(name: str) -> None:
    model, asked = made(name).double(), [[5, 6, 7, 8, 9, 1], [20, 1], [40, 41, 1]]
    session, answers = EncodedSession(model), torch.tensor([[11, 31], [12, 32], [13, 33]])
    steps = [session.prefill(*generate.left_padded(asked, 0, torch.device("cpu")))]
    steps.append(session.step(answers[:, :1]))
    kept = torch.tensor([2, 0])
    session.reorder(kept)
    steps = [logits[kept] for logits in steps] + [session.step(answers[kept, 1:])]
    for place, row in enumerate(kept.tolist()):
        read = {"input_ids": torch.tensor([asked[row]]), "use_cache": False}
        with torch.no_grad():
            behind = torch.tensor([[*BEGUN[name], *answers[row]]])
            alone = model(**read, decoder_input_ids=behind).logits[0, len(BEGUN[name]) - 1 :]
        found = torch.stack([logits[place] for logits in steps])
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-9)
    assert (steps[0][0] - steps[0][1]).abs().max() > 1e-3


def test_what_a_row_reads_is_what_a_question_reads() -> None:
    """Else a model would be asked otherwise than it was taught."""
    [tokens] = row([5, 6], [11]).sequences
    assert tokens.ids[: tokens.prompt_length] == KIND.prompt([5, 6], [1])


WHOLE = ("full", "kd", "subset")
"""Methods that train every weight."""


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("t5", m) for m in ("adalora", "deep_lora", "dora", "dylora", "full", "kd", "qlora")),
        *((name, "lora") for name in MODELS),
        *(("marian", m) for m in ("full", "adalora")),
    ],
)
def test_methods_change_what_they_count(name: str, method: str) -> None:
    ready = resolved(given(method, **({} if method in WHOLE else {"rank": 4})), shape(name))
    dtype = "float32" if method in WHOLE else "bfloat16"
    base, batch = made(name).to(getattr(torch, dtype)), collate(ROWS, 0)
    if is_packed(ready.weights):
        pack_linears(base, find_format(ready.weights)(), torch.bfloat16)
    before = Method().token_nll(base, batch).sum()
    ctx = context(lambda _: made(name))
    model = ready.prepare(base, ctx)
    require_counted(ready, model, shape(name), dtype)
    torch.testing.assert_close(ready.token_nll(model, batch).sum(), before, rtol=0.02, atol=0)
    learn(ready, model.eval(), batch, ctx)
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    across = ("EncDecAttention", "encoder_attn")
    assert any(".encoder." in f".{n}" for n in reached)
    assert any(word in n for n in reached for word in across)


def test_rows_go_in_whole() -> None:
    assert len(cut(ROWS, 3, 1, shape("t5"))) == len(ROWS) < len(cut(ROWS, 3, 1))
    words = ["model=tiny-seq2seq", "hardware.device=cpu", "dataset=arithmetic", "method=full"]
    with pytest.raises(UserError, match="would cut prompts and answers"):
        compose("train", [*words, "evaluator.perplexity.window=64"])


def test_what_needs_a_decoder_says_no_before_anything_is_loaded() -> None:
    base = ["model=tiny-seq2seq", "hardware.device=cpu"]
    for method in ("layer_drop", "rtn", "reward"):
        with pytest.raises(UserError, match="but an encoder-decoder of T5"):
            resolved(given(method), shape("t5"))
    for evaluator in ("long_context", "speed"):
        words = [*base, "dataset=arithmetic", "method=full", f"evaluator={evaluator}"]
        with pytest.raises(UserError, match=f"Evaluator {evaluator} cannot ask tiny-seq2seq"):
            compose("train", words)
    with pytest.raises(UserError, match="lm-eval's tasks"):
        tasks = ["evaluator=choices", "evaluator.choices.tasks=[piqa]"]
        compose("train", [*base, "dataset=arithmetic", "method=full", *tasks])
    with pytest.raises(UserError, match="several devices"):
        words = [*base, "dataset=arithmetic", "method=full", "hardware.devices=2"]
        compose("train", words)
    with pytest.raises(UserError, match="rows are plain text"):
        compose("train", [*base, "dataset=prose", "method=full"])
    spoken = Turns([5, 6, 7, 8], 1, 1, silent=((2, 3),))
    with pytest.raises(UserError, match="a row has several"):
        KIND.example(Example("a", (spoken,)), [], 64)


@pytest.mark.parametrize(("name", "tied"), [("t5", 1), ("t5", 0), ("bart", 1), ("marian", 1)])
def test_a_folder_is_what_its_config_says(tmp_path: Path, name: str, tied: bool) -> None:
    model = random_of(config(name, vocab_size=300, tie_word_embeddings=bool(tied)), KIND, 0)
    model.config.tie_word_embeddings = bool(tied)
    if name != "t5":
        model.final_logits_bias.normal_()
    model.save_pretrained(tmp_path)
    byte_tokenizer(tiny_shape()).save_pretrained(tmp_path)
    spec = ModelSpec("own", "folder", path=str(tmp_path))
    loaded = models.load(spec, device="cpu", dtype=torch.float32)
    assert models.shape_of(spec) == loaded.shape
    assert loaded.shape.tied is bool(tied)
    batch = collate(ROWS, 0)
    stock = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(Method().token_nll(stock, batch), Method().token_nll(model, batch))
    assert torch.equal(Method().token_nll(loaded.model, batch), Method().token_nll(model, batch))


def test_other_models_with_an_encoder_are_refused() -> None:
    for values, reason in (
        ({"model_type": "led", "decoder_start_token_id": 2}, "how its decoder begins an answer"),
        ({"model_type": "t5"}, "its config has no decoder_start_token_id"),
        ({"model_type": "mbart"}, "its config has no decoder_start_token_id"),
        (
            {"model_type": "bart", "architectures": ["BartForSequenceClassification"]},
            "it has a decoder beside its encoder",
        ),
    ):
        with pytest.raises(UserError, match=reason):
            models.shape_in({**values, "is_encoder_decoder": True}, "own")


def test_a_padding_token_without_a_row_is_refused() -> None:
    with pytest.raises(UserError, match="cannot make a model of type 'bart': Padding_idx must be"):
        models.shape_in(config("bart", pad_token_id=64), "own")


def test_the_documentation_names_what_works() -> None:
    require_documented("encoder-decoders", {name: shape(name) for name in MODELS}, shape("t5"))
