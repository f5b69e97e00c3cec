"""Models and artefacts read out after fewer layers; settings that an evaluation can change."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, counted, generator, tiny_model

from effbench.api.batch import make_batch
from effbench.config.compose import compose
from effbench.methods.adapters.deep_lora import DeepLoRA
from effbench.methods.adapters.dora import DoRA
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost
from effbench.methods.depth.depths import Depths
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Depth
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.models import load as models
from effbench.nn.adapters.merge import merged
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.nn.decode.native import kernels as native_kernels
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.surgery import decoder_linears, replace_linears
from effbench.nn.quant.linears import PackedLinear, storage_bytes
from effbench.nn.scoring.prefix_tree import Plan, Request, padded_scores, tree_scores
from effbench.report.comparison.compare import compare
from effbench.runner.stages.export import export
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

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
    method = Depths().resolve(DEEP)
    assert method.points() == (Depth(2), Depth(3), Depth(4), Depth(5))
    model = tiny_model(shape=DEEP).eval().requires_grad_(False)
    for n in (2, 5):
        with method.at(model, Depth(n)):
            logits = method.logits(model, batch_of())
            cost = chain_cost([method], DEEP, "float32", Depth(n))
            assert (cost.params, cost.trainable) == (counted(model)["params"], 0)
            assert cost.resident_bytes == storage_bytes(model)
        model.config.num_hidden_layers = n
        assert logits.equal(Method().logits(model, batch_of()))
        model.config.num_hidden_layers = 5


def test_an_artefact_with_logits_of_its_own_is_refused():
    with pytest.raises(UserError, match="lora_drop computes its logits"):
        named = type("Named", (LoRADrop,), {"name": "lora_drop"})
        Depths().check_start([named()])
    Depths().check_start([LoRA()])


def test_what_follows_one_depth_alone_starts_from_all_layers():
    alone, both = (SortedLoRA(rank=4, depths=d) for d in ((2,), (2, 5)))
    for point in (Depth(2), Depth(5)):
        costs = [chain_cost([m, Depths()], DEEP, "float32", point) for m in (alone, both)]
        assert costs[0] == costs[1]


def test_depths_count_what_the_run_before_left():
    chain = [LoRA(rank=4), Depths(eval_depths=(2, 5))]
    whole = chain_cost([LoRA(rank=4)], DEEP, "float32")
    assert chain_cost(chain, DEEP, "float32", Depth(5)).resident_bytes == whole.resident_bytes
    cut = chain_cost([LoRA(rank=4)], replace(DEEP, num_layers=2), "float32")
    assert chain_cost(chain, DEEP, "float32", Depth(2)).resident_bytes == cut.resident_bytes


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
    found = bench.run(
        "eval",
        "method=depths",
        "method.eval_depths=[2,4]",
        "method.decoding=[exit,speculative]",
        *TIMED,
    )
    assert metric(found, "exit_depth", "exit") == 4  # random weights are sure of nothing
    assert metric(found, "acceptance_length", "speculative") >= 1
    assert metric(found, "layer_passes", "speculative") > 0
    assert all(m.obtained == "counted" for m in found.metrics if m.name == "exit_depth")
    # Shares of the ceilings are for work that is known beforehand.
    assert {m.point for m in found.metrics if m.name == "mbu"} == {"d2", "d4"}


SIZES = ["prompt_tokens=6", "new_tokens=5", "repeats=1", "probe_mb=1", "probe_side=128"]
TIMED = ["evaluator=[speed]", *(f"evaluator.speed.{size}" for size in SIZES), *SMALL[-3:]]
AT = ["method=depths", "method.eval_depths=[2,4]"]


@pytest.mark.parametrize("engine", ["static", "eager", "generate"])
def test_every_engine_decodes_a_depth_and_states_its_ceiling(bench: Bench, engine: str) -> None:
    words = [*AT, *TIMED, f"evaluator.speed.engine={engine}"]
    found = bench.run("eval", *words)
    read = {p: metric(found, "bytes_per_token", p) for p in ("d2", "d4")}
    assert metric(found, "speed_ceiling", "d2") == read["d4"] / read["d2"] > 1
    assert metric(found, "speed_ceiling", "d4") == 1
    assert metric(found, "kv_bytes", "d4") == 2 * metric(found, "kv_bytes", "d2")
    assert metric(found, "decode_tokens_per_second", "d2") > 0
    ceiling = next(m for m in found.metrics if m.name == "speed_ceiling")
    assert (ceiling.obtained, ceiling.phase) == ("counted", "decode")


def test_the_ceiling_is_of_all_layers_whichever_are_listed(bench: Bench) -> None:
    found = bench.run("eval", *AT[:1], "method.eval_depths=[2]", *TIMED)
    assert metric(found, "speed_ceiling", "d2") > 1.3


def test_dynamic_decoding_has_no_other_engine_and_no_ceiling(bench: Bench) -> None:
    words = [*AT, "method.decoding=[exit]", *TIMED]
    for word in ("engine=static", "baseline=eager"):
        with pytest.raises(UserError, match="depths decodes in a way of its own at exit"):
            bench.job("eval", *words, f"evaluator.speed.{word}")
    found = bench.run("eval", *words, "evaluator.speed.engine=merged")
    assert {m.point for m in found.metrics if m.name == "speed_ceiling"} == {"d2", "d4"}


def test_a_trained_depth_is_timed_as_the_plain_model_it_merges_into(bench: Bench) -> None:
    trained = bench.run("train", "method=sorted_lora", *SMALL)
    words = [f"from={trained.key}", *TIMED]
    own = bench.run("eval", *words)
    plain = bench.run("eval", *words, "evaluator.speed.engine=merged")
    dense = bench.run("eval", "method=depths", "method.eval_depths=[3,4]", *TIMED)
    for point in ("d3", "d4"):
        ceilings = [metric(r, "speed_ceiling", point) for r in (own, plain, dense)]
        assert ceilings[1] == ceilings[2]
        assert metric(plain, "bytes_per_token", point) == metric(own, "bytes_per_token", point)
    assert metric(plain, "merged_linears", "d3") == 3 * 7
    assert metric(plain, "merged_linears", "d4") == 4 * 7
    assert "merged_linears" not in {m.name for m in own.metrics}
    with pytest.raises(UserError, match="these are packed"):
        bench.job("train", "method=qlora", *TIMED, "evaluator.speed.engine=merged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_a_model_is_plain_and_afterwards_as_it_was(dtype: torch.dtype) -> None:
    method, model = with_depths(True)
    model = model.to(dtype)
    modules = {n: id(m) for n, m in model.named_modules()}
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    for point in method.points():
        with method.at(model, point):
            expected = model(batch_of().input_ids).logits
            with pytest.raises(RuntimeError), merged(model) as count:
                assert count == 7 * len(model.model.layers)
                assert all(type(m) is torch.nn.Linear for _, m in decoder_linears(model))
                assert {p.dtype for p in model.parameters()} == {dtype}
                found = model(batch_of().input_ids).logits
                session: Any = method.session(model)
                session.prefill(batch_of().input_ids)
                native = native_kernels() is not None
                assert session.engine == ("native" if native else "walk")
                raise RuntimeError
            assert model(batch_of().input_ids).logits.equal(expected)
        loose = 1e-4 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(found, expected, atol=loose, rtol=loose)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert all(t.equal(tensors[n]) for n, t in model.state_dict().items())


def test_adapters_of_every_kind_are_merged_but_none_into_packed_weights() -> None:
    for method in (LoRA(4), DyLoRA(4), DeepLoRA(rank=4), DoRA(rank=4)):
        model: Any = tiny_model(shape=DEEP)
        model = method.prepare(model, context()).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.1 * torch.randn(p.shape, generator=generator(3)))
        with torch.no_grad(), merged(model) as count:
            found = model(batch_of().input_ids).logits
        assert count == 35
        with torch.no_grad():
            expected = model(batch_of().input_ids).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    model = tiny_model(shape=DEEP)
    replace_linears(model, lambda _, linear: PackedLinear.quantise(linear, 4, 32))
    model = LoRA(4).prepare(model, context())
    with pytest.raises(UserError, match="cannot take its adapter in"), merged(model):
        pass
    assert any(True for _ in peft_adapters(model))


def with_depths(adapters: bool) -> tuple[Any, Any]:
    """Return a method whose points are depths, and its model."""
    model: Any = tiny_model(shape=DEEP)
    if not adapters:
        return Depths(eval_depths=(2, 3, 5)), model.eval().requires_grad_(False)
    method = SortedLoRA(rank=4, depths=(2, 3, 5))
    model = method.prepare(model, context()).eval()
    for p in method.trained_tensors(model).values():
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
            logits, rows = partial(method.logits, model, point=point), iter([range(len(requests))])
            (expected,) = padded_scores(logits, lambda r: make_batch(r, 0), requests, rows)
        assert method.forward(point).shares_prefixes and len(found) == len(requests)
        for i, score in found.items():
            assert score.loglikelihood == pytest.approx(expected[i].loglikelihood, abs=1e-4)
        seen.add(found[0].loglikelihood)
    assert len(seen) == 3


@pytest.mark.parametrize("adapters", [False, True])
def test_the_engine_decodes_each_depth(adapters: bool) -> None:
    method, model = with_depths(adapters)
    ids = torch.randint(3, 128, (2, 12), generator=generator(4))
    for n in (2, 3, 5):
        with method.at(model, Depth(n)):
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
