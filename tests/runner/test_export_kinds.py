"""Classifiers and encoder-decoders leave as what stock transformers loads, and says the same."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from effbench.models import load as models
from effbench.models.random import byte_tokenizer, random_of
from effbench.nn.model_kinds.base import find, kind_of
from effbench.nn.pruning import plain
from effbench.runner.open import context, open_model
from effbench.runner.run import open_run
from effbench.runner.stages.export import _require_gguf, export
from effbench.testing.bench import Bench
from effbench.testing.models import tiny_shape
from effbench.util.errors import UserError

SMALL = [
    "train.max_steps=1",
    "train.batch_size=2",
    "train.learning_rate=0.05",
    "+dataset.limit.train=8",
    "evaluator=[]",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]
CLASSES = ["model=tiny-encoder", "model.classes=3", "dataset=noisy-classes"]
ANSWERS = ["model=tiny-seq2seq", "dataset=arithmetic"]
IDS = torch.arange(5, 35).view(2, 15)


WRITTEN = [
    "evaluator=generation",
    "evaluator.generation.tasks=[]",
    "evaluator.generation.limit=3",
    "evaluator.generation.max_new_tokens=2",
]


def made(bench: Bench, words: list[str], unit: str) -> tuple[str, Any]:
    """Return the key of a training, and the model that it made."""
    words = [*(w for w in SMALL if w != "evaluator=[]" or WRITTEN[0] not in words), *words]
    record = bench.run("train", *words)
    [last] = [m for m in record.metrics if m.name == "train_loss_last"]
    assert last.unit == unit
    if WRITTEN[0] in words:
        found = {m.name: m.n for m in record.metrics if m.split == "test"}
        assert found["exact_match"] == found["output_tokens"] == 3
    key, job = record.key, bench.job("train", *words)
    work = open_run(job, bench.folder(job), bench.store)
    opened = open_model(work)
    model = opened.method.load(opened.model, bench.folder(job).artefact, context(work))
    return key, model.eval().requires_grad_(False)


def read(folder: Path, auto: str) -> Any:
    assert f"model = {auto}.from_pretrained" in (folder / "README.md").read_text()
    return getattr(transformers, auto).from_pretrained(folder).eval().requires_grad_(False)


def on_its_base(bench: Bench, words: list[str], folder: Path) -> Any:
    """Return a model with stock peft's layers; the head of a classifier is its own."""
    spec = bench.job("train", *SMALL, *words, "method=lora").spec.model
    base = models.load(spec, device="cpu", dtype=torch.float32).model
    for name, head in kind_of(base).heads(base):
        for parameter in head.parameters():
            parameter.data.fill_(len(name))
    if kind_of(base).writes:  # peft's own class around these asks for what transformers 5 lacks
        base.load_adapter(str(folder))
        return base.eval().requires_grad_(False)
    return peft.PeftModel.from_pretrained(base, folder).eval().requires_grad_(False)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_classifier_says_the_same(bench: Bench, tmp_path: Path, method: str) -> None:
    key, ours = made(bench, [*CLASSES, f"method={method}"], "nats/row")
    said = export(key, tmp_path / "new", "", bench.root)
    assert bool(said) is (method == "lora")
    theirs = read(tmp_path / "new", "AutoModelForSequenceClassification")
    assert theirs.config.num_labels == 3
    classify = transformers.pipeline("text-classification", str(tmp_path / "new"), device="cpu")
    best = int(theirs(**classify.tokenizer("abba", return_tensors="pt")).logits.argmax())
    names = [found["label"] for found in classify("abba", top_k=None)]
    assert names[0] == "abc"[best] and set(names) == {*"abc"}
    found, wanted = theirs(IDS).logits, ours(IDS).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3
    with pytest.raises(UserError, match="classification head, which is not written for gguf"):
        export(key, tmp_path / "other", "", bench.root, "gguf")
    assert not (tmp_path / "other").exists()
    if method == "lora":
        said = export(key, tmp_path / "peft", "", bench.root, "peft")
        assert any("num_labels=3" in line for line in said)
        adapted = on_its_base(bench, CLASSES, tmp_path / "peft")
        torch.testing.assert_close(adapted(IDS).logits, wanted, atol=1e-6, rtol=1e-5)


def test_an_encoder_decoder_says_the_same(bench: Bench, tmp_path: Path) -> None:
    key, ours = made(bench, [*ANSWERS, "method=lora", *WRITTEN], "nats/token")
    export(key, tmp_path / "new", "", bench.root)
    theirs = read(tmp_path / "new", "AutoModelForSeq2SeqLM")
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    torch.testing.assert_close(theirs(**both).logits, ours(**both).logits, atol=1e-5, rtol=1e-4)
    export(key, tmp_path / "peft", "", bench.root, "peft")
    assert "model.load_adapter('peft')" in (tmp_path / "peft" / "README.md").read_text()
    adapted = on_its_base(bench, ANSWERS, tmp_path / "peft")
    torch.testing.assert_close(adapted(**both).logits, ours(**both).logits, atol=1e-5, rtol=1e-4)


SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))
}


@pytest.mark.parametrize(
    ("family", "tied"), [("t5", False), ("mt5", True), ("bart", True), ("marian", True)]
)
def test_a_head_of_its_own_stays_one(tmp_path: Path, family: str, tied: bool) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    sizes = sizes if "t5" in family else {"d_model": 32, **SIDES}
    values = {"vocab_size": 260, "decoder_start_token_id": 0, "pad_token_id": 0, **sizes}
    config = transformers.CONFIG_MAPPING[family](**values, tie_word_embeddings=tied).to_dict()
    model = random_of({**config, "tie_word_embeddings": tied}, find("seq2seq"), 0)
    if family == "bart":
        model.generation_config.forced_bos_token_id = 3
        model.final_logits_bias.normal_()
    plain.write(plain.plain_model(model), tmp_path)
    byte_tokenizer(tiny_shape()).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    spec = models.ModelSpec("own", "folder", path=str(tmp_path))
    stated = json.loads((tmp_path / "config.json").read_text())
    again = models.load(spec, device="cpu", dtype=torch.float32)
    assert again.shape.tied is tied
    forced = {m.generation_config.forced_bos_token_id for m in (theirs, again.model)}
    assert forced == {3 if family == "bart" else None}
    both = {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    with torch.no_grad():
        wanted = model(**both).logits
        for other in (theirs, again.model):
            torch.testing.assert_close(other(**both).logits, wanted, atol=1e-6, rtol=1e-5)
    if not tied:  # as transformers itself would have written it
        (tmp_path / "config.json").write_text(json.dumps({**stated, "tie_word_embeddings": True}))
        with pytest.raises(UserError, match="files hold lm_head") as error:
            models.load(spec, device="cpu", dtype=torch.float32)
        assert "Set tie_word_embeddings to false" in error.value.hint


@pytest.mark.parametrize("kind", ["cohere", "qwen2"])
def test_gguf_is_refused_before_loading_where_it_has_no_place(tmp_path: Path, kind: str) -> None:
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    spec = models.ModelSpec("folder", "folder", path=str(tmp_path))
    with pytest.raises(UserError, match="A cohere model") if kind == "cohere" else nullcontext():
        _require_gguf(spec)
