"""Questions of exact lengths, loss of the same tokens at every length, and bytes of caches."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import subject_of, text_file

from effbench.evaluators import needles
from effbench.evaluators.long_context import LongContext
from effbench.evaluators.subject import Subject
from effbench.methods.cache.snapkv import SnapKV
from effbench.methods.evicts import Budget
from effbench.results.journal import Journal
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

TEXT = "Ada wrote of an engine that weaves patterns, and of what it cannot do by itself. "
SMALL = LongContext(lengths=(200, 320), items=3, hops=1, keys=2, scored_tokens=16, batch_tokens=700)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("long")
    bench = Bench(folder / "results")
    return subject_of(bench, *text_file(folder, [TEXT * 3, TEXT[5:] * 3]), strength=4)


def made(task: needles.Task, length: int, subject: Subject, count: int = 4, seed: int = 0) -> Any:
    sizes = needles.Sizes(keys=3, hops=2)
    return needles.items(task, length, count, subject.data.tokenizer, sizes=sizes, seed=seed)


# -- questions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("task", needles.TASKS)
def test_a_prompt_and_its_answer_have_exactly_the_length(
    task: needles.Task, subject: Subject
) -> None:
    for length in (331, 332, 480):
        found, new = made(task, length, subject)
        assert {len(item.ids) for item in found} == {length - new}
        assert new == 1 + len(subject.data.tokenizer(" 12345", add_special_tokens=False).input_ids)
        assert len({item.id for item in found}) == 4
        assert made(task, length, subject)[0] == found != made(task, length, subject, seed=1)[0]


def test_what_is_asked_was_said_once_and_can_be_traced(subject: Subject) -> None:
    decode = subject.data.tokenizer.decode
    for item in made("keys", 400, subject)[0]:
        text = decode(item.ids)
        name = text.rsplit("number of ", 1)[1].split()[0]
        assert text.count(f"The special number of {name} is {item.answer}.") == 1
        assert text.count("special number") == 3 + 1
        assert text.endswith("mentioned above is")
    for item in made("variables", 400, subject)[0]:
        said, _, question = decode(item.ids).rpartition(" So the value of VAR ")
        known: dict[str, str] = {}
        for part in said.split("."):
            if " = " in part:
                name, value = part.strip().removeprefix("VAR ").split(" = ")
                known[name] = known[value.removeprefix("VAR ")] if "VAR" in value else value
        assert known[question.removesuffix(" is")] == item.answer
        assert len(set(known.values())) == needles.CHAINS
    depths = [item.depth for item in made("needle", 480, subject, count=40)[0]]
    assert min(depths) < 0.2 and max(depths) > 0.8


def test_an_answer_is_right_when_nothing_makes_it_another() -> None:
    item = needles.Item("a", [], "12345", 0.5)
    assert item.right(" 12345.") and item.right("12345")
    assert not item.right(" 123456") and not item.right("is 12345") and not item.right("")


def test_a_question_that_does_not_fit_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="needle does not fit") as error:
        made("needle", 60, subject)
    assert "evaluator.long_context.lengths" in error.value.hint


# -- what is measured --------------------------------------------------------------------------


def test_it_is_what_decoding_and_plain_passes_give(subject: Subject) -> None:
    kept: dict[str, Any] = {}
    result = SMALL.run(dataclasses.replace(subject, keep=kept.__setitem__))
    found = {(m.name, m.task): m for m in result.metrics}
    stream = [t for row in subject.data.documents("test") for t in row.ids]
    texts = SMALL._texts(subject.data)
    assert len(texts) == 3 and texts[0] == stream[:320] and all(len(t) == 320 for t in texts)
    for length in (200, 320):
        losses = []
        for text in texts:
            ids = torch.tensor([text[-length:]])
            with torch.no_grad():
                nll = -subject.model(ids).logits[0].double().log_softmax(-1)
            losses.append(nll[:-1].gather(1, ids[0, 1:, None])[-16:].mean().item())
        loss = found["loss", f"text-{length}"]
        assert loss.value == pytest.approx(sum(losses) / 3, rel=1e-5) and loss.n == 3
        [items] = [o for o in result.outcomes if o.task == loss.task]
        assert items.values == pytest.approx(losses, rel=1e-4)
        held = found["kv_bytes", f"length-{length}"].value
        assert held == (length - 1) * 2 * 4 * _kv_width(subject)
        assert found["kv_saved", f"length-{length}"].value == 0
        assert found["exact_match", f"keys-{length}"].n == 3
    [asked, *_], new = made_as(SMALL, "needle", 200, subject)
    with torch.no_grad():
        ids = torch.tensor([asked.ids])
        for _ in range(new):
            ids = torch.cat([ids, subject.model(ids).logits[:, -1].argmax(-1)[None]], dim=1)
    text = subject.data.tokenizer.decode(ids[0, len(asked.ids) :], skip_special_tokens=True)
    assert kept["needle-200"][0]["text"] == text


def made_as(evaluator: LongContext, task: needles.Task, length: int, subject: Subject) -> Any:
    sizes = needles.Sizes(evaluator.keys, evaluator.hops)
    tokenizer = subject.data.tokenizer
    return needles.items(task, length, evaluator.items, tokenizer, sizes=sizes, seed=0)


def _kv_width(subject: Subject) -> int:
    assert subject.shape is not None
    return subject.shape.num_layers * subject.shape.num_kv_heads * subject.shape.head_dim


def test_a_cache_that_evicts_saves_what_it_holds_less(subject: Subject) -> None:
    method = SnapKV(budget=(40,), window=8)
    evicting = dataclasses.replace(subject, method=method, point=Budget(40))
    evaluator = dataclasses.replace(SMALL, lengths=(320,), tasks=("needle",))
    found = {(m.name, m.task): m for m in evaluator.run(evicting).metrics}
    new = made_as(evaluator, "needle", 320, subject)[1]
    held = (40 + new - 1) * 2 * 4 * _kv_width(subject)
    assert found["kv_bytes", "length-320"].value == held
    assert found["kv_saved", "length-320"].value == pytest.approx(1 - (39 + new) / 319)
    dense = {(m.name, m.task): m.value for m in evaluator.run(subject).metrics}
    assert found["loss", "text-320"].value != dense["loss", "text-320"]
    assert {m.point for m in found.values()} == {"b40"}


def test_an_interrupted_evaluation_goes_on(subject: Subject, tmp_path: Path) -> None:
    evaluator = dataclasses.replace(SMALL, lengths=(200,), tasks=("needle",), batch_tokens=200)
    expected, calls = evaluator.run(subject), list[int]()

    def stop(what: str, done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 5:
            raise KeyboardInterrupt

    kept = dataclasses.replace(
        subject,
        progress=stop,
        journal=lambda name, items: Journal(tmp_path / f"{name}.items", items),
    )
    with pytest.raises(KeyboardInterrupt):
        evaluator.run(kept)
    assert evaluator.run(kept) == expected and len(calls) == 6  # 3 questions, 3 texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lengths=[513]", "513 tokens are more than the 512 positions"),
        ("lengths=[]", "nothing to do"),
        ("lengths=[200,200]", "lengths names something twice"),
        ("lengths=[64]", "scored_tokens=64 leaves no context"),
        ("tasks=[needles]", "needle"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(bench: Bench, words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench.job("eval", "evaluator=long_context", f"evaluator.long_context.{words}")


def test_a_split_that_is_too_short_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match=r"Split 'test' has 4[0-9]+ tokens") as error:
        LongContext(lengths=(512,), tasks=())._texts(subject.data)
    assert "scored_tokens=0" in error.value.hint
