"""Any-Precision: sensitivities, widths, bytes and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, HeldBytes, batch_of, context, some_ids, tiny_model

from effbench.api.batch import make_batch
from effbench.api.cost import cost_of
from effbench.api.footprint import Pass, training_of
from effbench.api.points import UNNAMED, find_point
from effbench.api.shape import ModelShape
from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.any_precision import AnyPrecision, Mixed, Width
from effbench.nn.quant import mixed, nested, planes
from effbench.nn.quant.formats.any_precision import AnyPrecisionCodes
from effbench.nn.quant.linears import dense_linears, expanded_once, storage_bytes
from effbench.nn.quant.nested_linear import NestedLinear
from effbench.nn.quant.sensitivity import squared_gradients
from effbench.resources import predict
from effbench.resources.peaks import Peaks
from effbench.testing.bench import Bench, without_evaluation
from effbench.testing.models import tiny_shape
from effbench.util.errors import UserError
from effbench.util.tensor_files import stored_bytes

IDS = torch.arange(3, 23).view(2, 10)
WIDTHS = range(3, 9)


def compressed(method: AnyPrecision, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(dtype=dtype).requires_grad_(False).eval()
    compress_whole(method, model, [batch_of()], context())
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return compressed(AnyPrecision())


def logits(model: Any, bits: int) -> torch.Tensor:
    with AnyPrecision().at(model, Width(bits)), torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def layer_of(d_in: int = 100, seed: int = 0) -> NestedLinear:
    torch.manual_seed(seed)
    return NestedLinear.quantise(torch.nn.Linear(d_in, 6, bias=False), 3, 8)


# -- sensitivity -----------------------------------------------------------------------------------


def test_the_plan_counts_the_sensitivities() -> None:
    found = squared_gradients(tiny_model().eval(), [batch_of()])
    held = sum(f.numel() * f.element_size() for f in found.values())
    assert AnyPrecision().held(SHAPE, 0, 4) == held


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_counts_the_backward_pass(dtype: str) -> None:
    model = tiny_model(dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    row = some_ids(1, 200)[0].tolist()
    with HeldBytes() as held:
        squared_gradients(model, [make_batch([(row, row)], 0)])
    element = getattr(torch, dtype).itemsize
    saved = training_of(predict._graded(SHAPE), dtype)
    sums = AnyPrecision().held(SHAPE, 200, element)
    peaks = Peaks(SHAPE, element, cpu=False)
    planned = peaks.compress(0, Pass("score", 1, 200, 1), 0, sums, saved)
    assert held.peak <= sum(planned.values()) < 1.1 * held.peak


def test_sensitivities_are_the_squares_of_each_sequence_s_own_gradient() -> None:
    model, batch = tiny_model().eval(), batch_of(rows=2)
    weights = {n: x.weight for n, x in dense_linears(model)}
    expected = {n: torch.zeros_like(w) for n, w in weights.items()}
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        real = ids[mask.bool()][None]
        loss = model(real, labels=real).loss
        for name, grad in zip(
            weights, torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            expected[name] += grad**2
    found = squared_gradients(model, [batch])
    assert found.keys() == weights.keys()
    for name, total in found.items():
        torch.testing.assert_close(total, expected[name], rtol=1e-4, atol=1e-10)


def test_no_gradient_stays_and_padding_is_nothing() -> None:
    model, row = tiny_model().requires_grad_(False).eval(), [5, 9, 4, 7]
    alone = squared_gradients(model, [make_batch([(row, row)], 0)])
    padded = squared_gradients(model, [make_batch([(row, row), ([1] * 9, [1] * 9)], 0)])
    ones = squared_gradients(model, [make_batch([([1] * 9, [1] * 9)], 0)])
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    for name, total in padded.items():
        torch.testing.assert_close(total, alone[name] + ones[name])


def test_rows_without_a_prediction_are_refused() -> None:
    model = tiny_model().eval()
    for batches in ([], [make_batch([([5], [5])], 0)]):
        with pytest.raises(UserError, match="no calibration row"):
            squared_gradients(model, batches)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 1e5])
def test_a_weight_that_no_table_can_hold_is_refused_before_anything_is_done(bad: float) -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = bad
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj .*float16"):
        next(AnyPrecision().compress(model, [batch_of()], context()))


# -- widths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_in", [32, 100, 576, 1120])
def test_a_width_is_the_leading_bits_and_their_table(d_in: int) -> None:
    layer = layer_of(d_in)
    codes = planes.unpack(layer.planes, d_in).long()
    for bits in WIDTHS:
        layer.use(bits)
        table = layer.get_buffer(f"table_{bits}").float()
        assert layer.dense_weight(torch.float32).equal(table.gather(1, codes >> (8 - bits)))


def test_planes_below_the_width_are_not_read() -> None:
    layer, spoilt = layer_of(), layer_of()
    for bits in range(3, 8):
        for each in (layer, spoilt):
            each.use(bits)
        spoilt.planes[bits:] = 170
        assert spoilt.dense_weight(torch.float32).equal(layer.dense_weight(torch.float32))
        spoilt.planes.copy_(layer.planes)


def test_points_leave_no_trace_and_can_be_nested(model: Any) -> None:
    method = AnyPrecision()
    first = {b: logits(model, b) for b in WIDTHS}
    assert len({x.numpy().tobytes() for x in first.values()}) == len(WIDTHS)
    with method.at(model, Width(3)):
        assert logits(model, 5).equal(first[5])
        with torch.no_grad():
            assert model(IDS).logits.equal(first[3])
    with torch.no_grad():
        assert model(IDS).logits.equal(first[8])
    with pytest.raises(RuntimeError, match="broken"), method.at(model, Width(4)):
        raise RuntimeError("broken")
    assert {m.bits for m in model.modules() if isinstance(m, NestedLinear)} == {8}


def test_an_expanded_weight_is_not_kept_for_another_width(model: Any) -> None:
    expected = {b: logits(model, b) for b in (3, 8)}
    with expanded_once(model):
        for bits in (8, 3, 3, 8):
            assert logits(model, bits).equal(expected[bits])


def test_a_width_that_was_not_built_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match="no point 'b2'"):
        find_point(AnyPrecision().points(), "b2", "any_precision")
    with pytest.raises(ValueError, match="no width 2"), AnyPrecision().at(model, Width(2)):
        pass
    assert {m.bits for m in model.modules() if isinstance(m, NestedLinear)} == {8}
    with pytest.raises(UserError, match="eval_bits"):
        AnyPrecision(eval_bits=(2,))
    with pytest.raises(UserError, match="seed_bits"):
        AnyPrecision(seed_bits=5, bits=4)


def test_widths_are_those_asked_for() -> None:
    assert [p.name for p in AnyPrecision().points()] == ["b3", "b4", "b5", "b6", "b7", "b8"]
    assert AnyPrecision(eval_bits=(3, 8)).points() == (Width(3), Width(8))
    assert [p.name for p in AnyPrecision(bits=4, seed_bits=4).points()] == ["b4"]


def test_eight_bits_are_close_to_the_model(model: Any) -> None:
    with torch.no_grad():
        base = tiny_model().eval()(IDS).logits.softmax(-1)
    apart = [float((logits(model, b).softmax(-1) - base).abs().sum(-1).mean()) for b in (3, 5, 8)]
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.02


# -- bytes and artefact ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_widths_are_resident_and_one_is_read(dtype: str) -> None:
    method = AnyPrecision(bits=6)
    held = storage_bytes(compressed(method, getattr(torch, dtype)))
    costs = [chain_cost([method], SHAPE, dtype, p) for p in (*method.points(), UNNAMED)]
    assert {c.resident_bytes for c in costs} == {held}
    read = [c.bytes_per_token for c in costs]
    assert read[:-1] == sorted(set(read[:-1]))
    assert read[-1] == read[-2]


def test_bytes_are_planes_and_tables() -> None:
    """The six tables of a row of 4096 weights are 1.97 bits a weight."""
    codes = AnyPrecisionCodes()
    assert codes.bytes(4096, 4096, 2) == 4096 * 4096 + 4096 * (8 + 16 + 32 + 64 + 128 + 256) * 2
    assert codes.at(3).read_bytes(4096, 4096, 2) == 3 * 4096 * 512 + 4096 * 8 * 2
    assert codes.at(3).bytes(4096, 4096, 2) == codes.bytes(4096, 4096, 2)


def test_the_artefact_gives_the_same_logits_at_every_width(model: Any, tmp_path: Path) -> None:
    method = AnyPrecision()
    method.save(model, tmp_path)
    loaded = method.load(tiny_model().eval(), tmp_path, context())
    assert all(logits(loaded, b).equal(logits(model, b)) for b in WIDTHS)


def test_planes_beyond_the_width_need_not_be_there() -> None:
    layer = layer_of()
    for bits in WIDTHS:
        layer.use(bits)
        whole = layer.dense_weight(torch.float32)
        layer.planes, every = layer.planes[:bits], layer.planes
        assert layer.dense_weight(torch.float32).equal(whole)
        layer.planes = every


# -- fewer planes in memory ------------------------------------------------------------------------


def test_planes_and_tables_above_the_loaded_width_stay_on_the_disk(
    model: Any, tmp_path: Path
) -> None:
    AnyPrecision().save(model, tmp_path)
    fewer = AnyPrecision(load_bits=4)
    loaded: Any = fewer.load(tiny_model().eval(), tmp_path, context())
    assert [point.name for point in fewer.points()] == ["b3", "b4"]
    for point in fewer.points():
        with fewer.at(loaded, point), torch.no_grad():
            assert loaded(IDS).logits.equal(logits(model, point.bits))  # type: ignore[attr-defined]
        cost = chain_cost([fewer], SHAPE, "float32", point)
        assert cost.resident_bytes == storage_bytes(loaded)
    with torch.no_grad():
        assert loaded(IDS).logits.equal(logits(model, 4)), "without a point it is the widest"
    with fewer.at(loaded, UNNAMED), torch.no_grad():
        assert loaded(IDS).logits.equal(logits(model, 4))
    assert storage_bytes(loaded) < storage_bytes(model)
    names = {name.rsplit(".", 1)[1] for name in fewer.artefact_tensors(loaded)}
    assert names == {"planes", "table_3", "table_4"}


def test_what_cannot_be_loaded_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="load_bits=2 is a width that is not built"):
        AnyPrecision(load_bits=2)
    with pytest.raises(UserError, match=r"holds 8, which .*load_bits=4 does not load"):
        AnyPrecision(load_bits=4, eval_bits=(3, 8))
    with pytest.raises(UserError, match="about an artefact") as error:
        compressed(AnyPrecision(load_bits=4))
    assert "effbench eval from=latest method.load_bits=4" in error.value.hint
    AnyPrecision(seed_bits=3, bits=3).save(compressed(AnyPrecision(seed_bits=3, bits=3)), tmp_path)
    with pytest.raises(UserError, match="does not hold these codes"):
        AnyPrecision(load_bits=4).load(tiny_model().eval(), tmp_path, context())


def test_calibration_rows_are_the_first_or_drawn_by_the_seed() -> None:
    first, drawn = AnyPrecision(), AnyPrecision(draw=True)
    assert first.calibration_rows(200, 1) == first.calibration_rows(200, 0) == list(range(64))
    rows = [drawn.calibration_rows(200, seed) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert all(len(set(some)) == 64 and max(some) < 200 and some == sorted(some) for some in rows)
    assert drawn.calibration_rows(9, 3) == list(range(9))


# -- widths for a budget ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def budgeted() -> tuple[AnyPrecision, Any]:
    sizes = mixed.sizes_of(SHAPE, AnyPrecisionCodes(5, 3)).values()
    method = AnyPrecision(bits=5, budget=sum(s[1] for s in sizes))  # what 4 bits take
    return method, compressed(method)


def at_point(method: AnyPrecision, model: Any, point: Any) -> torch.Tensor:
    with method.at(model, point), torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


def test_the_seed_that_is_asked_for_is_that_of_the_codes() -> None:
    linear, draws = torch.nn.Linear(32, 8), torch.Generator().manual_seed(2)
    linear.weight.data = torch.randn(8, 32, generator=draws)
    sensitive = torch.rand(8, 32, generator=draws) ** 4
    for seed in ("optimal", "released"):
        found = AnyPrecision(bits=4, seed=seed)._nested(linear, sensitive)
        expected = nested.quantise(linear.weight.detach(), sensitive, 3, 4, seed)
        assert found["planes"].equal(planes.pack(expected.codes, 4))
        assert found["table_3"].equal(expected.tables[3].half())
    assert not expected.tables[3].equal(nested.quantise(linear.weight, sensitive, 3, 4).tables[3])


def test_each_linear_is_read_at_the_width_that_loses_least_within_the_budget(
    budgeted: tuple[AnyPrecision, Any],
) -> None:
    """Losses from scratch, for rows of the first batch; any other widths that fit lose more."""
    method, model = budgeted
    dense = tiny_model().eval()
    f = squared_gradients(dense, [batch_of()])
    groups, losses = mixed.groups(model), vars(model)[mixed.WIDTHS].losses
    with method.at(model, Mixed()):
        own = {groups[n]: m.bits for n, m in model.named_modules() if isinstance(m, NestedLinear)}
    for bits in (3, 4, 5):
        with method.at(model, Width(bits)):
            for name, linear in dense_linears(dense):
                error = (
                    model.get_submodule(name).dense_weight(torch.float64) - linear.weight.detach()
                )
                lost = float((error.square() * f[name]).sum())
                assert losses[groups[name]][bits - 3] == pytest.approx(lost, rel=1e-5)
    sizes = mixed.sizes_of(SHAPE, method.format)
    taken = sum(sizes[g][b - 3] for g, b in own.items())
    lost = sum(losses[g][b - 3] for g, b in own.items())
    assert len(set(own.values())) > 1
    assert 0.95 * method.budget < taken <= method.budget
    assert lost < sum(x[1] for x in losses.values()), "no better than 4 bits everywhere"
    for raised in own:
        for lowered in own:
            other = own | {raised: own[raised] + 1, lowered: own[lowered] - 1}
            fits = sum(sizes[g][b - 3] for g, b in other.items() if 3 <= b <= 5)
            if raised != lowered and set(other.values()) <= {3, 4, 5} and fits <= method.budget:
                assert sum(losses[g][b - 3] for g, b in other.items()) >= lost


def test_the_mixed_point_leaves_no_trace_and_stands_beside_the_others(
    budgeted: tuple[AnyPrecision, Any],
) -> None:
    method, model = budgeted
    assert [p.name for p in method.points()] == ["b3", "b4", "b5", "mixed"]
    first = [at_point(method, model, p) for p in method.points()]
    with method.at(model, Mixed()):
        assert at_point(method, model, Width(3)).equal(first[0])
        with torch.no_grad():
            assert model(IDS).logits.equal(first[3])
    assert [
        at_point(method, model, p).equal(x) for p, x in zip(method.points(), first, strict=True)
    ]
    assert not any(first[3].equal(x) for x in first[:3])


def test_planned_bytes_are_those_that_are_saved_and_held(
    budgeted: tuple[AnyPrecision, Any], tmp_path: Path
) -> None:
    method, model = budgeted
    method.save(model, tmp_path)
    expected = at_point(method, model, Mixed())
    whole = method.load(tiny_model().eval(), tmp_path, context())
    assert at_point(method, whole, Mixed()).equal(expected)
    alone = AnyPrecision(bits=5, budget=method.budget, load_mixed=True)
    loaded: Any = alone.load(tiny_model().eval(), tmp_path, context())
    assert alone.points() == (Mixed(),)
    assert at_point(alone, loaded, Mixed()).equal(at_point(alone, loaded, UNNAMED))
    assert at_point(alone, loaded, Mixed()).equal(expected)
    base = ModelShape.of(SHAPE)
    left = alone.shape(base, Mixed(), "use", tmp_path)
    assert cost_of(left, "float32").resident_bytes == storage_bytes(loaded)
    again = tmp_path / "again"
    again.mkdir()
    alone.save(loaded, again)
    saved = sum(stored_bytes(again / "weights.safetensors").values())
    read = cost_of(method.shape(base, Mixed(), "use", tmp_path), "float32").bytes_per_token
    dense = cost_of(base, "float32")
    rest = dense.bytes_per_token - 4 * SHAPE.linear_params
    assert saved == read - rest <= method.budget
    guess = cost_of(method.shape(base, Mixed(), "use", None), "float32").bytes_per_token - rest
    assert 0.95 * method.budget < guess <= method.budget


def test_another_budget_is_chosen_when_the_artefact_is_read(
    budgeted: tuple[AnyPrecision, Any], tmp_path: Path
) -> None:
    method, model = budgeted
    method.save(model, tmp_path)
    less = replace(method, budget=method.budget * 9 // 10)
    loaded: Any = less.load(tiny_model().eval(), tmp_path, context())
    found, before = (vars(m)[mixed.WIDTHS] for m in (loaded, model))
    sizes = mixed.sizes_of(SHAPE, method.format)
    assert found.widths == mixed.allot(sizes, before.losses, 3, less.budget) != before.widths
    own = {
        mixed.groups(loaded)[n]: x.own_bits
        for n, x in loaded.named_modules()
        if hasattr(x, "own_bits")
    }
    assert own == found.widths
    low = replace(method, load_bits=4).load(tiny_model().eval(), tmp_path, context())
    assert set(vars(low)[mixed.WIDTHS].widths.values()) == {4}


def test_budgets_that_mean_nothing_are_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"budget=99 bytes are too few: 3 bits take") as error:
        AnyPrecision(budget=99).resolve(SHAPE)
    assert error.value.hint.startswith("Give from ")
    with pytest.raises(UserError, match="of which there is none"):
        AnyPrecision(load_mixed=True)
    with pytest.raises(UserError, match="does not load"):
        AnyPrecision(load_mixed=True, budget=9, eval_bits=(3,))
    with pytest.raises(UserError, match="about an artefact"):
        compressed(AnyPrecision(budget=10**6, load_mixed=True))
    AnyPrecision().save(model, tmp_path)
    with pytest.raises(UserError, match="does not say what each width loses") as error:
        AnyPrecision(budget=10**6).load(tiny_model().eval(), tmp_path, context())
    assert "method.budget=BYTES" in error.value.hint
    for text, said in (
        ("{", "cannot be read"),
        ('{"budget": 1, "widths": {}, "losses": {}}', "fit"),
    ):
        (tmp_path / mixed.FILE).write_text(text)
        with pytest.raises(UserError, match=said):
            AnyPrecision(budget=10**6).load(tiny_model().eval(), tmp_path, context())


def test_an_evaluation_holds_what_it_asks_for_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_evaluation(monkeypatch)
    small = ["method=any_precision", "method.bits=4", "method.budget=110000"]
    made = bench.run("compress", *small, "dataset.limit.train=4", "hardware.dtype=float32")
    again = bench.run(
        "eval", f"from={made.key}", "method.load_mixed=true", "hardware.dtype=float32"
    )
    [whole], [mixed_alone] = (
        [m.value for m in record.metrics if m.name == "resident_bytes"] for record in (made, again)
    )
    model = ModelShape.of(tiny_shape())
    rest = cost_of(model, "float32").resident_bytes - 4 * model.linear_params
    assert whole - rest > 1.5 * 110000
    assert 0.95 * 110000 < mixed_alone - rest <= 110000
