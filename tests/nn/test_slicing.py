"""Blocks, the search for those that stay, the slicer, and folders of sliced models."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, flops, generator, logits, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from effbench.api.cost import cost_of
from effbench.api.parts import LayerSize
from effbench.api.shape import ModelShape, Shape
from effbench.api.slices import planned_slice, sliced_shape
from effbench.api.spec import ModelSpec
from effbench.models.load import load, shape_in
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.llama.attention import NoAttention, NoMLP
from effbench.nn.pruning.blocks import KINDS, Layout, search, search_uniform, step_masks
from effbench.nn.pruning.checkpoint import read_folder, write_folder
from effbench.nn.pruning.masks import Masks
from effbench.nn.pruning.schedule import kept_ratio
from effbench.nn.pruning.slicing import (
    Kept,
    KeptLayer,
    kept_blocks,
    layout_of,
    resize,
    shape_left,
    slice_model,
)
from effbench.nn.quant.linears import PackedLinear, dense_linears, storage_bytes
from effbench.resources.counting import parameters
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

SLOW = ("rtn", "qlora", "lora_drop", "full", "apt")
TIED = replace(SHAPE, tied=True, num_layers=4, rms_eps=1e-6)
LAYOUT = Layout(
    (LayerSize(4, 2, 30), LayerSize(4, 2, 17), LayerSize(6, 3, 8)), head_dim=8, hidden_size=24
)


def model_of(shape: Shape = TIED) -> Any:
    return tiny_model(shape=shape).double().eval()


def some_blocks(layout: Layout, seed: int = 0, share: float = 0.6) -> torch.Tensor:
    """Return random blocks, odd counts among them, a layer without heads and one without MLP."""
    kept = torch.rand(layout.size, generator=generator(seed)) < share
    views = list(layout.views(kept))
    views[0].groups.fill_(False)
    views[2].neurons.fill_(False)
    views[1].groups[0] = True
    views[1].neurons[:] = False
    views[1].neurons[:7] = True
    return kept


def total(layout: Layout) -> float:
    return layout.weights(torch.ones(layout.size))


# -- the search --------------------------------------------------------------------------------


def count_by_hand(layout: Layout, kept: torch.Tensor) -> int:
    dims = int(layout.dims(kept).sum())
    found = 0
    for size, view in zip(layout.layers, layout.views(kept), strict=True):
        queries = size.num_heads // size.num_kv_heads
        for _ in range(int(view.groups.sum())):
            found += 2 * queries * layout.head_dim * dims + 2 * layout.head_dim * dims
        found += int(view.neurons.sum()) * 3 * dims
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.02, 1.0), st.sampled_from([1, 4, 8]))
def test_the_budget_is_met_and_one_more_breaks_it(seed: int, share: float, align: int) -> None:
    salience = torch.rand(LAYOUT.size, generator=generator(seed)) ** 3
    budget = share * total(LAYOUT)
    found = search(LAYOUT, salience, budget, align=align)
    assert count_by_hand(LAYOUT, found.kept) <= budget
    assert LAYOUT.dims(found.kept).any()
    if found.count < len(found.order):
        more = found.kept | (found.portion == found.order[found.count])
        assert count_by_hand(LAYOUT, more) > budget
    assert int(found.kept.sum()) == sum(
        int((found.portion == p).sum()) for p in found.order[: found.count]
    )


def test_the_whole_budget_removes_nothing() -> None:
    salience = torch.rand(LAYOUT.size, generator=generator())
    for find in (search, search_uniform):
        assert find(LAYOUT, salience, total(LAYOUT)).kept.all()


def test_denser_blocks_stay() -> None:
    salience = torch.rand(LAYOUT.size, generator=generator())
    found = search(LAYOUT, salience, 0.5 * total(LAYOUT))
    widths = LAYOUT.widths()
    density = salience[: LAYOUT.units].double() / widths
    kept = found.kept[: LAYOUT.units]
    assert density[kept].min() >= density[~kept].max()


def test_densities_follow_the_counts_of_the_round_before() -> None:
    """Three times, from all blocks on: weights of a unit by dimensions kept, and the other way."""
    salience = torch.rand(LAYOUT.size, generator=generator(1)) ** 3
    salience[: LAYOUT.units] *= 20
    width = torch.cat([LAYOUT.widths(), torch.zeros(LAYOUT.hidden_size).double()])
    dim, budget = (width == 0).double(), 0.3 * total(LAYOUT)
    kept = torch.ones(LAYOUT.size).double()
    for _ in range(3):
        density = salience.double() / (width * (dim @ kept) + dim * (width @ kept))
        density[(density * dim).argmax()] = torch.inf
        order = sorted(range(LAYOUT.size), key=lambda i: -float(density[i]))
        fits = [
            n for n in range(1, len(order)) if count_by_hand(LAYOUT, _first(order, n)) <= budget
        ]
        kept = _first(order, max(fits)).double()
    assert search(LAYOUT, salience, budget).kept.equal(kept.bool())
    for fewer in (1, 2):
        assert not search(LAYOUT, salience, budget, rounds=fewer).kept.equal(kept.bool())


def _first(order: list[int], count: int) -> torch.Tensor:
    kept = torch.zeros(LAYOUT.size).bool()
    kept[order[:count]] = True
    return kept


def test_a_constant_factor_changes_nothing() -> None:
    salience = torch.rand(LAYOUT.size, generator=generator(2))
    one = search(LAYOUT, salience, 0.4 * total(LAYOUT)).kept
    assert one.equal(search(LAYOUT, 1024 * salience, 0.4 * total(LAYOUT)).kept)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_that_may_not_go_stay(kind: str) -> None:
    salience = torch.rand(LAYOUT.size, generator=generator(1))
    for find in (search, search_uniform):
        found = find(LAYOUT, salience, 0.75 * total(LAYOUT), prunable=[kind])
        for other, place in LAYOUT.segments():
            assert other == kind or found.kept[place].all()
        assert not found.kept.all()


def test_aligned_counts() -> None:
    layout = Layout((LayerSize(4, 2, 48),) * 3, head_dim=8, hidden_size=32)
    salience = torch.rand(layout.size, generator=generator(1))
    for find in (search, search_uniform):
        kept = find(layout, salience, 0.5 * total(layout), align=8).kept
        counts = [int(v.neurons.sum()) for v in layout.views(kept)] + [int(layout.dims(kept).sum())]
        assert all(count % 8 == 0 for count in counts)
        assert 0 < sum(counts) < 3 * 48 + 32


def test_uniform_layers_lose_alike() -> None:
    layout = Layout((LayerSize(4, 2, 40),) * 3, head_dim=8, hidden_size=32)
    salience = torch.rand(layout.size, generator=generator(1))
    salience[: layout.units // 3] *= 1e-3
    kept = search_uniform(layout, salience, 0.6 * total(layout), prunable=["neurons"]).kept
    counts = [v.neurons for v in layout.views(kept)]
    assert len({int(c.sum()) for c in counts}) == 1
    first = next(layout.views(salience)).neurons
    assert first[counts[0]].min() > first[~counts[0]].max()
    assert count_by_hand(layout, kept) <= 0.6 * total(layout)


def test_the_schedule() -> None:
    values = [kept_ratio(t / 20, 0.3) for t in range(-2, 23)]
    assert values[0] == values[2] == 1
    assert values[22] == values[-1] == pytest.approx(0.3)
    assert all(a >= b for a, b in pairwise(values))
    assert kept_ratio(0.5, 0.3) == pytest.approx(0.3 + 0.7 / 8)


def test_masks_move_slowly_and_end_hard() -> None:
    wanted = torch.tensor([True, False, True, False])
    masks = torch.tensor([1.0, 1.0, 0.3, 0.004])
    for step in range(101):
        before = masks.clone()
        step_masks(masks, wanted, 0.01)
        assert (masks - before).abs().max() <= 0.01 + 1e-7, step
        assert masks.min() >= 0
        assert masks.max() <= 1
    assert masks.tolist() == [1, 0, 1, 0]


# -- the slice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_hard_masks_compute_what_the_slice_does(tied: bool, seed: int) -> None:
    model = model_of(replace(TIED, tied=tied))
    layout = layout_of(model)
    kept = some_blocks(layout, seed)
    masked = copy.deepcopy(model)
    masks = Masks(masked)
    expected = logits(model)
    assert logits(masked).equal(expected)
    masks.wanted.copy_(kept)
    masks.move(1)
    changed = logits(masked)
    assert not torch.allclose(changed, expected, atol=1e-2)
    slice_model(model, kept_blocks(layout, kept))
    torch.testing.assert_close(logits(model), changed, atol=1e-6, rtol=1e-6)
    masks.remove(masked)
    assert logits(masked).equal(expected)
    assert masked.state_dict().keys() == model_of(replace(TIED, tied=tied)).state_dict().keys()


def test_the_norm_divides_by_what_is_left() -> None:
    """Without the rule for norms, masks would scale every layer by sqrt(d / d')."""
    model = model_of()
    masks = Masks(model)
    layout = masks.layout
    layout.dims(masks.values)[::2] = 0
    x = torch.randn(1, 3, 64, generator=generator()).double()
    x[..., ::2] = 0
    out = model.model.norm(x)
    kept = x[..., 1::2].float()
    expected = kept * torch.rsqrt(kept.square().mean(-1, keepdim=True) + TIED.rms_eps)
    torch.testing.assert_close(out[..., 1::2].float(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_exact(tied: bool) -> None:
    shape = replace(TIED, tied=tied)
    model = tiny_model(shape=shape)
    layout = layout_of(model)
    kept = some_blocks(layout)
    slice_model(model, kept_blocks(layout, kept))
    left = shape_left(model, shape)
    dims = int(layout.dims(kept).sum())
    norms, tables = (2 * shape.num_layers + 1) * dims, shape.vocab_size * dims * (1 if tied else 2)
    assert left.linear_params == count_by_hand(layout, kept)
    assert parameters(model).total == left.params == left.linear_params + norms + tables
    cost = cost_of(left, "float32")
    assert storage_bytes(model) == cost.resident_bytes
    assert flops(model) == cost.flops_per_token
    assert not left.uniform


def test_empty_layers_keep_the_cache_in_step() -> None:
    """The first layer has no heads: positions must still be counted."""
    model = model_of()
    layout = layout_of(model)
    kept = some_blocks(layout)
    slice_model(model, kept_blocks(layout, kept))
    assert isinstance(model.model.layers[0].self_attn, NoAttention)
    assert isinstance(model.model.layers[2].mlp, NoMLP)
    ids = batch_of().input_ids
    whole = logits(model, replace(batch_of(), attention_mask=torch.ones_like(ids)))
    session = CachedSession(model)
    steps = [session.prefill(ids[:, :5])]
    steps += [session.step(ids[:, t : t + 1]) for t in range(5, ids.shape[1])]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 4:], atol=1e-8, rtol=1e-8)
    left = shape_left(model, TIED)
    assert session.kv_bytes() == left.kv_bytes_per_token(8) * ids.numel()
    assert left.layer(0).num_kv_heads == 0


def test_padded_prompts_and_beams() -> None:
    model = model_of()
    layout = layout_of(model)
    slice_model(model, kept_blocks(layout, some_blocks(layout)))
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    session = CachedSession(model)
    both = session.prefill(ids, mask)
    alone = CachedSession(model)
    torch.testing.assert_close(both[:1], alone.prefill(ids[:1, 2:]), atol=1e-8, rtol=1e-8)
    session.reorder(torch.tensor([1, 0]))
    token = torch.tensor([[9]])
    torch.testing.assert_close(
        session.step(token.expand(2, 1))[1:], alone.step(token), atol=1e-8, rtol=1e-8
    )


def test_a_model_without_any_attention_decodes() -> None:
    model = model_of()
    layout = layout_of(model)
    kept = torch.ones(layout.size).bool()
    for view in layout.views(kept):
        view.groups.fill_(False)
    slice_model(model, kept_blocks(layout, kept))
    assert greedy(CachedSession(model), torch.arange(4)[None], 5).shape == (1, 5)
    assert shape_left(model, TIED).kv_bytes_per_token(4) == 0


def test_single_query_heads_where_groups_keep_the_same_number() -> None:
    model = model_of()
    whole, dims = torch.arange, torch.arange(64)
    part = KeptLayer(torch.tensor([1, 2]), whole(2), whole(128))
    rest = KeptLayer(whole(4), whole(2), whole(128))
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for head in (0, 3):
            zeroed.model.layers[1].self_attn.o_proj.weight[:, head * 16 : head * 16 + 16] = 0
    slice_model(model, Kept(dims, (rest, part, rest, rest)))
    torch.testing.assert_close(logits(model), logits(zeroed), atol=1e-8, rtol=1e-8)
    assert shape_left(model, TIED).layer(1) == LayerSize(2, 2, 128)


@pytest.mark.parametrize(("queries", "groups"), [([0, 1, 2], [0, 1]), ([0, 2], [0]), ([0], [0, 1])])
def test_uneven_groups_are_refused(queries: list[int], groups: list[int]) -> None:
    model = model_of()
    part = KeptLayer(torch.tensor(queries), torch.tensor(groups), torch.arange(128))
    with pytest.raises(ValueError, match="layer 0"):
        slice_model(model, Kept(torch.arange(64), (part,) * 4))


@pytest.mark.parametrize(("part", "last"), [("self_attn", "o_proj"), ("mlp", "down_proj")])
def test_a_part_whose_output_has_a_bias_is_not_left_out(part: str, last: str) -> None:
    model = model_of()
    linear = getattr(getattr(model.model.layers[1], part), last)
    linear.bias = torch.nn.Parameter(torch.ones(linear.out_features, dtype=linear.weight.dtype))
    layout = layout_of(model)
    kept = torch.ones(layout.size, dtype=torch.bool)
    views = list(layout.views(kept))[1]
    (views.groups if part == "self_attn" else views.neurons)[:] = False
    with pytest.raises(UserError, match="whose output has a bias cannot be left out"):
        slice_model(model, kept_blocks(layout, kept))


def test_packed_linears_are_refused() -> None:
    model = tiny_model(shape=TIED)
    for _, linear in dense_linears(model, ["v_proj"]):
        model.model.layers[0].self_attn.v_proj = PackedLinear.quantise(linear, 4, 16)
        break
    kept = kept_blocks(layout_of(model), torch.ones(layout_of(model).size).bool())
    with pytest.raises(UserError, match="PackedLinear"):
        slice_model(model, kept)


def test_kept_to_plain_values_and_back() -> None:
    layout = layout_of(model_of())
    kept = kept_blocks(layout, some_blocks(layout))
    again = Kept.from_plain(json.loads(json.dumps(kept.plain())))
    assert again.dims.equal(kept.dims)
    for a, b in zip(again.layers, kept.layers, strict=True):
        assert all(x.equal(y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def test_slicing_twice() -> None:
    model = model_of()
    layout = layout_of(model)
    once = copy.deepcopy(model)
    first, second = some_blocks(layout, 0), some_blocks(layout, 1) & some_blocks(layout, 0)
    slice_model(once, kept_blocks(layout, second))
    slice_model(model, kept_blocks(layout, first))
    slice_model(model, kept_blocks(layout_of(model), second[first]))
    assert logits(model).equal(logits(once))


# -- folders -----------------------------------------------------------------------------------

FRESH = """
import sys, torch
from itertools import pairwise
from pathlib import Path
from effbench.models.load import (load)
from effbench.api.spec import (ModelSpec)
found = []
for path in sys.argv[2:]:
    spec = ModelSpec(name="folder", source="folder", path=path)
    loaded = load(spec, device="cpu", dtype=torch.float32, tokenizer=False)
    with torch.no_grad():
        found.append((loaded.model(torch.arange(12)[None]).logits, loaded.shape.params))
torch.save(found, sys.argv[1])
"""


def test_a_folder_gives_the_same_logits_in_a_fresh_process(tmp_path: Path) -> None:
    folders, expected = [tmp_path / "tied", tmp_path / "untied"], []
    for folder in folders:
        model = tiny_model(shape=replace(TIED, tied=folder.name == "tied")).eval()
        layout = layout_of(model)
        slice_model(model, kept_blocks(layout, some_blocks(layout)))
        folder.mkdir()
        write_folder(model, folder)
        with torch.no_grad():
            right = model(torch.arange(12)[None]).logits
        expected.append((right, parameters(model).total))
        with pytest.raises(ValueError, match="sliced_llama"):
            AutoModelForCausalLM.from_pretrained(folder)
    command = [sys.executable, "-c", FRESH, str(tmp_path / "out"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (out, params), (right, total) in zip(torch.load(tmp_path / "out"), expected, strict=True):
        assert out.equal(right)
        assert params == total


def test_alike_layers_load_in_transformers(tmp_path: Path) -> None:
    model = tiny_model(shape=TIED).eval()
    sizes = [LayerSize(2, 1, 50)] * 4
    resize(model, 40, sizes)
    write_folder(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert logits(again).equal(logits(model))
    loaded = load(
        ModelSpec(name="folder", source="folder", path=str(tmp_path)),
        device="cpu",
        dtype=torch.float32,
        tokenizer=False,
    )
    assert ModelShape.of(loaded.shape) == shape_left(model, TIED) == sliced_shape(TIED, 40, sizes)
    assert loaded.shape.uniform


def test_a_width_that_transformers_refuses_is_ours_to_load(tmp_path: Path) -> None:
    model = tiny_model(shape=TIED).eval()
    resize(model, 41, [LayerSize(4, 2, 50)] * 4)
    write_folder(model, tmp_path)
    again = read_folder(tmp_path, "cpu", torch.float32)
    assert logits(again).equal(logits(model))


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    model = tiny_model(shape=TIED).eval()
    layout = layout_of(model)
    slice_model(model, kept_blocks(layout, some_blocks(layout)))
    write_folder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_sizes"][1][2] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit its config"):
        read_folder(tmp_path, "cpu", torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="missing"):
        read_folder(tmp_path, "cpu", torch.float32)


def test_shapes_of_sliced_models() -> None:
    sizes = [LayerSize(4, 2, 10), LayerSize(0, 0, 7)]
    shape = sliced_shape(SHAPE, 30, sizes)
    config = {
        "hidden_size": 30,
        "intermediate_size": 10,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "rms_norm_eps": 1e-5,
        "layer_sizes": [[4, 2, 10], [0, 0, 7]],
    }
    assert shape_in(config, "here") == shape
    names = [name for layer, name, _, _ in shape.linears() if layer == 1]
    assert names == ["gate_proj", "up_proj", "down_proj"]
    assert shape.flops_per_token(5) - shape.flops_per_token() == 4 * 4 * 16 * 5


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.3, 0.05])
def test_a_planned_slice_fits_the_budget(keep: float) -> None:
    planned = planned_slice(SHAPE, keep)
    assert planned.linear_params <= keep * SHAPE.linear_params
    assert planned.linear_params > keep * SHAPE.linear_params - 2 * SHAPE.hidden_size * 96
    assert (planned == ModelShape.of(SHAPE)) == (keep == 1)


# -- other methods go on from it ---------------------------------------------------------------

SMALL = ["train.max_steps=2", "hardware.dtype=float32", "hardware.device=cpu"]
PRUNED = [
    "method=structured",
    "method.keep=0.6",
    "method.scope=global",
    "method.blocks=[groups,neurons,dims]",
    "evaluator=[perplexity]",
]
SPEED = [
    "evaluator=[perplexity,speed]",
    "evaluator.speed.new_tokens=4",
    "evaluator.speed.repeats=1",
]


@pytest.mark.parametrize(
    "after",
    ["lora", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)],
)
def test_what_comes_after_a_slice(after: str, bench: Bench) -> None:
    first = bench.run("compress", *PRUNED, *SMALL)
    stage: Any = "compress" if after == "rtn" else "train"
    rank = ["method.rank=4"] if after in ("lora", "qlora", "apt") else []
    second = bench.run(stage, f"from={first.key}", f"method={after}", *rank, *SMALL, *SPEED)
    found = {m.name: m.value for m in second.metrics if m.phase in ("", "decode")}
    assert found["decode_tokens_per_second"] > 0
    if after != "apt":  # what it leaves is planned before it is known
        assert found["weight_bytes"] == second.plan["cost"]["resident_bytes"]
        assert found["params"] == second.plan["cost"]["params"]
    pruned = {m.name: m.value for m in first.metrics if m.phase == ""}
    assert pruned["weight_bytes"] == pruned["resident_bytes"]
    again = bench.run("eval", f"from={second.key}", *SMALL, "evaluator=[perplexity]")
    assert {m.value for m in again.metrics if m.name == "loss"} == {
        m.value for m in second.metrics if m.name == "loss"
    }
