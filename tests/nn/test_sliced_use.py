"""Sliced models in the decode engine, in tree scoring and in the plan of what trains them next."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, begun, decoded, generator, tiny_model
from test_scoring import alone, benchmark, by_tree, close, subject

from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.method_types import Context
from effbench.api.parts import LayerSize
from effbench.api.plugins import make_method
from effbench.api.points import Point
from effbench.api.shape import Shape
from effbench.methods.adapters.deep_lora import DeepLoRA
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import inference_cost, shape_of
from effbench.methods.depth.depths import Depths
from effbench.methods.depth.points import Depth
from effbench.methods.depth.sorted_full import SortedFull
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.methods.full import Full
from effbench.methods.pruning.apt import APT
from effbench.nn.decode import native
from effbench.nn.decode.cuda_graph import StaticStep
from effbench.nn.decode.pointwise import fused
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.staged import StagedDecoder
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.walk import why_not
from effbench.nn.pruning.slicing import layer_sizes, resize, shape_left
from effbench.nn.quant.linears import storage_bytes
from effbench.nn.scoring.prefix_tree import has_trees
from effbench.resources.counting import flops
from effbench.runner.open import evaluated
from effbench.runner.worker import run_here
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=4, tied=True)
ALIKE = [LayerSize(2, 1, 27)] * 4
UNLIKE = {
    "neurons": [*ALIKE[:3], LayerSize(2, 1, 5)],
    "heads": [*ALIKE[:3], LayerSize(4, 2, 27)],
    "first without heads": [LayerSize(0, 0, 9), *ALIKE[:2], LayerSize(4, 2, 0)],
    "nothing at all in one": [LayerSize(0, 0, 0), *ALIKE[:3]],
    "no heads anywhere": [LayerSize(0, 0, 9)] * 4,
}


def sliced(sizes: list[LayerSize], dtype: torch.dtype = torch.float64, dims: int = 23) -> Any:
    model = tiny_model(dtype=dtype, shape=DEEP)
    resize(model, dims, sizes)
    assert list(layer_sizes(model)) == sizes
    return model.eval().requires_grad_(False)


def tokens() -> torch.Tensor:
    return torch.randint(3, SHAPE.vocab_size, (2, 12), generator=generator(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [23, 32])
def test_layers_that_are_alike_are_decoded_by_the_engine(dtype: torch.dtype, dims: int) -> None:
    model, ids = sliced(ALIKE, dtype, dims), tokens()
    session = session_for(model)
    assert isinstance(session, StaticSession)
    session.reserve(2, 12)
    assert session.engine == ("native" if native.kernels() else "walk")
    whole = sliced(ALIKE, torch.float64, dims)
    whole.load_state_dict(model.state_dict())
    expected = whole(input_ids=ids).logits[:, 4:].to(dtype)
    # bfloat16 rounds each layer's result to 8 bits
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    for one in (session, StaticSession(model, use_native=False)):
        torch.testing.assert_close(decoded(one, ids, 5), expected, **near)
    assert session.kv_bytes() == 2 * 12 * 4 * 2 * DEEP.head_dim * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", UNLIKE)
def test_layers_that_differ_are_decoded_by_the_engine(name: str, dtype: torch.dtype) -> None:
    model, ids = sliced(UNLIKE[name], dtype), tokens()
    exact = sliced(UNLIKE[name])
    exact.load_state_dict(model.state_dict())
    expected = exact(input_ids=ids, use_cache=False).logits[:, 4:].to(dtype)
    attends = any(size.num_heads for size in UNLIKE[name])
    assert (why_not(model) == "") == attends
    sessions = [session_for(model), CachedSession(model)]
    if attends:
        assert session_of_kind(sessions[0]) == ("native" if native.kernels() else "walk")
        sessions.append(StaticSession(model, use_native=False))
        sessions[-1].reserve(2, 300)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    for session in sessions:
        torch.testing.assert_close(decoded(session, ids, 5), expected, **near)
        left = shape_left(model, DEEP)
        assert session.kv_bytes() == ids.numel() * left.kv_bytes_per_token(dtype.itemsize)


def session_of_kind(session: Any) -> str:
    assert isinstance(session, StaticSession)
    session.reserve(2, 8)  # and so it has to grow
    return session.engine


@pytest.mark.parametrize("use_native", [True, False])
def test_a_long_padded_batch_of_layers_that_differ(use_native: bool) -> None:
    """More positions than one chunk and than were reserved; sequences change places."""
    model = sliced(UNLIKE["first without heads"], torch.float32)
    ids = torch.randint(3, SHAPE.vocab_size, (2, 290), generator=generator(5))
    mask = torch.ones_like(ids[:, :280])
    mask[0, :7] = 0
    session, plain = StaticSession(model, use_native=use_native), CachedSession(model)
    for one in (session, plain):
        one.prefill(ids[:, :280], mask)
        one.reorder(torch.tensor([1, 0]))
    for t in range(280, 290):
        found, expected = (one.step(ids[:, t : t + 1]) for one in (session, plain))
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_captured_form_of_a_step_takes_layers_that_differ() -> None:
    model, ids = sliced(UNLIKE["first without heads"], torch.float32), tokens()
    session, other = (StaticSession(model, use_native=False) for _ in range(2))
    for one in (session, other):
        one.prefill(ids[:, :5])
    static = StaticStep(other, fused(lambda function: function))
    for t in range(5, 9):
        static.token.copy_(ids[:, t : t + 1])
        found = static.logits(other)
        static.advance(other)
        torch.testing.assert_close(found, session.step(ids[:, t : t + 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["alike", *UNLIKE])
@pytest.mark.parametrize("prefix", [0, 90])
def test_trees_give_the_scores_of_their_requests(name: str, prefix: int) -> None:
    model = sliced({"alike": ALIKE, **UNLIKE}[name])
    assert has_trees(model)
    requests = benchmark(random.Random(prefix), 8, prefix, 12, 3)
    expected = [alone(model, r) for r in requests]
    close(by_tree(model, requests, row_tokens=48), expected)
    close(subject(model).score(requests, "a", 128), expected)


@pytest.mark.parametrize(
    "method", [Full(), LoRA(rank=4), DeepLoRA(rank=4), APT(rank=4)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("name", ["neurons", "heads"])
def test_training_goes_on_at_the_stated_flops(method: Method, name: str) -> None:
    model = sliced(UNLIKE[name], torch.float32)
    model.set_attn_implementation("eager")
    shape, batch = shape_left(model, DEEP), batch_of(length=40)
    draws = generator()
    ctx = Context(0, torch.device("cpu"), torch.float32, draws, lambda name: model)
    model = begun(method, model, ctx).train()
    counted = flops(lambda: method.loss(model, batch, ctx).backward())
    one = Pass("train", *batch.input_ids.shape, batch.loss_tokens)
    stated = step_flops(
        training_of(shape_of(method, shape, phase="train"), "float32"), one, square=True
    )
    assert stated == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("kind", [Depths, SortedFull, SortedLoRA])
def test_layers_that_differ_have_no_depths(name: str, kind: type[Depths]) -> None:
    model = sliced(UNLIKE[name])
    shape = shape_left(model, DEEP)
    method = kind(**({"rank": 2} if kind is SortedLoRA else {})).with_depths(4)
    with pytest.raises(UserError, match="differ in size"):
        method.resolve(shape)
    with pytest.raises(UserError, match="differ in size"), method.at(model, method.default_point()):
        pass
    with pytest.raises(UserError, match="differ in size"):
        StagedDecoder(model, (2, 4))


@pytest.mark.parametrize("point", [Depth(2), Depth(4)])
def test_layers_that_are_alike_have_depths(point: Point) -> None:
    model, ids = sliced(ALIKE, torch.float32), tokens()
    shape, method = shape_left(model, DEEP), Depths(eval_depths=(2, 4))
    method.resolve(shape)
    batch = batch_of(length=40)
    with method.at(model, point):
        expected = model(input_ids=ids).logits[:, 4:]
        torch.testing.assert_close(decoded(method.session(model), ids, 5), expected)
        counted = flops(lambda: method.logits(model, batch))
        held = storage_bytes(model)
    cost = inference_cost([method], shape, "float32", point)
    assert cost.resident_bytes == held
    assert cost.flops_per_token * batch.input_ids.numel() == pytest.approx(counted, rel=0.02)


# -- chains ------------------------------------------------------------------------------------

CHAINS = {
    "qlora": ["method=qlora", "method.rank=4"],
    "apt": ["method=apt", "method.rank=4", "method.keep=0.8", "method.mask_step=1"],
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_trial_opens_what_the_run_after_a_slice_evaluates(
    name: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ["hardware.device=cpu", "hardware.dtype=float32", "evaluator=[]", "train.max_steps=2"]
    pruning = ["method=structured", "method.blocks=[neurons,dims]", "method.keep=0.5"]
    first = bench.run("compress", *pruning, *small)
    job = bench.job("train", f"from={first.key}", *CHAINS[name], *small)
    found: list[Any] = []
    monkeypatch.setattr(
        "effbench.runner.stages.train.evaluate", lambda run, opened, _: found.append(opened.model)
    )
    run_here(job)
    seen: list[Shape] = []
    kind = type(make_method(job.spec.method))
    resolve = kind.resolve

    def watched(self: Method, shape: Shape) -> Method:
        seen.append(shape)
        return resolve(self, shape)

    monkeypatch.setattr(kind, "resolve", watched)
    (tmp_path / "scratch").mkdir()
    opened = evaluated(job, bench.store, tmp_path / "scratch")
    model, method = opened.model, opened.method
    sizes = json.loads((bench.store.run(first.key).artefact / "sizes.json").read_text())
    assert {s.hidden_size for s in seen} == {sizes["hidden_size"]}
    layers = [seen[0].layer(index) for index in range(seen[0].num_layers)]
    assert [list(vars(layer).values()) for layer in layers] == sizes["layers"]
    assert storage_bytes(model) == storage_bytes(found[0])
    batch = batch_of()
    with torch.no_grad():
        assert method.logits(model, batch).equal(method.logits(found[0].eval(), batch))
