"""LoRA-Drop in our decode engine, against the session of whole modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_lora_drop import SETS, SHAPE, decoded, in_float64, prepared, tiny, tokens

from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Window
from effbench.nn.decode import native
from effbench.nn.decode.cuda_graph import StaticStep
from effbench.nn.decode.pointwise import fused
from effbench.nn.decode.session import greedy
from effbench.nn.decode.temporal import TemporalSession
from effbench.nn.decode.temporal_static import StaticTemporalSession

POLICIES = ["refresh", "previous", "input", "reuse", "identity"]


@pytest.fixture(params=["native", "walk"])
def way(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and native.kernels() is None:
        pytest.skip(native.why_not())
    return str(request.param)


def both(model: Any, way: str) -> tuple[StaticTemporalSession, TemporalSession]:
    ours = StaticTemporalSession(model, model.lora_drop, use_native=way == "native")
    assert ours.engine == way
    return ours, TemporalSession(model, model.lora_drop)


def policy(name: str, **settings: Any) -> tuple[LoRADrop, Any, Window]:
    """Return a method that starts dropped tokens in a way, its model and its point."""
    if name in ("reuse", "identity"):
        method = LoRADrop(rank=5, baselines=(name,), **settings)  # type: ignore[arg-type]
        return method, prepared(method), Window(method.window, name)  # type: ignore[arg-type]
    method = LoRADrop(rank=5, anchor=name, **settings)  # type: ignore[arg-type]
    return method, prepared(method), Window(method.window)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("layers", "window"),
    [*SETS[1:3], *(pytest.param(*s, marks=pytest.mark.slow) for s in SETS[::3])],
)
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_our_engine_gives_what_whole_modules_give(
    name: str, layers: tuple[int, ...], window: int, padded: bool, way: str
) -> None:
    method, model, point = policy(name, layers=layers, window=window)
    ids, mask = tokens(3, 20), torch.ones(3, 6, dtype=torch.long)
    mask[0, :3], mask[2, :5] = 0, 0
    with method.at(model, point):
        ours, theirs = both(model, way)
    seen = [decoded(s, ids, 6, mask if padded else None) for s in (ours, theirs)]
    torch.testing.assert_close(*seen, atol=2e-5, rtol=1e-5)
    assert seen[0].std() > 0.5
    rows = torch.tensor([2, 0, 0, 1])
    for session in (ours, theirs):
        session.reorder(rows)
    for t in range(2 * window + 3):  # over a refresh, from any place in the cycle
        token = tokens(4, 1, seed=t)
        torch.testing.assert_close(ours.step(token), theirs.step(token), atol=2e-5, rtol=1e-5)
    assert ours.kv_lengths() == theirs.kv_lengths()
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert vars(ours.cycle) == vars(theirs.cycle)


@torch.no_grad()
def test_the_same_tokens_are_generated_and_again(way: str) -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=3)
    model, ids = prepared(method), tokens(2, 7)
    ours, theirs = both(model, way)
    expected = greedy(theirs, ids, 40)
    assert greedy(ours, ids, 40).equal(expected)
    assert greedy(both(model, way)[0], ids, 40).equal(expected)
    for row in range(2):
        assert greedy(both(model, way)[0], ids[row : row + 1], 40)[0].equal(expected[row])
    session = method.session(model)
    assert isinstance(session, StaticTemporalSession)


@torch.no_grad()
def test_half_precision(way: str) -> None:
    model, ids = prepared(LoRADrop(rank=4, layers=(2, 3, 5), window=2), tiny().bfloat16()), None
    ids = tokens(2, 12)
    ours, theirs = (decoded(s, ids, 4) for s in both(model, way))
    assert ours.dtype == torch.bfloat16
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


@torch.no_grad()
def test_caches_grow_each_for_itself(way: str) -> None:
    """Past the room that a prompt leaves, in the layers that take every token alone."""
    model, ids = prepared(LoRADrop(rank=4, layers=(2, 3, 5), window=3)), tokens(1, 330)
    ours, theirs = both(model, way)
    seen = [decoded(s, ids, 3) for s in (ours, theirs)]
    torch.testing.assert_close(*seen, atol=5e-5, rtol=1e-5)
    capacities = [layer.capacity for layer in ours.layers]
    assert capacities[2] == capacities[3] == capacities[5] < min(capacities[0], 200)
    assert ours.reserved_bytes() < 8 * 2 * SHAPE.num_kv_heads * SHAPE.head_dim * 4 * capacities[0]


@torch.no_grad()
def test_what_is_reserved_is_less_for_droppable_layers(way: str) -> None:
    model, ids = prepared(LoRADrop(rank=4, layers=(2, 3, 5), window=3)), tokens(2, 600)
    ours, theirs = both(model, way)
    ours.reserve(2, 600, prompt=30)
    assert [layer.capacity for layer in ours.layers] == [640, 640, 256, 256, 640, 256, 640, 640]
    kept = ours.buffers()
    seen = [decoded(s, ids[:, :60], 30) for s in (ours, theirs)]
    torch.testing.assert_close(*seen, atol=5e-5, rtol=1e-5)
    assert all(a is b for a, b in zip(kept, ours.buffers(), strict=True))


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_the_two_static_forms_of_a_step(name: str) -> None:
    """What is captured on a CUDA device: fixed addresses, one state, a mask over each cache."""
    method, model, point = policy(name, layers=(2, 3, 5), window=2)
    ids, mask = tokens(2, 18), torch.ones(2, 6, dtype=torch.long)
    mask[1, :4] = 0
    with method.at(model, point):
        ours, theirs = both(model, "walk")
    ours.prefill(ids[:, :6], mask), theirs.prefill(ids[:, :6], mask)
    addresses = [t.data_ptr() for t in ours.buffers()]
    with torch.inference_mode():
        static = StaticStep(ours, fused(lambda function: function))
        for t in range(6, 18):
            runs = ours.kept if ours.cycle.turn() else ours.every
            static.token.copy_(ids[:, t : t + 1])
            found = static.logits(ours, runs)
            static.advance(ours, runs)
            expected = theirs.step(ids[:, t : t + 1])
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert addresses == [t.data_ptr() for t in ours.buffers()]
    assert static.places.tolist() == [18, 10]


@torch.no_grad()
def test_what_our_engine_leaves_to_whole_modules() -> None:
    filling = LoRADrop(layers=(2, 3), window=2, kv="fill")
    assert isinstance(filling.session(prepared(filling)), TemporalSession)
    method = LoRADrop(layers=(2, 3), window=2)
    assert isinstance(method.session(in_float64(prepared(method))), TemporalSession)
    model = prepared(filling)
    with pytest.raises(ValueError, match="enter the cache"):
        StaticTemporalSession(model, model.lora_drop)
    adding = LoRADrop(layers=(2, 3), window=2, anchor="residual")
    model = prepared(adding)
    assert isinstance(adding.session(model), TemporalSession)
    with pytest.raises(ValueError, match="what a layer added"):
        StaticTemporalSession(model, model.lora_drop)


@torch.no_grad()
def test_a_session_leaves_the_model_as_it_was(way: str) -> None:
    model, ids = prepared(LoRADrop(rank=4, layers=(2, 3, 5), window=2)), tokens(2, 12)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    decoded(both(model, way)[0], ids, 5)
    assert all(p.equal(before[n]) for n, p in model.state_dict().items())
    assert not any(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(IndexError):
        both(model, way)[0].prefill(torch.tensor([[SHAPE.vocab_size]]))
    assert not any(len(m._forward_hooks) for m in model.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_captured_steps_give_what_whole_modules_give(name: str, rows: int, device: str) -> None:
    method, model, point = policy(name, layers=(2, 3, 5), window=2)
    model, ids = model.to(device), tokens(rows, 30).to(device)
    with method.at(model, point):
        ours = StaticTemporalSession(model, model.lora_drop)
        theirs = TemporalSession(model, model.lora_drop)
    ours.reserve(rows, 30, prompt=6)
    assert (ours.engine == "graph") == (device == "cuda")
    seen = [decoded(s, ids, 6) for s in (ours, theirs)]
    torch.testing.assert_close(*seen, atol=1e-3, rtol=1e-3)
