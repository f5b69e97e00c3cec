"""Models and artefacts read out after fewer layers; settings that an evaluation can change."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Bench
from helpers import SHAPE, batch_of, context, counted, generator, tiny_model

from effbench import models
from effbench.config import compose
from effbench.errors import UserError
from effbench.evaluators.base import make_batch
from effbench.methods.base import Method, chain_cost
from effbench.methods.depths import Depths
from effbench.methods.lora import LoRA
from effbench.methods.lora_drop import LoRADrop
from effbench.methods.sorted_lora import SortedLoRA
from effbench.nn.engine import StaticSession
from effbench.nn.quantised import storage_bytes
from effbench.nn.scoring import Plan, Request, padded_scores, tree_scores
from effbench.report.compare import compare
from effbench.stages.export import export

DEEP = replace(SHAPE, num_layers=5)
SMALL = [
    "train.max_steps=3",
    "train.batch_size=2",
    "train.learning_rate=0.01",
    "+dataset.limit.train=16",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]


def losses(record: Any) -> dict[str, float]:
    return {m.point: m.value for m in record.metrics if m.name == "loss"}


def metric(record: Any, name: str, point: str = "") -> float:
    return next(m.value for m in record.metrics if m.name == name and m.point == point)


def test_it_reads_the_model_out_and_counts_what_is_left():
    method = Depths().fitted(DEEP)
    assert method.points() == ("d2", "d3", "d4", "d5")
    model = tiny_model(shape=DEEP).eval().requires_grad_(False)
    for n in (2, 5):
        with method.at(model, f"d{n}"):
            logits = method.logits(model, batch_of())
            cost = method.cost(DEEP, "float32", f"d{n}")
            assert (cost.params, cost.trainable) == (counted(model)["params"], 0)
            assert cost.resident_bytes == storage_bytes(model)
        model.config.num_hidden_layers = n
        assert logits.equal(Method().logits(model, batch_of()))
        model.config.num_hidden_layers = 5


def test_an_artefact_with_logits_of_its_own_is_refused():
    with pytest.raises(UserError, match="lora_drop computes its logits"):
        named = type("Named", (LoRADrop,), {"name": "lora_drop"})
        Depths().check_after([named()])
    Depths().check_after([LoRA()])


def test_depths_count_what_the_run_before_left():
    chain = [LoRA(rank=4), Depths(eval_depths=(2, 5))]
    whole = LoRA(rank=4).cost(DEEP, "float32")
    assert chain_cost(chain, DEEP, "float32", "d5").resident_bytes == whole.resident_bytes
    cut = LoRA(rank=4).cost(replace(DEEP, num_layers=2), "float32")
    assert chain_cost(chain, DEEP, "float32", "d2").resident_bytes == cut.resident_bytes


def test_a_plain_lora_run_is_read_out_at_its_exits(bench: Bench) -> None:
    plain = bench.run("train", "method=lora", "method.alpha=32", *SMALL)
    words = ["method=depths", "method.eval_depths=[3,4]", f"from={plain.key}", *SMALL[-3:]]
    found = bench.run("eval", *words)
    assert found.name_of("method") == "depths" and found.parent == plain.key
    assert losses(found)["d4"] == pytest.approx(losses(plain)[""], rel=1e-6)
    settings = ["method.depths=[4]", "method.eval_depths=[3,4]", "method.train_norm=false"]
    ours = bench.run("train", "method=sorted_lora", *settings, *SMALL)
    assert losses(ours) == losses(found)
    assert metric(found, "weight_bytes", "d3") == metric(ours, "weight_bytes", "d3")
    assert metric(found, "flops_per_token", "d3") == metric(ours, "flops_per_token", "d3")


def test_settings_of_evaluation_can_be_changed_after_training(bench: Bench) -> None:
    trained = bench.run("train", "method=sorted_lora", *SMALL)
    start = [f"from={trained.key}", *SMALL[-3:]]
    again = bench.run("eval", *start, "method.eval_depths=[2,3]", "method.decoding=[exit]")
    assert list(losses(again)) == ["exit", "d2", "d3"]
    assert losses(again)["d3"] == losses(trained)["d3"]
    same = bench.run("eval", *start)
    assert losses(same) == losses(trained)
    for word in ("method.rank=8", "method.depths=[4]", "method=sorted_lora", "method=none"):
        with pytest.raises(UserError, match="already fixes the method"):
            bench.job("eval", *start, word)
    with pytest.raises(UserError, match=r"method\.kv='never'"):
        bench.job("eval", *start, "method.kv=never")


def test_speed_reports_what_a_session_counted(bench: Bench) -> None:
    sizes = ["prompt_tokens=6", "new_tokens=5", "repeats=1", "probe_mb=1", "probe_side=128"]
    found = bench.run(
        "eval",
        "method=depths",
        "method.eval_depths=[2,4]",
        "method.decoding=[exit,speculative]",
        "evaluator=[speed]",
        *(f"evaluator.speed.{size}" for size in sizes),
        *SMALL[-3:],
    )
    assert metric(found, "exit_depth", "exit") == 4  # random weights are sure of nothing
    assert metric(found, "acceptance_length", "speculative") >= 1
    assert metric(found, "layer_passes", "speculative") > 0
    assert all(m.obtained == "counted" for m in found.metrics if m.name == "exit_depth")
    # Shares of the ceilings are for work that is known beforehand.
    assert {m.point for m in found.metrics if m.name == "mbu"} == {"d2", "d4"}


def with_depths(adapters: bool) -> tuple[Any, Any]:
    """Return a method whose points are depths, and its model."""
    model: Any = tiny_model(shape=DEEP)
    if not adapters:
        return Depths(eval_depths=(2, 3, 5)), model.eval().requires_grad_(False)
    method = SortedLoRA(rank=4, depths=(2, 3, 5))
    model = method.prepare(model, context()).eval()
    for p in method.tensors(model).values():
        p.add_(0.1 * torch.randn(p.shape, generator=generator(3)))
    return method, model.requires_grad_(False)


@pytest.mark.parametrize("adapters", [False, True])
def test_requests_share_the_work_of_each_depth(adapters: bool) -> None:
    method, model = with_depths(adapters)
    stem = batch_of().input_ids[0].tolist() * 12
    requests = [Request([*stem, n], [n + 1, n + 2]) for n in range(4, 90)]
    plan = Plan(requests, 128, 64)
    assert any(g.stem for g in plan.groups)
    seen = set()
    for point in method.points():
        with method.at(model, point):
            trees = tree_scores(model, plan, iter(plan.groups), torch.device("cpu"))
            found = {i: score for scores in trees for i, score in scores.items()}
            logits, rows = partial(method.logits, model), iter([range(len(requests))])
            (expected,) = padded_scores(logits, lambda r: make_batch(r, 0), requests, rows)
        assert method.plain_logits(point) and len(found) == len(requests)
        for i, score in found.items():
            assert score.loglikelihood == pytest.approx(expected[i].loglikelihood, abs=1e-4)
        seen.add(found[0].loglikelihood)
    assert len(seen) == 3


@pytest.mark.parametrize("adapters", [False, True])
def test_the_engine_decodes_each_depth(adapters: bool) -> None:
    method, model = with_depths(adapters)
    ids = torch.randint(3, 128, (2, 12), generator=generator(4))
    for n in (2, 3, 5):
        with method.at(model, f"d{n}"):
            session = method.session(model)
            assert isinstance(session, StaticSession) and len(session.layers) == n
            assert session.engine == "walk" if adapters else session.engine != "graph"
            steps = [session.prefill(ids[:, :6])]
            steps += [session.step(ids[:, t : t + 1]) for t in range(6, 12)]
            whole = model(ids).logits[:, 5:]
        torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_layer_forwards_are_counted_and_compared(bench: Bench) -> None:
    plain, sorted_ = (
        bench.run("train", *words, "train.accumulation=2", *SMALL)
        for words in (["method=lora"], ["method=sorted_lora"])
    )
    whole, less = (metric(r, "train_layer_forwards") for r in (plain, sorted_))
    tokens = metric(plain, "train_tokens")
    assert whole % 4 == 0 and whole >= 4 * tokens
    # Depths 3 and 4 in turn, over micro-batches of at most two rows.
    assert 3 / 4 <= less / whole < 1
    budgets = {b.name: b for b in compare([plain, sorted_]).budgets}
    assert budgets["training tokens"].equal and budgets["layer forwards"].equal is False
    assert budgets["layer forwards"].values == [whole, less]


def test_an_exported_depth_is_a_model_to_run_with(bench: Bench, tmp_path: Any) -> None:
    trained = bench.run("train", "method=sorted_lora", *SMALL)
    export(trained.key, tmp_path / "small", "d3", bench.root)
    spec = compose("eval", ["model=folder", f"model.path={tmp_path / 'small'}"]).spec.model
    loaded = models.load(spec, device="cpu", dtype=torch.float32)
    assert loaded.shape.num_layers == 3
    assert loaded.tokenizer("2 + 2")["input_ids"]
    job = ["model=folder", f"model.path={tmp_path / 'small'}", *SMALL[-3:]]
    found = bench.run("eval", *job)
    assert losses(found)[""] == pytest.approx(losses(trained)["d3"], abs=1e-5)
    with pytest.raises(UserError, match="no point 'd9'"):
        export(trained.key, tmp_path / "other", "d9", bench.root)
