"""Deep LoRA: starts, the compressed subspace, and the trajectory that it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    base_for,
    batch_of,
    begun,
    context,
    counted,
    logits,
    prepared,
    stated,
    storage_hash,
    tiny_model,
    train,
    window,
)
from torch import nn

from effbench.api.batch import Batch
from effbench.api.parts import deep_update
from effbench.api.points import UNNAMED
from effbench.methods.adapters.deep_lora import DeepLoRA
from effbench.nn.adapters import deep
from effbench.nn.adapters.deep import (
    DeepLinear,
    deep_layers,
    low_rank_pair,
    top_directions,
    weight_gradients,
)
from effbench.nn.quant.formats.nf4 import NF4Format
from effbench.nn.quant.linears import pack_linears
from effbench.util.errors import UserError

FORMS = ["narrow", "full", "compressed"]
SIZES = {"square": (24, 24), "tall": (16, 40), "wide": (40, 16)}
"""`(d_in, d_out)`; tall is d_out > d_in."""


def layer_of(form: str, size: str = "square", rank: int = 4, depth: int = 3) -> DeepLinear:
    d_in, d_out = SIZES[size]
    base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    return DeepLinear(base, form, rank, depth, 1e-3, 0, "layer")  # type: ignore[arg-type]


def rank_two(size: str) -> torch.Tensor:
    d_in, d_out = SIZES[size]
    draws = torch.Generator().manual_seed(8)
    return torch.randn(d_out, 2, generator=draws) @ torch.randn(2, d_in, generator=draws)


# -- the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_the_update_starts_at_the_power_of_eps(form: str, depth: int, size: str) -> None:
    layer = layer_of(form, size, depth=depth)
    values = torch.linalg.svdvals(layer.delta().double())
    kept = 4 if form != "full" else min(SIZES[size])
    expected = torch.full((kept,), 1e-3**depth, dtype=torch.float64)
    torch.testing.assert_close(values[:kept], expected, rtol=1e-4, atol=0)
    assert (values[kept:] < 1e-3 * 1e-3**depth).all()
    for factor in layer.factors:
        singular = torch.linalg.svdvals(factor.detach())
        torch.testing.assert_close(singular, torch.full_like(singular, 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_untrained_model_is_the_base_within_rounding(form: str) -> None:
    model, _ = prepared(DeepLoRA(form=form))  # type: ignore[arg-type]
    torch.testing.assert_close(logits(model), logits(tiny_model()), rtol=1e-6, atol=1e-6)


def test_settings_are_those_of_the_layers() -> None:
    model, _ = prepared(DeepLoRA(form="narrow", rank=6, depth=4, init_scale=0.05))
    for _, layer in deep_layers(model):
        assert len(layer.factors) == 4
        assert not layer.factors[1].equal(layer.factors[2])
        for factor in layer.factors:
            singular = torch.linalg.svdvals(factor.detach())
            torch.testing.assert_close(singular, torch.full((6,), 0.05))


def test_the_start_depends_on_seed_and_layer_alone() -> None:
    torch.manual_seed(1)
    first, _ = prepared(DeepLoRA())
    torch.manual_seed(2)
    second, _ = prepared(DeepLoRA())
    other, _ = prepared(DeepLoRA(), seed=1)
    method = DeepLoRA()
    one, two, three = (method.trained_tensors(m) for m in (first, second, other))
    assert all(one[n].equal(two[n]) for n in one)
    lefts = [n for n in one if n.endswith("left")]
    assert all(not one[n].equal(three[n]) for n in lefts)
    assert not one[lefts[0]][:32, :4].equal(one[lefts[1]][:32, :4])


# -- the subspace ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_frames_are_orthonormal_and_linked_by_the_start(size: str) -> None:
    layer = layer_of("compressed", size).double()
    layer.set_subspace(layer.directions(rank_two(size).double(), torch.Generator()))
    eye = torch.eye(4, dtype=torch.float64)
    for frame in (layer.left, layer.right):
        torch.testing.assert_close(frame.T @ frame, eye, atol=1e-6, rtol=0)
    start = 1e-9 * layer.full_start().double()
    kept = layer.left @ layer.left.T @ start @ layer.right @ layer.right.T
    torch.testing.assert_close(layer.delta(), kept, atol=1e-15, rtol=1e-5)
    if size == "square":
        torch.testing.assert_close(layer.left, layer.full_start().double() @ layer.right)
    else:  # the longer side's factor has what the start is between the frames, the others eps I
        longer = layer.factors[{"tall": 2, "wide": 0}[size]]
        torch.testing.assert_close(longer, 1e6 * layer.left.T @ start @ layer.right)
        for factor in {*layer.factors} - {longer}:
            torch.testing.assert_close(factor, 1e-3 * eye)


@pytest.mark.parametrize("size", SIZES)
def test_frames_are_orthonormal_in_float64(size: str) -> None:
    layer = layer_of("compressed", size).double()
    exact_start(layer)
    layer.set_subspace(layer.directions(rank_two(size).double(), torch.Generator()))
    eye = torch.eye(4, dtype=torch.float64)
    for frame in (layer.left.detach(), layer.right.detach()):
        assert float((frame.T @ frame - eye).abs().max()) < 1e-12


def exact_start(layer: DeepLinear) -> torch.Tensor:
    """Give a layer a start Q that is orthonormal in float64 too, and return it."""
    u, _, vh = torch.linalg.svd(layer.full_start().double(), full_matrices=False)
    q = u @ vh
    layer.full_start = lambda: q  # type: ignore[method-assign]
    return q


def test_at_full_rank_the_compressed_form_is_the_full_one() -> None:
    """Nothing is left out: the same start, and the same path of the update."""
    eps, target = 0.1, rank_two("square").double()
    target = target / torch.linalg.matrix_norm(target, 2)
    small, full = (layer_of(f, rank=24).double() for f in ("compressed", "full"))
    q = exact_start(small)
    small.scale = eps
    small.set_subspace(small.directions(q - target, torch.Generator()))
    for layer in (small, full):
        for factor in layer.factors:
            factor.data = eps * torch.eye(24, dtype=torch.float64)
    full.factors[-1].data = eps * q
    torch.testing.assert_close(small.delta(), eps**3 * q, atol=1e-18, rtol=1e-10)
    paths = [descent(layer, target, 400, 0.2) for layer in (full, small)]
    for whole, kept in zip(*paths, strict=True):
        torch.testing.assert_close(kept, whole, atol=1e-10, rtol=1e-8)
    assert float((paths[0][-1] - eps**3 * q).norm()) > 0.5


def test_leading_directions_are_those_of_an_exact_decomposition() -> None:
    draws = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 5, generator=draws) @ torch.randn(5, 30, generator=draws)
    matrix += 1e-4 * torch.randn(40, 30, generator=draws)
    u, v = top_directions(matrix.double(), 5, torch.Generator().manual_seed(1))
    exact = torch.linalg.svd(matrix.double())
    for found, true in ((u, exact.U[:, :5]), (v, exact.Vh[:5].T)):
        torch.testing.assert_close(found @ found.T, true @ true.T, atol=1e-6, rtol=0)


def test_directions_of_a_gradient_of_low_rank_are_filled_up() -> None:
    u, v = top_directions(torch.zeros(20, 12), 3, torch.Generator().manual_seed(1))
    for found in (u, v):
        torch.testing.assert_close(found.T @ found, torch.eye(3), atol=1e-5, rtol=0)


def descent(layer: DeepLinear, target: torch.Tensor, steps: int, rate: float) -> list[torch.Tensor]:
    """Return the updates along gradient descent on half the squared distance to `target`."""
    path = []
    inner = list(layer.factors)
    for _ in range(steps):
        delta = layer.delta()
        path.append(delta.detach())
        loss = (delta - target).square().sum() / 2
        gradients = torch.autograd.grad(loss, inner)
        with torch.no_grad():
            for factor, gradient in zip(inner, gradients, strict=True):
                factor -= rate * gradient
    return path


@pytest.mark.parametrize(
    ("size", "bound"),
    [("square", 1e-6), ("tall", 1e-2), pytest.param("wide", 1e-2, marks=pytest.mark.slow)],
)
def test_the_compressed_trajectory_is_that_of_the_full_width(size: str, bound: float) -> None:
    """Gradient descent in float64 from one start, eps = 0.01, a target of rank 2 and r = 4.

    For a square weight the paths are apart by eps^3 sqrt(d - r), the part of the start that the
    subspace leaves out. For others the longer side of the start reaches out of any r directions:
    they are apart by something of the order of eps.
    """
    eps, target = 1e-2, rank_two(size).double()
    target = target / torch.linalg.matrix_norm(target, 2)
    d_in, d_out = SIZES[size]
    base = nn.Linear(d_in, d_out, bias=False)
    full = DeepLinear(base, "full", 4, 3, eps, 0, "layer").double()
    small = DeepLinear(base, "compressed", 4, 3, eps, 0, "layer").double()
    for factor in full.factors:  # orthonormal in float64 too
        u, _, vh = torch.linalg.svd(factor.detach(), full_matrices=False)
        factor.data = eps * u @ vh
    q = (full.delta() / eps**3).detach()
    small.full_start = lambda: q  # type: ignore[method-assign]
    gradient = full.delta().detach() - target
    small.set_subspace(small.directions(gradient, torch.Generator().manual_seed(0)))
    whole = descent(full, target, 4000, 0.2)
    kept = descent(small, target, 4000, 0.2)
    apart = max(float((a - b).norm()) for a, b in zip(whole, kept, strict=True))
    assert apart <= 1.05 * bound * (min(d_in, d_out) - 4) ** 0.5
    for path in (whole, kept):
        assert float((path[-1] - target).norm()) < 5 * bound
        assert float((path[0] - target).norm()) > 1
    if size == "square":
        values = torch.linalg.svdvals(full.factors[1].detach())
        still = values[2:-2]  # two directions have grown, two have shrunk, the others never mixed
        assert float(still.max() - still.min()) < 1e-8 and values[0] > 0.5


def test_the_gradient_is_that_of_the_frozen_weight() -> None:
    method = DeepLoRA(rank=4)
    model, ctx = prepared(method)
    batch = batch_of()
    found: dict[str, torch.Tensor] = {}
    names = {layer: name for name, layer in deep_layers(model)}
    with weight_gradients([*names], lambda layer, g: found.update({names[layer]: g})):
        method.loss(model, batch, ctx).backward()
    plain = tiny_model()
    method.loss(plain, batch, ctx).backward()
    assert found.keys() == names.keys() or set(found) == set(names.values())
    for name, gradient in found.items():
        weight = plain.get_submodule(name).weight  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-3)
    assert not any(m._forward_hooks for m in model.modules())


def test_start_chooses_the_subspace_from_the_first_window() -> None:
    method = DeepLoRA(rank=4)
    model, ctx = prepared(method)
    before = {n: t.clone() for n, t in method.trained_tensors(model).items()}
    ctx.evolution.begin(window(0))
    after = method.trained_tensors(model)
    assert all(not before[n].equal(after[n]) for n in after if n.endswith(("left", "right")))
    square = [n for n in after if "q_proj.factors" in n or "o_proj.factors" in n]
    assert len(square) == 2 * 2 * 3 and all(before[n].equal(after[n]) for n in square)
    assert all(p.grad is None for p in model.parameters())
    random = DeepLoRA(rank=4, subspace="random")
    other, its = prepared(random)
    its.evolution.begin(window(0))
    assert all(before[n].equal(t) for n, t in random.trained_tensors(other).items())


@pytest.mark.parametrize("held", [2**27, 1])
def test_frames_do_not_depend_on_how_a_step_is_cut(
    monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(deep, "HELD", held)
    whole = batch_of(rows=4)

    def rows(some: list[int]) -> Batch:
        parts = {n: getattr(whole, n)[some] for n in ("input_ids", "attention_mask", "labels")}
        return replace(whole, **parts, rows=some)

    def spans(cut: list[list[int]]) -> list[torch.Tensor]:
        model, ctx = prepared(DeepLoRA(rank=4))
        ctx.evolution.begin([rows(some) for some in cut])
        frames = [f for _, layer in deep_layers(model) for f in (layer.left, layer.right)]
        return [f.detach() @ f.detach().T for f in frames]

    once = spans([[0, 1, 2, 3]])
    for cut in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        for ours, theirs in zip(spans(cut), once, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    first = spans([[0, 1]])
    assert max(float((a - b).abs().max()) for a, b in zip(first, once, strict=True)) > 0.1


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_training_learns_and_leaves_the_base(form: str) -> None:
    method = DeepLoRA(form=form, rank=4)  # type: ignore[arg-type]
    model, ctx = prepared(method)
    base = storage_of_base(model)
    ctx.evolution.begin(window(0))
    losses = train(method, model, ctx, 40, adamw(model, lr=2e-2), same_batch=True)
    assert losses[-1] < losses[0] - 0.05
    assert storage_of_base(model) == base
    assert all(not p.requires_grad for n, p in model.named_parameters() if ".base." in n)


def storage_of_base(model: nn.Module) -> list[bytes]:
    named = model.state_dict().items()
    return [
        t.numpy().tobytes()
        for n, t in named
        if not any(part in n for part in ("factors", "left", "right"))
    ]


def test_frames_stay_bit_for_bit_at_rate_zero_and_follow_their_own_rate() -> None:
    for rate in (0.0, 0.5):
        method = DeepLoRA(rank=4, frame_rate=rate)
        model, ctx = prepared(method)
        frames = {
            n: t.clone()
            for n, t in method.trained_tensors(model).items()
            if n.endswith(("left", "right"))
        }
        groups = [{"params": p, "lr": 1e-2 * s} for p, s in method.param_groups(model)]
        assert [g["lr"] for g in groups] == [1e-2, 5e-3][: len(groups)]
        train(method, model, ctx, 2, torch.optim.AdamW(groups, weight_decay=0.0))
        same = [frames[n].equal(method.trained_tensors(model)[n]) for n in frames]
        assert all(same) if rate == 0 else not any(same)


def test_every_trained_parameter_is_in_a_group() -> None:
    for form in FORMS:
        method = DeepLoRA(form=form, rank=4)  # type: ignore[arg-type]
        model, _ = prepared(method)
        grouped = [id(p) for members, _ in method.param_groups(model) for p in members]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


# -- counts and artefact -----------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 1e-2])
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_cost_is_what_is_counted(form: str, depth: int, rate: float) -> None:
    method = DeepLoRA(form=form, rank=4, depth=depth, frame_rate=rate)  # type: ignore[arg-type]
    model, _ = prepared(method)
    assert counted(model) == stated(method)


def test_counts_are_the_formulas_of_the_paper() -> None:
    def params(form: str, rank: int, depth: int, rate: float = 0.1) -> tuple[int, int]:
        update = deep_update(form, 30, 50, rank, depth, False, rate)
        return update.params, update.trainable

    assert params("narrow", 8, 3) == (8 * 80 + 64,) * 2
    assert params("full", 8, 3) == (30 * 80 + 900,) * 2
    assert params("compressed", 8, 3) == (8 * 80 + 3 * 64,) * 2
    assert params("compressed", 8, 3, 0.0) == (8 * 80 + 3 * 64, 3 * 64)
    assert params("narrow", 8, 2) == (8 * 80,) * 2


def test_two_factors_are_a_plain_product() -> None:
    layer = layer_of("narrow", "tall", depth=2)
    first, second = layer.factors
    torch.testing.assert_close(layer.delta(), second @ first)


@pytest.mark.parametrize("form", FORMS)
def test_the_merged_weight_gives_what_the_layer_gives(form: str) -> None:
    layer = layer_of(form, "tall")
    with torch.no_grad():
        for factor in layer.factors:
            factor.mul_(700)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    merged = x @ (layer.base.weight + layer.delta()).T  # type: ignore[operator]
    torch.testing.assert_close(layer(x), merged, atol=1e-5, rtol=1e-5)


def test_the_exported_pair_is_the_update_up_to_its_small_singular_values() -> None:
    draws = torch.Generator().manual_seed(0)
    first = torch.randn(20, 3, generator=draws) @ torch.randn(3, 12, generator=draws)
    second = torch.randn(20, 1, generator=draws) @ torch.randn(1, 12, generator=draws)
    pairs = low_rank_pair([first, second], 12, 1e-3)
    assert {a.shape[0] for a, _ in pairs} == {3}
    for (a, b), delta in zip(pairs, (first, second), strict=True):
        torch.testing.assert_close(b @ a, delta, atol=1e-5, rtol=1e-5)
    assert low_rank_pair([first], 2)[0][0].shape == (2, 12)


def test_peft_gives_the_exported_model_the_same_logits(tmp_path: Path) -> None:
    from peft import PeftModel

    method = DeepLoRA(rank=4)
    model, ctx = prepared(method)
    ctx.evolution.begin(window(0))
    train(method, model, ctx, 30, adamw(model, lr=3e-2))
    assert not torch.allclose(logits(model), logits(tiny_model()), atol=1e-3)
    method.export(model, UNNAMED, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("form", "rank"), [("narrow", 6), ("compressed", 6), ("full", 64)])
def test_the_adapter_is_the_update_of_every_layer_whatever_its_sides(form: str, rank: int) -> None:
    method = DeepLoRA(form=form, rank=6)  # type: ignore[arg-type]
    model, _ = prepared(method, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    layers = dict(deep_layers(model))
    for layer in layers.values():
        layer.factors.requires_grad_(False)[0].mul_(1e6)
    adapter = method.as_peft(model, UNNAMED)
    assert adapter is not None
    assert adapter.alpha == rank
    assert adapter.factors.keys() == layers.keys()
    for name, (a, b) in adapter.factors.items():
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        torch.testing.assert_close(b @ a, layers[name].delta(), atol=1e-6, rtol=1e-4)


def test_an_odd_rank_is_refused_for_the_compressed_form() -> None:
    with pytest.raises(UserError, match="odd"):
        DeepLoRA(rank=5)
    assert DeepLoRA(rank=5, form="narrow").rank == 5
    with pytest.raises(UserError, match=r"method\.rank=40"):
        DeepLoRA(rank=40).resolve(replace(SHAPE, hidden_size=32))


def test_it_works_on_a_packed_base() -> None:

    method = DeepLoRA(rank=4)
    model = base_for(method)
    pack_linears(model, NF4Format(), torch.float32)
    ctx = context()
    model = begun(method, model, ctx)
    ctx.evolution.begin(window(0))
    losses = train(method, model, ctx, 20, adamw(model, lr=2e-2), same_batch=True)
    assert losses[-1] < losses[0]
    assert storage_hash(model)
