"""Fidelity against float64 references, its bounds, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import by_name, subject_of, text_file

from effbench.api.points import UNNAMED, Point
from effbench.config.compose import compose
from effbench.evaluators.base import Result
from effbench.evaluators.fidelity import Fidelity, answer_loyalty, chosen
from effbench.evaluators.subject import Subject
from effbench.nn.losses.divergence import CHUNK, FIELDS, divergences, row_sums
from effbench.results.bounds import bounds_of
from effbench.results.journal import Journal
from effbench.stats import UNBOUNDED
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

LN2 = math.log(2)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def subject(bench: Bench) -> Subject:
    """The tiny model beside itself."""
    return subject_of(bench, "dataset=arithmetic", "+dataset.limit.test=12")


def disturbed(subject: Subject, size: float) -> Subject:
    """Return the subject with a model some way from its reference."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in subject.model.parameters():
            p.add_(size * torch.randn(p.shape, generator=draws))
    return subject


def logits(n: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, 50, generator=torch.Generator().manual_seed(seed))


def naive(z_p: torch.Tensor, z_q: torch.Tensor) -> list[list[float]]:
    """Return `FIELDS` of each position by their definitions, in float64."""
    rows = []
    for a, b in zip(z_p.double(), z_q.double(), strict=True):
        p, q = F.softmax(a, -1), F.softmax(b, -1)
        m = (p + q) / 2
        kl = float((p * (p / q).log()).sum())
        reverse = float((q * (q / p).log()).sum())
        js = float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
        agree = float(int(a.argmax()) == int(b.argmax()))
        rows.append([agree, kl, reverse, js, 1 - js**0.5, float(((a - b) ** 2).mean())])
    return rows


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 3.0, 30.0])
def test_divergences_are_their_definitions(scale: float) -> None:
    p, q = logits(40, 1, scale), logits(40, 2, scale)
    expected = torch.tensor(naive(p, q), dtype=torch.float64)
    torch.testing.assert_close(divergences(p.double(), q.double()), expected, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(divergences(p, q), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_models_give_exact_ends(dtype: torch.dtype) -> None:
    p = logits(200, 1, 10.0).to(dtype)
    assert divergences(p, p.clone()).tolist() == [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]] * 200


def test_js_is_bounded_and_symmetric() -> None:
    apart = torch.full((2, 50), -200.0)
    apart[0, 3] = apart[1, 7] = 200.0
    [found] = divergences(apart[:1], apart[1:]).tolist()
    js = found[FIELDS.index("js")]
    assert js <= LN2 and js == pytest.approx(LN2)
    assert found[FIELDS.index("kl")] == pytest.approx(400)
    p, q = logits(40, 1), logits(40, 2)
    there, back = divergences(p, q), divergences(q, p)
    torch.testing.assert_close(there[:, 3], back[:, 3])
    torch.testing.assert_close(there[:, 1], back[:, 2])


def test_row_sums_take_the_positions_that_count() -> None:
    p, q = (logits(3 * 2 * CHUNK, s).view(3, -1, 50) for s in (1, 2))
    labels = torch.full(p.shape[:2], -100)
    labels[0, 5:] = 1
    labels[2, [0, 9]] = 1  # the first position of a row is predicted by none
    found = row_sums(p, q, labels)
    assert found[:, -1].tolist() == [2 * CHUNK - 5, 0, 1]
    expected = torch.tensor(naive(p[0, 4:-1], q[0, 4:-1])).sum(0)
    torch.testing.assert_close(found[0, :-1].float(), expected.float(), atol=1e-3, rtol=1e-4)
    single = torch.tensor(naive(p[2, 8:9], q[2, 8:9]))[0]
    torch.testing.assert_close(found[2, :-1].float(), single.float(), atol=1e-4, rtol=1e-4)


def test_loyalty_over_answers() -> None:
    assert answer_loyalty([-4.0, -2.0], [-400.0, -398.0]) == 1
    p = F.softmax(torch.tensor([-1.0, -2.0, -3.0]).double(), 0)
    q = p.flip(0)
    m = (p + q) / 2
    js = float(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
    found = answer_loyalty([-1.0, -2.0, -3.0], [-3.0, -2.0, -1.0])
    assert found == pytest.approx(1 - js**0.5, abs=1e-9)
    assert chosen([-2.0, -1.0, -1.0]) == 1


# -- the evaluator -----------------------------------------------------------------------------


def test_a_model_is_faithful_to_itself(subject: Subject) -> None:
    result = Fidelity(batch_tokens=100).run(subject)
    ends = {"agreement": 1, "probability_loyalty": 1, "label_loyalty": 1, "answer_loyalty": 1}
    for metric in result.metrics:
        assert metric.value == ends.get(metric.name, 0), metric.name
    assert {m.name for m in result.metrics} == {*FIELDS, "label_loyalty", "answer_loyalty", "flips"}
    for outcomes in result.outcomes:
        assert set(outcomes.values) == {float(ends.get(outcomes.metric, 0))}


def test_it_is_that_of_a_naive_loop(subject: Subject) -> None:
    reference = subject.load_base()
    found = by_name(Fidelity(batch_tokens=100).run(disturbed(subject, 0.02)))
    rows: list[list[float]] = []
    with torch.no_grad():
        for e in subject.data.examples("test"):
            ids = torch.tensor([e.ids])
            p, q = (m(ids).logits[0, e.prompt_length - 1 : -1] for m in (reference, subject.model))
            rows += naive(p, q)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    assert 0 < means[0] < 1 and means[1] > 0.01
    for name, mean in zip(FIELDS, means, strict=True):
        assert found[name].value == pytest.approx(mean, rel=1e-3), name
        low, high = found[name].low, found[name].high
        assert low is not None and high is not None
        least, most = bounds_of(name)
        assert least <= low <= found[name].value <= high <= most
        assert found[name].n == 12 and found[name].obtained == "measured"


def test_an_interval_keeps_to_what_a_number_can_be(subject: Subject) -> None:
    counts = [1.0, 2.0, 3.0, 4.0, 5.0] * 2 + [6.0, 200.0]
    agreed = [0.0, *counts[1:]]
    ids = list("abcdefghijkl")
    wide, kept = (
        Result().add_ratio(subject, "fidelity", "agreement", agreed, counts, ids, **settings)
        for settings in ({"bounds": UNBOUNDED}, {})
    )
    assert wide.high is not None and wide.high > 1
    assert kept.value == wide.value and kept.high == 1 and kept.low == wide.low


@torch.no_grad()
def answers(model: torch.nn.Module, subject: Subject) -> list[int]:
    """Return the answer that a model chooses, scored one at a time."""
    found = []
    for e in subject.data.examples("test"):
        scores = []
        for c in e.choices or []:
            log_p = model(torch.tensor([c.ids])).logits[0].double().log_softmax(-1)
            places = range(c.prompt_length, len(c.ids))
            scores.append(sum(float(log_p[t - 1, c.ids[t]]) for t in places))
        found.append(chosen(scores))
    return found


def test_answers_are_compared_as_a_naive_loop_does(subject: Subject) -> None:
    theirs = answers(subject.load_base(), subject)
    found = Fidelity().run(disturbed(subject, 0.05))
    ours = answers(subject.model, subject)
    right = [e.right for e in subject.data.examples("test")]
    values = {o.metric: o.values for o in found.outcomes}
    assert values["label_loyalty"] == [float(a == b) for a, b in zip(ours, theirs, strict=True)]
    flips = [float((a == r) != (b == r)) for a, b, r in zip(ours, theirs, right, strict=True)]
    assert values["flips"] == flips
    changed = sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert 0 < sum(flips) < changed, "a change from wrong to wrong is no flip"


def test_answers_to_tasks_are_compared(bench: Bench, tmp_path: Path) -> None:
    rows = [{"goal": f"Do {i}", "sol1": "this", "sol2": "that", "label": i % 2} for i in range(8)]
    path = tmp_path / "piqa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    evaluator = Fidelity(tasks=["piqa"], files={"piqa": {"validation": str(path)}}, limit=6)
    subject = subject_of(bench, "dataset=arithmetic", "+dataset.limit.test=4")

    def of_task() -> dict[str, Any]:
        return {m.name: m for m in evaluator.run(subject).metrics if m.task == "piqa"}

    same = of_task()
    assert {n: (m.value, m.n) for n, m in same.items()} == {
        "label_loyalty": (1, 6),
        "answer_loyalty": (1, 6),
        "flips": (0, 6),
    }
    disturbed(subject, 0.5)
    found = of_task()
    assert found["answer_loyalty"].value < 1
    # Of two answers one is right, so every change is a flip.
    assert found["flips"].value == pytest.approx(1 - found["label_loyalty"].value)
    assert found["flips"].value > 0


def test_the_batch_size_does_not_matter(subject: Subject) -> None:
    disturbed(subject, 0.02)
    one, two = (Fidelity(batch_tokens=n).run(subject).outcomes for n in (1, 4096))
    for a, b in zip(one, two, strict=True):
        assert b.values == pytest.approx(a.values, rel=1e-3, abs=1e-4)


def test_text_is_compared_window_by_window(bench: Bench, tmp_path: Path) -> None:
    texts = ["one two three " * 30, "Größe"]
    subject = disturbed(subject_of(bench, *text_file(tmp_path, texts)), 0.02)
    result = Fidelity(window=32, stride=8).run(subject)
    assert {m.name for m in result.metrics} == set(FIELDS)
    assert result.metrics[0].n == 2
    whole = by_name(Fidelity(window=512, stride=8).run(subject))
    assert whole["kl"].value != by_name(result)["kl"].value


def test_an_interrupted_evaluation_goes_on(subject: Subject, tmp_path: Path) -> None:
    disturbed(subject, 0.02)
    evaluator = Fidelity(batch_tokens=100)
    logits, calls = subject.method.logits, [0]

    class Stops(type(subject.method)):  # type: ignore[misc]
        limit = 10**6

        def logits(
            self, model: torch.nn.Module, batch: Any, point: Point = UNNAMED
        ) -> torch.Tensor:
            calls[0] += 1
            if calls[0] > self.limit:
                raise KeyboardInterrupt
            return logits(model, batch)

    kept = dataclasses.replace(
        subject,
        method=Stops(),
        journal=lambda name, items: Journal(tmp_path / f"{name}.items", items),
    )
    expected = evaluator.run(dataclasses.replace(kept, journal=subject.journal))
    whole, calls[0], Stops.limit = calls[0], 0, 2
    with pytest.raises(KeyboardInterrupt):
        evaluator.run(kept)
    Stops.limit, calls[0] = 10**6, 0
    assert evaluator.run(kept) == expected
    assert calls[0] + 2 == whole


def test_another_reference(bench: Bench) -> None:
    words = ["dataset=arithmetic", "+dataset.limit.test=6", "model.weights_seed=3"]
    subject = subject_of(bench, *words, strength=1)
    assert by_name(Fidelity().run(subject))["kl"].value == 0
    assert by_name(Fidelity(reference="tiny").run(subject))["kl"].value > 0


# -- what is refused ---------------------------------------------------------------------------


def test_a_reference_of_another_vocabulary_is_refused_before_loading(bench: Bench) -> None:
    words = ["evaluator=fidelity", "evaluator.fidelity.reference=smollm2-135m"]
    with pytest.raises(UserError, match="another vocabulary: 49152 entries, not 512"):
        bench.job("eval", *words)
    with pytest.raises(UserError, match="There is no model called 'tny'") as error:
        bench.job("eval", "evaluator=fidelity", "evaluator.fidelity.reference=tny")
    assert "'tiny'" in error.value.hint


def test_a_reference_with_other_tokens_is_refused(subject: Subject) -> None:
    subject.data.tokenizer.add_tokens(["ab"])
    with pytest.raises(UserError, match="another vocabulary: other tokens"):
        Fidelity(reference="tiny").run(subject)


def test_a_reference_is_the_one_that_the_key_knows(subject: Subject) -> None:
    """Its config may have changed since, or be none of those that lie here."""
    spec = dataclasses.replace(subject.others[0], name="elsewhere")
    seen = dataclasses.replace(subject, others=[spec], load_model=lambda name: subject.load_base())
    assert by_name(Fidelity(reference="elsewhere").run(seen))["kl"].value == 0


def test_a_reference_with_another_embedding_is_refused(subject: Subject) -> None:
    base = subject.load_base()
    base.resize_token_embeddings(600)  # type: ignore[operator]
    with pytest.raises(UserError, match="600 entries, not 512"):
        Fidelity().run(dataclasses.replace(subject, load_base=lambda: base))


def test_a_task_without_choices_is_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match="gsm8k_cot has no choices"):
        bench.job("eval", "evaluator=fidelity", "evaluator.fidelity.tasks=[gsm8k_cot]")


def test_windows_that_cannot_be_are_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"evaluator\.fidelity\.window=513"):
        bench.job("eval", "evaluator=fidelity", "evaluator.fidelity.window=513")


def test_an_untrained_adapter_is_faithful(bench: Bench) -> None:
    words = ["method=lora", "train.learning_rate=1e-30", "train.max_steps=1", "seed=0"]
    record = bench.run(
        "train",
        *words,
        "evaluator=fidelity",
        "+dataset.limit.train=4",
        "hardware.device=cpu",
        "hardware.dtype=float32",
        "hardware.threads=1",
    )
    found = {m.name: m.value for m in record.metrics if m.split}
    assert found["agreement"] == found["label_loyalty"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-9)


def test_its_passes_say_what_is_compared_at_a_time(subject: Subject) -> None:
    spec = compose("eval", ["model=tiny", "dataset=arithmetic", "evaluator=fidelity"]).spec
    for data in (None, subject.data):
        found = Fidelity().passes(spec, data)
        assert found and all(p.compared == min(p.counted, CHUNK) > 0 for p in found)
