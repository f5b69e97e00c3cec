"""Packed weights in one piece of memory: where they lie, and that they stay what they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import SHAPE, generator, some_ids, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from effbench.api.weights import find
from effbench.nn.decode import native
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.weights import load_tensors, save_tensors
from effbench.nn.quant import linears
from effbench.nn.quant.linears import (
    NF4Linear,
    PackedLinear,
    QuantisedLinear,
    lay_together,
    pack_linears,
    storage_bytes,
)
from effbench.nn.quant.nested_linear import NestedLinear
from effbench.util import pages


def some_layers() -> list[QuantisedLinear]:
    """Layers of several formats, no size of whose buffers is a multiple of a line of the cache."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = [torch.nn.Linear(96, rows) for rows in (5, 7, 3)]
    nested = NestedLinear.empty(dense[2], 2, 4)
    nested.planes.random_(generator=generator())
    return [NF4Linear.quantise(dense[0]), PackedLinear.quantise(dense[1], 3, 32), nested]


def buffers_of(layers: list[QuantisedLinear]) -> list[torch.Tensor]:
    return [buffer for layer in layers for buffer in layer.buffers()]


def packed_model() -> Any:
    model = tiny_model().eval().requires_grad_(False)
    pack_linears(model, find("nf4")(), torch.float32)
    return model


def layers_of(model: torch.nn.Module) -> list[QuantisedLinear]:
    return [m for m in model.modules() if isinstance(m, QuantisedLinear)]


def test_buffers_lie_one_after_the_other_and_are_what_they_were() -> None:
    layers = some_layers()
    before = [b.clone() for b in buffers_of(layers)]
    size = sum(map(storage_bytes, layers))
    dense = [layer.dense_weight(torch.float32) for layer in layers]
    lay_together(layers)
    after = buffers_of(layers)
    for new, old in zip(after, before, strict=True):
        assert new.equal(old) and new.dtype == old.dtype and new.shape == old.shape
        assert new.is_contiguous() and not new.is_inference()
    for layer, weight in zip(layers, dense, strict=True):
        assert layer.dense_weight(torch.float32).equal(weight)
    assert len({b.untyped_storage().data_ptr() for b in after}) == 1
    places = [b.data_ptr() for b in after]
    assert places[0] % pages.HUGE == 0
    for new, place, following in zip(after, places, places[1:], strict=False):
        assert following == place + -(new.nbytes // -64) * 64
    assert sum(map(storage_bytes, layers)) == size
    assert after[-1].data_ptr() + after[-1].nbytes <= (
        after[0].untyped_storage().data_ptr() + after[0].untyped_storage().nbytes()
    )


def test_the_order_is_that_in_which_layers_are_given() -> None:
    one, two, three = some_layers()
    lay_together([three, one, two])
    firsts = [layer.weight.data_ptr() for layer in (three, one, two)]
    assert firsts == sorted(firsts)


def test_twice_is_once_and_a_layer_that_is_given_twice_moves_once() -> None:
    layers = some_layers()
    lay_together([*layers, *layers])
    places = [b.data_ptr() for b in buffers_of(layers)]
    held = buffers_of(layers)[0].untyped_storage().nbytes()
    assert held < sum(b.nbytes + 64 for b in buffers_of(layers)) + pages.HUGE
    changes = QuantisedLinear.changes
    lay_together(layers)
    assert [b.data_ptr() for b in buffers_of(layers)] == places
    assert QuantisedLinear.changes == changes


def test_more_than_may_be_moved_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = some_layers()
    before = buffers_of(layers)
    total = sum(-(b.nbytes // -64) * 64 for b in before)
    monkeypatch.setattr(pages, "MOST", total - 1)
    lay_together(layers)
    assert all(a is b for a, b in zip(buffers_of(layers), before, strict=True))
    monkeypatch.setattr(pages, "MOST", total)
    lay_together(layers)
    assert not any(a is b for a, b in zip(buffers_of(layers), before, strict=True))


def test_what_is_not_in_this_memory_is_left_alone() -> None:
    layers = [*some_layers()[:2], some_layers()[2].to("meta")]
    before = buffers_of(layers)
    lay_together(layers)
    assert all(a is b for a, b in zip(buffers_of(layers), before, strict=True))


@pytest.mark.parametrize("by", ["itself", "session"])
def test_no_weight_is_twice_in_memory_for_longer_than_its_move(
    by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each old buffer is gone when the next one moves; what is freed goes back now and then."""
    if by == "session" and native.kernels() is None:
        pytest.skip(native.why_not())
    model = packed_model()
    layers = layers_of(model)
    session = StaticSession(model) if by == "session" else None
    old = [StorageWeakRef(b.untyped_storage()) for b in buffers_of(layers)]
    alive = list[int]()

    def counted() -> None:
        alive.append(sum(not ref.expired() for ref in old))

    monkeypatch.setattr(linears, "give_back", counted)
    monkeypatch.setattr(linears, "TWICE", 0)
    if session is None:
        lay_together(layers)
    else:
        session.reserve(1, 8)
    assert alive == [*range(len(old) - 1, -1, -1), 0]
    monkeypatch.setattr(linears, "TWICE", 2**30)
    alive.clear()
    lay_together(layers_of(packed_model()))
    assert len(alive) == 1, "little is not given back one by one"


@pytest.fixture
def laid() -> Any:
    """A model whose weights a session has laid together, as it does under inference mode."""
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model = packed_model()
    StaticSession(model).reserve(1, 8)
    assert len({b.untyped_storage().data_ptr() for b in buffers_of(layers_of(model))}) == 1
    return model


def test_it_is_saved_and_loaded_in_place_as_ever(laid: Any, tmp_path: Path) -> None:
    path, stored = tmp_path / "weights.safetensors", laid.state_dict()
    before = {name: tensor.clone() for name, tensor in stored.items()}
    save_tensors(stored, path)
    assert path.stat().st_size < sum(t.nbytes for t in stored.values()) + 16384
    places = [b.data_ptr() for b in laid.buffers()]
    with torch.no_grad():
        for tensor in laid.state_dict().values():
            tensor.zero_()
    load_tensors(laid.state_dict(), path)
    assert all(t.equal(before[name]) for name, t in laid.state_dict().items())
    assert [b.data_ptr() for b in laid.buffers()] == places


def test_a_copy_is_its_own(laid: Any) -> None:
    copied = copy.deepcopy(laid)
    ids = some_ids(1, 9)
    expected = laid(ids).logits
    assert copied(ids).logits.equal(expected)
    for buffer in buffers_of(layers_of(copied)):
        buffer.zero_()
    assert laid(ids).logits.equal(expected)


def test_other_dtypes_change_no_code(laid: Any) -> None:
    before = [b.clone() for b in buffers_of(layers_of(laid))]
    for change in (lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()):
        change(laid)
        for new, old in zip(buffers_of(layers_of(laid)), before, strict=True):
            assert new.dtype == old.dtype and new.equal(old)
    assert laid.lm_head.weight.dtype == torch.float32


def test_adapters_on_top_of_it_learn(laid: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    adapted, ids = peft.get_peft_model(laid, config), some_ids(2, 9)
    adapted.train()
    adapted(ids, labels=ids).loss.backward()
    grads = [p.grad for n, p in adapted.named_parameters() if "lora_B" in n]
    assert len(grads) == 2 * SHAPE.num_layers
    assert all(grad is not None and grad.any() for grad in grads)
