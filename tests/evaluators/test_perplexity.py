"""Perplexity against naive float64 loops, and against lm-eval's rolling log-likelihood."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import by_name, subject_of, text_file

from effbench.api.examples import IGNORED, Example, Tokens
from effbench.api.method_types import Context
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import digest
from effbench.data.dataset import splits
from effbench.evaluators.base import exponential
from effbench.evaluators.perplexity import Perplexity, _perplexity
from effbench.evaluators.subject import Subject
from effbench.evaluators.windows import cut, spans
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Window
from effbench.results.journal import Journal
from effbench.results.records import Metric
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

QUESTIONS = ["dataset=arithmetic", "+dataset.limit.test=12"]
TEXTS = [
    "A short one.",
    "Größe, naïve, 数字 and an emoji \N{ROCKET}: many bytes.",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "x",
    " leading and trailing blanks ",
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def questions(bench: Bench) -> Subject:
    return subject_of(bench, *QUESTIONS)


@pytest.fixture
def documents(bench: Bench, tmp_path: Path) -> Subject:
    return subject_of(bench, *text_file(tmp_path, TEXTS), "dataset.max_length=64")


@torch.no_grad()
def naive_nll(model: torch.nn.Module, context: list[int], target: int) -> float:
    """Return one token's loss in float64 from a pass over its context alone."""
    logits = model(torch.tensor([context])).logits[0, -1].double()
    return -float(F.log_softmax(logits, dim=-1)[target])


def naive_sums(subject: Subject, window: int, stride: int) -> list[float]:
    """Return each document's loss, each token predicted in a pass of its own."""
    model = subject.model.double()
    sums = []
    for example in subject.data.documents("test"):
        total, done = 0.0, 1
        while done < len(example.ids):
            step = window - 1 if done == 1 else stride
            stop = min(done + step, len(example.ids))
            start = max(0, stop - window)
            for place in range(done, stop):
                if place >= example.prompt_length:
                    total += naive_nll(model, example.ids[start:place], example.ids[place])
            done = stop
        sums.append(total)
    subject.model.float()
    return sums


# -- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 9, 10, 11, 37])
def test_every_token_is_scored_once_with_enough_context(length: int, stride: int) -> None:
    scored = []
    for number, (start, first, stop) in enumerate(spans(length, 10, stride)):
        assert 0 <= start <= first <= stop <= length and stop - start <= 10
        scored += range(first, stop)
        assert number == 0 or first - start >= 10 - stride
    assert scored == list(range(1, length))


def test_a_window_that_scores_nothing_is_left_out() -> None:
    rows = [
        Example("a", (Tokens(list(range(30)), 25, 5),)),
        Example("b", (Tokens([7], 1, 0),)),
    ]
    windows = cut(rows, 10, 5)
    pairs = [w.sequence(rows[w.row]) for w in windows]
    assert {w.row for w in windows} == {0}
    assert [i for _, labels in pairs for i in labels if i != IGNORED] == list(range(25, 30))
    assert all(len(ids) == len(labels) for ids, labels in pairs)


def test_a_loss_whose_exponential_overflows_is_kept() -> None:
    assert exponential(4564.2) == math.inf
    assert exponential(-4564.2) == 0.0
    assert exponential(2.0) == math.exp(2.0)
    found = _perplexity(Metric("loss", 708.0, "nats/token", low=1.0, high=710.0))
    assert (found.value, found.low, found.high) == (math.exp(708.0), math.exp(1.0), math.inf)


# -- documents ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stride"), [(64, None), (64, 63), (17, 4), (2, 1)])
def test_it_is_that_of_a_naive_loop_over_windows(
    documents: Subject, window: int, stride: int | None
) -> None:
    result = Perplexity(window=window, stride=stride, batch_tokens=150).run(documents)
    found = by_name(result)
    sums = naive_sums(documents, window, stride or window // 2)
    texts = [t.answer for t in splits(documents.data.spec)["test"]]
    tokens = sum(len(t.encode()) for t in texts)  # the tokenizer has one token per byte
    assert found["loss_tokens"].value == tokens
    assert found["loss"].value == pytest.approx(sum(sums) / tokens, rel=1e-5)
    bits = sum(sums) / math.log(2) / sum(len(t.encode()) for t in texts)
    assert found["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
    assert found["loss"].n == len(TEXTS)
    assert {o.ids for o in result.outcomes} == {digest(documents.data.ids("test"))}


def test_a_stride_of_one_is_the_full_context_where_a_document_fits(documents: Subject) -> None:
    long = max(len(e.ids) for e in documents.data.documents("test"))
    whole = by_name(Perplexity(window=long).run(documents))["loss"].value
    model = documents.model.double()
    sums = [
        sum(naive_nll(model, e.ids[:t], e.ids[t]) for t in range(1, len(e.ids)))
        for e in documents.data.documents("test")
    ]
    documents.model.float()
    assert whole == pytest.approx(sum(sums) / sum(len(t.encode()) for t in TEXTS), rel=1e-5)
    strided = by_name(Perplexity(window=long, stride=1).run(documents))["loss"].value
    assert strided == pytest.approx(whole, rel=1e-6)


def test_no_context_crosses_documents(bench: Bench, tmp_path: Path) -> None:
    both = subject_of(bench, *text_file(tmp_path, TEXTS))
    alone = subject_of(bench, *text_file(tmp_path, TEXTS[:1]))
    sums, *_ = Perplexity(window=20)._sums(both, both.data.documents("test"))
    [own], *_ = Perplexity(window=20)._sums(alone, alone.data.documents("test"))
    place = both.data.ids("test").index(alone.data.ids("test")[0])
    assert sums[place] == pytest.approx(own, rel=1e-6)


def test_a_document_longer_than_the_positions_works(bench: Bench, tmp_path: Path) -> None:
    text = "one two three four five " * 60
    subject = subject_of(bench, *text_file(tmp_path, [text]))
    assert subject.shape is not None and len(text) > subject.shape.max_positions
    found = by_name(Perplexity(window=512).run(subject))
    assert found["loss_tokens"].value == len(text)
    assert math.isfinite(found["loss"].value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluator.perplexity.window=513"], "window=513 is more than the 512 positions"),
        (["evaluator.perplexity.window=1"], "too short to predict"),
        (["evaluator.perplexity.window=9", "evaluator.perplexity.stride=9"], "no context"),
    ],
)
def test_windows_that_cannot_be_are_refused(bench: Bench, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.job("eval", *words)


def test_its_passes_are_its_batches(documents: Subject, bench: Bench) -> None:
    evaluator = Perplexity(window=20, stride=5, batch_tokens=60)
    batches: list[tuple[int, int, int]] = []
    nll = documents.method.token_nll

    class Watched(type(documents.method)):  # type: ignore[misc]
        def token_nll(
            self, model: torch.nn.Module, batch: Any, point: Point = UNNAMED
        ) -> torch.Tensor:
            batches.append((*batch.input_ids.shape, batch.loss_tokens))
            return nll(model, batch)

    evaluator.run(dataclasses.replace(documents, method=Watched()))
    spec = bench.job("eval").spec
    found = evaluator.passes(spec, documents.data)
    assert [(p.rows, p.tokens, p.counted) for p in found] == batches
    [largest] = evaluator.passes(spec)
    assert largest.size == 60


def test_an_interrupted_evaluation_goes_on_at_the_next_batch(
    documents: Subject, tmp_path: Path
) -> None:
    evaluator = Perplexity(window=20, batch_tokens=60)
    expected = evaluator.run(documents)
    nll, calls = documents.method.token_nll, [0]

    class Stops(type(documents.method)):  # type: ignore[misc]
        limit = 3

        def token_nll(
            self, model: torch.nn.Module, batch: Any, point: Point = UNNAMED
        ) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > self.limit:
                raise KeyboardInterrupt
            return nll(model, batch)

    kept = dataclasses.replace(
        documents,
        method=Stops(),
        journal=lambda name, items: Journal(tmp_path / f"{name}.items", items),
    )
    with pytest.raises(KeyboardInterrupt):
        evaluator.run(kept)
    first, calls[0], Stops.limit = calls[0] - 1, 0, 10**6
    assert evaluator.run(kept) == expected
    second, calls[0] = calls[0], 0
    evaluator.run(dataclasses.replace(kept, journal=documents.journal))
    assert first == 3 and first + second == calls[0]


@pytest.mark.real
def test_it_is_that_of_lm_eval(bench: Bench, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [*TEXTS[:3], "Ada Lovelace wrote of an engine that weaves algebraic patterns. " * 12]
    words = [*text_file(tmp_path, texts), "model=smollm2-135m"]
    subject = subject_of(bench, *words, strength=1)
    sums, counts, _ = Perplexity(window=65, stride=64)._sums(
        subject, subject.data.documents("test")
    )
    theirs = HFLM(
        pretrained=subject.model, tokenizer=subject.tokenizer, max_length=64, batch_size=1
    )
    ordered = [t.answer for t in splits(subject.data.spec)["test"]]
    asked = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(t,), idx=i)
        for i, t in enumerate(ordered)
    ]
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert [-s for s in sums] == pytest.approx(expected, abs=1e-3)
    assert counts == [len(subject.tokenizer(t)["input_ids"]) for t in ordered]
    assert max(counts) > 128


# -- prompts and answers -----------------------------------------------------------------------


def test_answers_alone_count_in_pairs(questions: Subject) -> None:
    result = Perplexity(batch_tokens=100).run(questions)
    found = by_name(result)
    examples = questions.data.examples("test")
    sums = naive_sums(questions, 64, 32)
    counts = [len(e.ids) - e.prompt_length for e in examples]
    loss = sum(sums) / sum(counts)
    assert found["loss"].value == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"].value == pytest.approx(math.exp(loss), rel=1e-4)
    size = sum(len(t.answer.encode()) for t in splits(questions.data.spec)["test"])
    bits = sum(sums) / math.log(2) / size
    assert found["bits_per_byte"].value == pytest.approx(bits, rel=1e-5)
    assert found["loss_tokens"].value == sum(counts)
    assert found["loss_tokens"].obtained == "counted"
    assert found["loss"].n == len(examples) == 12
    assert found["loss"].low < found["loss"].value < found["loss"].high  # type: ignore


def test_the_outcome_of_an_item_is_the_linearised_ratio(questions: Subject) -> None:
    result = Perplexity().run(questions)
    sums = naive_sums(questions, 64, 32)
    examples = questions.data.examples("test")
    sizes = {
        "loss": [float(len(e.ids) - e.prompt_length) for e in examples],
        "bits_per_byte": [e.answer_bytes * math.log(2) for e in examples],
    }
    assert {o.metric for o in result.outcomes} == set(sizes)
    for outcomes in result.outcomes:
        n = sizes[outcomes.metric]
        ratio = sum(sums) / sum(n)
        linear = [ratio + (s - ratio * c) * len(n) / sum(n) for s, c in zip(sums, n, strict=True)]
        assert outcomes.values == pytest.approx(linear, rel=1e-4)
        mean = sum(outcomes.values) / len(outcomes.values)
        assert mean == pytest.approx(by_name(result)[outcomes.metric].value)
        assert outcomes.ids == digest([e.id for e in examples])


def test_differences_of_outcomes_are_those_of_the_ratio(questions: Subject) -> None:
    """Items of other lengths must not blur a difference that is the same on every token."""
    plain = Perplexity().run(questions).outcomes[0].values
    nll = questions.method.token_nll

    class Worse(type(questions.method)):  # type: ignore[misc]
        def token_nll(
            self, model: torch.nn.Module, batch: Any, point: Point = UNNAMED
        ) -> torch.Tensor:
            return nll(model, batch) + 0.5 * (batch.labels[:, 1:] != -100)

    worse = Perplexity().run(dataclasses.replace(questions, method=Worse())).outcomes[0].values
    gaps = [w - p for w, p in zip(worse, plain, strict=True)]
    assert gaps == pytest.approx([0.5] * len(gaps), abs=1e-5)


def test_the_batch_size_does_not_matter(documents: Subject) -> None:
    results = [Perplexity(window=20, batch_tokens=n).run(documents) for n in (1, 77, 4096)]
    for other in results[1:]:
        for one, two in zip(results[0].metrics, other.metrics, strict=True):
            assert two.value == pytest.approx(one.value, rel=1e-5)
        for a, b in zip(results[0].outcomes, other.outcomes, strict=True):
            assert b.values == pytest.approx(a.values, rel=1e-4)


def test_losses_by_place_in_the_cycle_add_up(bench: Bench, tmp_path: Path) -> None:
    subject = subject_of(bench, *text_file(tmp_path, TEXTS))
    method = LoRADrop(layers=(1, 2), window=2)
    ctx = Context(0, subject.device, torch.float32, torch.Generator(), lambda name: subject.model)
    method.prepare(subject.model, ctx)
    subject = dataclasses.replace(subject, method=method, point=Window(2))
    evaluator = Perplexity(window=20)
    with method.at(subject.model, Window(2)):
        found = evaluator._sums(subject, subject.data.documents("test"))
        metrics = {m.name: m.value for m in evaluator.run(subject).metrics}
    for total, count, parts in zip(*found, strict=True):
        assert total == pytest.approx(sum(nll for nll, _ in parts.values()))
        assert count == sum(tokens for _, tokens in parts.values())
    for name in ("j0", "j1", "j2"):
        nll, tokens = (sum(row[name][i] for row in found[2]) for i in range(2))
        assert metrics[f"loss_{name}"] == pytest.approx(nll / tokens)
    with method.at(subject.model, Window(0)):
        assert not any("loss_j" in m.name for m in evaluator.run(subject).metrics)
