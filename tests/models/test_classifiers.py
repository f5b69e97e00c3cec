"""Encoders with a classification head: counted as they are, and never shown the answer."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import context, counted, learn, require_counted, require_documented
from transformers import CONFIG_MAPPING, BertModel

from effbench.api.batch import collate
from effbench.api.examples import Example, Tokens
from effbench.api.shape import ModelShape
from effbench.api.spec import ModelSpec
from effbench.cli.rows import rows
from effbench.config.compose import compose, model_named
from effbench.evaluators.choices import linearised_macro_f1
from effbench.methods.base import Method
from effbench.methods.chain import resolved
from effbench.methods.trains import Trains, groups_of, require_same_tokens
from effbench.models import load as models
from effbench.models.random import byte_tokenizer, random_of
from effbench.models.survey import empty_model, survey
from effbench.nn.model_kinds.base import find, kind_of
from effbench.testing.bench import Bench
from effbench.testing.models import given, tiny_shape
from effbench.util.errors import UserError
from effbench.util.hf import quiet

KIND, MASKED = find("classifier"), find("masked")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 3}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "roberta": SIZES,
    "distilbert": {**DISTIL, "vocab_size": 64, "max_position_embeddings": 64},
    "modernbert": {**SIZES, **SPECIAL},
    "electra": {**SIZES, "embedding_size": 32},
    "mpnet": SIZES,
}
"""Smallest models of the encoders that people bring; their `model_type` is in the documentation."""


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = CONFIG_MAPPING[name](**ENCODERS[name]).to_dict()
    return found


@cache
def shape(name: str) -> ModelShape:
    return survey(empty_model(config(name), "classifier"))


def made(name: str) -> Any:
    model = random_of(config(name), KIND, 0)
    KIND.ready(model)
    return model


def row(ids: list[int], right: int) -> Example:
    choices = tuple(Tokens([*ids, 9], len(ids), 1) for _ in range(3))
    return KIND.example(Example(str(ids), (), choices, right), [2], 3)


WHOLE = ("full", "kd")
"""Methods that train every weight."""
ROWS = [row([5, 6, 7, 8], 2), row([9, 10], 0)]


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_counted_is_what_the_modules_have(name: str) -> None:
    model = made(name)
    cost = counted(model, shape(name), lambda: model(input_ids=torch.tensor([[5]])))
    assert cost.kv_bytes_per_token == 0


@pytest.mark.parametrize("name", ENCODERS)
def test_a_masked_head_is_counted_as_it_is(name: str) -> None:
    model, found = random_of(config(name), MASKED, 0), survey(empty_model(config(name), "masked"))
    counted(model, found, lambda: model(input_ids=torch.tensor([[5]])))
    assert (found.kind, found.outputs) == ("masked", 64)


def test_a_folder_with_a_masked_head_is_known_by_its_config(tmp_path: Path) -> None:
    first = random_of({**config("bert"), "vocab_size": 300}, MASKED, 5)
    with quiet():
        first.save_pretrained(tmp_path)
    spec = ModelSpec("own", "folder", path=str(tmp_path))
    loaded = models.load(spec, device="cpu", dtype=torch.float32, tokenizer=False)
    assert kind_of(loaded.model) is MASKED and models.shape_of(spec) == loaded.shape
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, first(input_ids=ids).logits)
    with pytest.raises(UserError, match="but an encoder with a masked-LM head") as caught:
        resolved(given("lora"), loaded.shape)
    assert caught.value.hint == "Methods for every encoder with a masked-LM head: prboost."
    other = ModelSpec("own", "folder", path=str(tmp_path), kind="classifier", classes=3)
    assert models.shape_of(other).outputs == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ENCODERS)
def test_a_class_never_reaches_the_model(name: str) -> None:
    model = made(name).requires_grad_(False)
    for parameter in model.parameters():  # so that a token more is felt at all
        parameter.mul_(10 if parameter.ndim > 1 else 1)
    batch = collate([r.compared() for r in ROWS], 0)
    nll = Method().token_nll(model, batch)
    alone = [model(input_ids=torch.tensor([r.ids[:-1]])).logits[0].log_softmax(0) for r in ROWS]
    expected = [-alone[0][[2, 0, 1]], -alone[1][[0, 1, 2]]]
    torch.testing.assert_close(nll.sum(1), torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "lora") for name in ENCODERS),
        *(("bert", m) for m in ("adalora", "deep_lora", "dora", "dylora", "full", "kd", "rslora")),
        ("bert", "lora_plus"),
        ("modernbert", "full"),
    ],
)
def test_methods_train_the_head_and_change_what_they_count(name: str, method: str) -> None:
    ready = resolved(given(method, **({} if method in WHOLE else {"rank": 4})), shape(name))
    assert isinstance(ready, Trains)
    model, dtype = made(name), "float32" if method in WHOLE else "bfloat16"
    ctx = context(lambda _: made(name))
    model = ready.prepare(model.to(getattr(torch, dtype)), ctx)
    require_counted(ready, model, shape(name), dtype)
    learn(ready, model.train(), collate(ROWS, 0), ctx)
    stepped = [id(p) for members, _ in groups_of(ready, model) for p in members]
    kept = ready.artefact_tensors(model)
    for part, head in KIND.heads(model):
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, part
            assert parameter.dtype == torch.float32
            assert stepped.count(id(parameter)) == 1, part
            assert torch.equal(kept[f"{part}.{name}"], parameter), part


def test_other_methods_and_evaluators_say_no_before_anything_is_loaded() -> None:
    for method in ("layer_drop", "rtn", "reward", "external"):
        with pytest.raises(UserError, match="encoder with a classification head"):
            resolved(given(method), shape("bert"))
    base = ["model=tiny-encoder", "hardware.device=cpu"]
    with pytest.raises(UserError, match="Evaluator perplexity cannot ask tiny-encoder"):
        compose("train", [*base, "dataset=arithmetic", "method=full", "evaluator=perplexity"])
    with pytest.raises(UserError, match="the rows have none"):
        rows = ["dataset=arithmetic", "dataset.kind=pairs"]
        compose("train", [*base, *rows, "method=full", "evaluator=choices"])
    with pytest.raises(UserError, match="2 classes, but the rows 3 answers"):
        KIND.example(ROWS[0], [], 2)


def test_classes_are_asked_for_unless_something_else_is() -> None:
    words = ["model=tiny-encoder", "model.classes=3", "dataset=noisy-classes", "method=full"]
    asked, chosen = (compose("train", [*words, *more]).spec for more in ([], ["evaluator=choices"]))
    assert asked == chosen
    other = ["model=tiny", "dataset=noisy-classes", "method=full"]
    assert [e.name for e in compose("train", other).spec.evaluators] == ["perplexity"]


@pytest.mark.parametrize("ending", ["ForCausalLM", "ForSequenceClassification"])
def test_what_answers_at_its_last_token_needs_one_for_padding(tmp_path: Path, ending: str) -> None:
    values = CONFIG_MAPPING["qwen2"](**SIZES, num_key_value_heads=2).to_dict()
    values |= {"architectures": [f"Qwen2{ending}"], "pad_token_id": None}
    spec = ModelSpec("own", "folder", path=str(tmp_path), kind="classifier", classes=3)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="'qwen2' needs a token for padding") as caught:
        models.shape_of(spec)
    assert "pad_token_id" in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps({**values, "pad_token_id": 0}))
    assert models.shape_of(spec).outputs == 3  # type: ignore[union-attr]


def test_a_head_is_put_on_an_encoder_without_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = {k: v for k, v in ENCODERS["bert"].items() if k != "num_labels"}
    BertModel(CONFIG_MAPPING["bert"](**{**values, "vocab_size": 300})).save_pretrained(tmp_path)
    byte_tokenizer(tiny_shape()).save_pretrained(tmp_path)
    plain = ModelSpec("own", "folder", path=str(tmp_path))
    with pytest.raises(UserError, match="is no causal language model"):
        models.shape_of(plain)
    spec = ModelSpec("own", "folder", path=str(tmp_path), kind="classifier", classes=4)
    first, again = (models.load(spec, device="cpu", dtype=torch.float32) for _ in range(2))
    assert models.shape_of(spec) == first.shape
    assert first.shape.outputs == 4 == first.model.config.num_labels  # type: ignore[union-attr]
    assert kind_of(first.model) is KIND
    for (name, a), b in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    # With a trained head, the config says what it is, and of how many classes.
    first.model.save_pretrained(tmp_path)  # type: ignore[operator]
    saved = models.load(plain, device="cpu", dtype=torch.float32)
    assert torch.equal(saved.model.classifier.weight, first.model.classifier.weight)  # type: ignore
    with pytest.raises(UserError, match="is for 4"):
        models.shape_of(ModelSpec("own", "folder", path=str(tmp_path), classes=3))


def test_a_row_is_shown_as_it_is_read() -> None:
    words = ["model=tiny-encoder", "model.classes=3", "dataset=noisy-classes", "evaluator=choices"]
    [text] = rows(compose("train", [*words, "method=full"]).spec, 1, False, 80)
    assert "1 of them count, 2 other answers" in text and "is of[ class 1]" in text


def test_a_teacher_has_the_same_classes() -> None:
    student, teacher = made("bert"), empty_model({**config("bert"), "num_labels": 2}, "classifier")
    with pytest.raises(UserError, match="classifier with 2 answers"):
        require_same_tokens("teacher", "other", teacher, student)
    assert model_named("tiny-encoder").classes == 2


def test_a_teacher_may_be_a_folder(bench: Bench, tmp_path: Path) -> None:
    teacher = random_of({**config("bert"), "vocab_size": 512, "num_labels": 3}, KIND, 5)
    with quiet():
        teacher.save_pretrained(tmp_path / "teacher")
    byte_tokenizer(tiny_shape()).save_pretrained(tmp_path / "teacher")
    words = ["model=tiny-encoder", "model.classes=3", "dataset=noisy-classes", "method=kd"]
    words += ["train.max_steps=1", "train.batch_size=2", "evaluator=[]"]
    record = bench.run("train", *words, f"method.teacher={tmp_path / 'teacher'}")
    assert [m.unit for m in record.metrics if m.name == "train_loss_last"] == ["nats/row"]
    [seen] = bench.job("train", *words, f"method.teacher={tmp_path / 'teacher'}").spec.others
    assert seen.fingerprint and seen.source == "folder"
    for other, said in (
        ("tiny-encoder", "a classifier with 2 answers, the trained model a classifier with 3"),
        ("tiny", "a causal with 512 answers, the trained model a classifier with 3"),
        ("mini", "vocabulary entries, the trained model 512"),
        ("tiny-encodr", "no model called 'tiny-encodr'"),
    ):
        with pytest.raises(UserError, match=said):  # before anything is loaded
            compose("train", [*words, f"method.teacher={other}"])


def test_macro_f1_is_the_mean_of_its_rows() -> None:
    chosen, right = [0, 0, 1, 2, 2, 2, 1], [0, 1, 1, 2, 0, 2, 1]
    by_class = [2 * 1 / (2 + 2), 2 * 2 / (2 + 3), 2 * 2 / (3 + 2)]
    values = linearised_macro_f1(chosen, right)
    assert sum(values) / 7 == pytest.approx(sum(by_class) / 3)
    assert linearised_macro_f1(right, right) == [1.0] * 7


# -- what the documentation says ---------------------------------------------------------------


def test_the_table_of_encoders_is_what_was_counted() -> None:
    require_documented("encoders", {name: shape(name) for name in ENCODERS}, shape("bert"))
