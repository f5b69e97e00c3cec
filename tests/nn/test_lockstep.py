"""Several operating points in one pass: the numbers of separate passes, for less work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from helpers import Watch, batch_of, generator, prepared, tiny_model

from effbench.api.footprint import POINTS_AT_ONCE
from effbench.api.points import UNNAMED, Point
from effbench.api.sharing import top_map
from effbench.evaluators.subject import Subject
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import Rank
from effbench.methods.adapters.qdylora import QDyLoRA
from effbench.methods.decodes import Forward
from effbench.nn.adapters.lowrank import LowRankLinear, low_rank_layers
from effbench.nn.decode.decoder import forward_logits
from effbench.nn.llama.shared_attention import share
from effbench.nn.llama.walk import why_not
from effbench.nn.quant import nf4
from effbench.nn.quant.linears import NF4Linear, expanded_once
from effbench.nn.scoring import multi_point
from effbench.nn.scoring.multi_point import can_walk, nll_at, states_at
from effbench.nn.scoring.prefix_tree import Plan, Request, tree_scores
from effbench.resources.predict import predict
from effbench.results.journal import Journal
from effbench.results.records import Metric, Record
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

CPU = torch.device("cpu")
RANKS = (Rank(1), Rank(2), Rank(3), Rank(4))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def adapted(method: DyLoRA, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return a model whose adapters say something else at every rank."""
    model, _ = prepared(method, dtype=dtype)
    for _, layer in low_rank_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator(1))
        if dtype is torch.float64:
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.double(), layer.lora_B.double()
    return model.eval().requires_grad_(False)


def ats(method: DyLoRA, model: torch.nn.Module, points: Any = RANKS) -> list[Any]:
    return [partial(method.at, model, point) for point in points]


# -- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [DyLoRA, QDyLoRA])
def test_one_pass_gives_the_numbers_of_separate_ones(
    kind: type[DyLoRA], dtype: torch.dtype
) -> None:
    method, batch = kind(rank=4), batch_of(rows=3)
    model: Any = adapted(method, dtype)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    states = states_at(model, ats(method, model), **inputs)
    nlls = nll_at(model, ats(method, model), *inputs.values(), batch.labels)
    for point, state, nll in zip(RANKS, states, nlls, strict=True):
        with method.at(model, point):
            assert state.equal(model.model(**inputs, use_cache=False).last_hidden_state)
            assert nll.equal(method.token_nll(model, batch))
    assert len({float(nll.sum()) for nll in nlls}) == 4


def test_a_packed_weight_is_expanded_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = QDyLoRA(rank=4), batch_of()
    model = adapted(method)
    calls: Counter[str] = Counter()
    expand, adapt = nf4.dequantise, LowRankLinear.forward

    def expanding(*words: Any) -> torch.Tensor:
        calls["expanded"] += 1
        return expand(*words)

    def adapting(layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        calls["products"] += 1
        return adapt(layer, x)

    monkeypatch.setattr(nf4, "dequantise", expanding)
    monkeypatch.setattr(LowRankLinear, "forward", adapting)
    inputs = batch.input_ids, batch.attention_mask, batch.labels
    nll_at(model, ats(method, model), *inputs)
    assert calls == {"expanded": 14, "products": 4 * 14}
    calls.clear()
    for point in RANKS:
        with method.at(model, point):
            method.token_nll(model, batch)
    assert calls == {"expanded": 4 * 14, "products": 4 * 14}


def test_an_expanded_weight_is_let_go_even_after_an_error() -> None:
    model = adapted(QDyLoRA(rank=4))
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    x = torch.randn(3, layers[0].in_features, generator=generator(2))
    before = layers[0](x)
    with pytest.raises(RuntimeError), expanded_once(model):
        assert layers[0](x).equal(before) and layers[0](x).equal(before)
        assert layers[0]._kept and not layers[1]._kept
        raise RuntimeError
    assert all(layer._kept is None for layer in layers)
    assert layers[0](x).equal(before)


def test_what_is_no_plain_model_is_not_walked_through() -> None:
    model: Any = adapted(DyLoRA(rank=4))
    assert can_walk(model)
    watched = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert not can_walk(model)
    watched.remove()
    assert not can_walk(model.train())
    shared = share(tiny_model(), top_map(2, 1)).eval()
    assert not why_not(shared) and not can_walk(shared)


# -- as an evaluator sees it -----------------------------------------------------------------------


def subject_at(method: DyLoRA, model: Any, beside: Mapping[Point, Any]) -> Subject:
    made = Subject(model, method, Rank(1), None, CPU, 0, 0)  # type: ignore[arg-type]
    made.beside = beside
    made.journal = lambda name, items: Journal(None, items)
    return made


@pytest.mark.parametrize("prefix", [0, 300])
def test_answers_are_scored_as_point_by_point(prefix: int) -> None:
    draw = torch.randint(3, 128, (2000,), generator=generator(5)).tolist()
    start = draw[:prefix]
    requests = [
        Request([*start, *draw[i * 40 : i * 40 + 9]], draw[i * 40 + 9 : i * 40 + 9 + n])
        for i in range(20)
        for n in (1, 3)
    ]
    method = QDyLoRA(rank=4)
    model = adapted(method)
    kept: dict[Point, Journal] = {}

    def opening(point: Point, name: str, items: Any) -> Journal:
        kept[point] = Journal(None, items)
        return kept[point]

    subject = subject_at(method, model, {p: partial(opening, p) for p in RANKS[1:]})
    with method.at(model, Rank(1)):
        found = subject.score(requests, "a", 256)
    plan = Plan(requests, 256)
    assert any(g.stem for g in plan.groups) == bool(prefix)
    assert bool(kept) == (not prefix)  # a stem's cache is not held once for each point
    for point in (Rank(1), *kept):
        alone = {}
        with method.at(model, point):
            for scores in tree_scores(model, plan, iter(plan.groups), CPU):
                alone |= scores
        expected = [alone[i] for i in range(len(requests))]
        own = [(s.loglikelihood, s.greedy) for s in expected]
        assert (found if point == Rank(1) else None) in (expected, None)
        assert point == Rank(1) or [tuple(v) for v in kept[point].values()] == own


def test_a_number_that_is_not_finite_is_found_at_its_point() -> None:
    method, batch = DyLoRA(rank=4), batch_of()
    model = adapted(method)
    layer = dict(low_rank_layers(model))["model.layers.1.mlp.up_proj"]
    layer.lora_B[:, 3] = float("nan")
    subject = subject_at(method, model, {})
    assert len(subject.token_nlls(batch, [Rank(2), Rank(3)])) == 2
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        subject.token_nlls(batch, [Rank(3), Rank(4)])


class OwnLoss(DyLoRA):
    """A method that predicts in a way of its own."""

    def forward(self, point: Point = UNNAMED) -> Forward:
        return Forward(lambda model, batch: 2 * forward_logits(model, batch))


@pytest.mark.parametrize("kind", [DyLoRA, OwnLoss])
def test_only_plain_predictions_go_in_one_pass(kind: type[DyLoRA]) -> None:
    method = kind(rank=4)
    beside: dict[Point, Any] = {Rank(2): lambda name, items: Journal(None, items)}
    opened = subject_at(method, adapted(method), beside).journals("a", ["x"])
    assert list(opened) == ([Rank(1), Rank(2)] if kind is DyLoRA else [Rank(1)])


# -- in a run --------------------------------------------------------------------------------------

WORDS = [
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
    "dataset.limit.test=12",
    "train.max_steps=2",
    "method.rank=4",
    "method.eval_ranks=[1,2,4]",
    "evaluator=[perplexity,choices]",
    "evaluator.perplexity.batch_tokens=100",
    "evaluator.choices.batch_tokens=100",
]


def watched_passes(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of points of each pass through a model."""
    points: list[int] = []
    states = multi_point.states_at

    def watched(model: Any, some: Any, *words: Any, **inputs: Any) -> Any:
        points.append(len(some))
        return states(model, some, *words, **inputs)

    patch.setattr(multi_point, "states_at", watched)
    return points


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The record of a run that evaluates its points one after the other."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DyLoRA, "in_one_pass", False)
        patch.setattr(multi_point, "states_at", None)
        root = tmp_path_factory.mktemp("apart")
        return Bench(root).run("train", "method=qdylora", *WORDS)


def evaluated(record: Record) -> list[Metric]:
    return [m for m in record.metrics if m.split]


@pytest.mark.parametrize("stop_after", [0, 1, 2, 4, 11])
def test_a_run_ends_the_same_wherever_it_is_stopped(
    bench: Bench, apart: Record, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: Counter[tuple[str, int]] = Counter()
    if stop_after:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            first = Watch(patch, stop_after)
            bench.run("train", "method=qdylora", *WORDS)
        done += first.items
    with monkeypatch.context() as patch:
        last = Watch(patch)
        passes = watched_passes(patch)
        record = bench.run("train", "method=qdylora", *WORDS)
    done += last.items
    assert set(done.values()) == {1}
    assert len({path for path, _ in done}) == 6
    assert record.outcomes == apart.outcomes
    assert evaluated(record) == evaluated(apart)
    assert record.key == apart.key
    assert set(passes) <= {1, 2, 3} and 3 in passes


def test_the_prediction_counts_what_stands_beside() -> None:
    from effbench.api.spec import Machine
    from effbench.config.compose import compose
    from effbench.models.load import known_shape

    def memory(*words: str) -> dict[str, int]:
        spec = compose("train", ["hardware=cpu", "hardware.dtype=bfloat16", *words]).spec
        shape = known_shape(spec.model)
        assert shape is not None
        phase = predict(spec, shape, Machine()).phase("evaluate")
        assert phase is not None
        return phase.memory

    stream = 1024 * 576 * 2
    many = f"method.eval_ranks={list(range(1, 17))}".replace(" ", "")
    assert "other points" not in memory("method=lora")
    assert "other points" not in memory("method=dylora", "method.eval_ranks=[4]")
    assert memory("method=dylora")["other points"] == 4 * stream
    assert memory("method=dylora", many)["other points"] == (POINTS_AT_ONCE - 1) * stream
    kept = 2 * (576 * (576 + 192) * 2 + 3 * 576 * 1536)
    assert memory("method=qdylora")["other points"] == 4 * stream + kept
