"""Products of packed codes as they lie, without the dense weight, against that weight."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from effbench.nn.decode import native, native_step
from effbench.nn.quant import (
    layout,
    linears,
    nested_linear,
    nf4,
    plane_linears,
    shifted_linear,
    trits,
)
from effbench.util.hardware import cpu_flags


@cache
def packed(kind: str, rows: int, columns: int) -> linears.QuantisedLinear:
    """A packed linear with a bias and, in its weight, rows of very different sizes."""
    generator = torch.Generator().manual_seed(rows)
    linear = torch.nn.Linear(columns, rows)
    linear.weight.data = torch.randn(rows, columns, generator=generator)
    linear.weight.data *= torch.logspace(-3, 2, rows)[:, None]
    linear.weight.data[0, : columns // 2] = 0.0
    linear.weight.data[-1] = 3.0  # the largest levels, multiplied with the largest numbers
    if kind == "nf4":
        return linears.NF4Linear.quantise(linear)
    if kind.startswith("nested"):
        return nested(linear, int(kind.split()[1]), generator)
    if kind.startswith("trits"):
        search = trits.Search(max_iters=2)  # any codes will do
        return plane_linears.TritLinear.quantise(linear, *map(int, kind.split()[1:]), search)
    if kind.startswith("signs"):
        bits, group, *offset = kind.split()[1:]
        return plane_linears.BinaryLinear.quantise(linear, int(bits), int(group), bool(offset), 0)
    if kind.startswith("shifted"):
        return shifted_linear.ShiftedLinear.quantise(linear, *map(int, kind.split()[1:]))
    bits, group, symmetric = kind.split()
    return linears.PackedLinear.quantise(linear, int(bits), int(group), symmetric == "symmetric")


def nested(
    linear: torch.nn.Linear, bits: int, generator: torch.Generator
) -> nested_linear.NestedLinear:
    """A layer with codes and levels by lot, which a fit to weights would take long to find."""
    layer = nested_linear.NestedLinear.empty(linear, 2, 8)
    layer.planes.random_(generator=generator)
    layer.use(bits)
    sizes = linear.weight.data.abs().amax(1, keepdim=True)
    layer.table.copy_(sizes * torch.randn(layer.table.shape, generator=generator))
    return layer


PLANES = [
    *(f"nested {b}" for b in (2, 3, 4, 5, 6, 8)),
    *(f"trits {p} {g}" for p in (1, 2, 3) for g in (32, 4096)),
    *(f"signs {b} {g}" for b in (1, 3, 4, 5, 8) for g in ("32", "64 offset", "4096")),
]
KINDS = [
    *PLANES,
    "nf4",
    *(f"{b} {g} {s}" for b in (4, 8) for g in (32, 64, 4096) for s in ("symmetric", "asymmetric")),
    *(f"{b} {g} asymmetric" for b in (2, 3, 5, 6, 7) for g in (32, 4096)),
    *(f"{b} 64 symmetric" for b in (2, 3, 5, 6, 7)),
    "3 96 asymmetric",
    "4 96 asymmetric",  # six groups of three blocks in 576 columns
    "8 96 symmetric",
    *(f"shifted {b} {g}" for b, g in ((2, 32), (3, 64), (4, 32), (4, 64), (8, 4096))),
]


def lost(linear: linears.QuantisedLinear, weight: torch.Tensor) -> torch.Tensor:
    """What is lost of each weight at most where levels are integers, [N, K]."""
    if isinstance(linear, linears.PackedLinear | shifted_linear.ShiftedLinear):
        return torch.zeros_like(weight)
    if isinstance(linear, linears.NF4Linear):
        return weight.abs() * 2e-4
    if isinstance(linear, plane_linears.PlaneLinear):  # two tables, each rounded once
        largest = linear.scales.double().sum(0) * (1 + (linear.kind == layout.TRITS))
        per = largest.repeat_interleave(linear.group_size, 1)[:, : weight.shape[1]]
        return per * 1.02 / 32766
    return weight.abs().amax(1, keepdim=True).expand_as(weight) * 0.51 / 32766


SHAPES = ((1, 32), (5, 96), (7, 160), (33, 576), (3, 1504), (4, 448))
"""Rows and columns."""


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_codes_are_those_of_the_expanded_weight(kind: str) -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(native.why_not())
    for shape in SHAPES:
        linear = packed(kind, *shape)
        assert native_step.readable(linear, torch.float32)
        weight = linear.dense_weight(torch.float64)
        most = (weight.abs() * 1e-5 + lost(linear, weight)).T
        for rows in (1, 4, 6):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1))
            x[:, 3] *= 1000  # an activation as large as some models have
            x[-1] = 1.0
            found = native_step.product(kernels, linear, x)
            # Half of a block's largest number / 32767 (NF4: 8191) is lost of each number, at most.
            steps = x.abs().view(rows, -1, 32).amax(2) / (8191 if kind == "nf4" else 32767)
            bound = 0.51 * steps.double().repeat_interleave(32, 1) @ weight.abs().T
            off = (found.double() - x.double() @ weight.T).abs()
            assert (off <= bound + x.double().abs() @ most).all(), (shape, rows)
            alone = native_step.product(kernels, linear, x[:1])
            assert found[:1].equal(alone), (shape, rows, "a sum depends on the batch")


BF16_LEVELS = {"avx512_bf16", "avx512vbmi", "avx512_vnni"} <= cpu_flags()
"""Whether the CPU multiplies nested levels in bfloat16."""


@pytest.mark.parametrize("bits", [2, 4, 5, 6, 7, 8])
def test_nested_levels_meet_vectors_of_bfloat16_as_an_expanded_weight_does(bits: int) -> None:
    """Where the CPU multiplies bfloat16, nothing is lost but what the weight loses in it."""
    kernels = native.kernels()
    if kernels is None or not BF16_LEVELS:
        pytest.skip("needs a compiler and a CPU with AVX-512 BF16, VBMI and VNNI")
    for shape in SHAPES:
        linear = packed(f"nested {bits}", *shape)
        weight = linear.dense_weight(torch.bfloat16).double()
        for rows in (1, 4, 6):
            x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
            found = native_step.product(kernels, linear, x).double()
            exact = x.double() @ weight.T
            most = x.double().abs() @ weight.abs().T * 1e-6 + exact.abs() * 2**-8
            assert ((found - exact).abs() <= most).all(), (shape, rows)
            alone = native_step.product(kernels, linear, x[:1]).double()
            assert found[:1].equal(alone), (shape, rows, "a sum depends on the batch")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_through_products_of_codes(bad: float) -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(native.why_not())
    x = torch.ones(1, 96)
    x[0, 40] = bad
    for kind in (
        "nf4",
        "4 32 asymmetric",
        "8 32 symmetric",
        "nested 3",
        "trits 2 32",
        "signs 3 32",
    ):
        assert not native_step.product(kernels, packed(kind, 5, 96), x)[0, 1:].isfinite().any()


@pytest.mark.parametrize("kind", ["4 32 asymmetric", "8 32 symmetric", "4 64 asymmetric", "nf4"])
def test_a_row_is_not_touched_by_the_scales_of_the_next_one(kind: str) -> None:
    kernels = native.kernels()
    if kernels is None:
        pytest.skip(native.why_not())
    linear = copy.deepcopy(packed(kind, 33, 576))
    x = torch.randn(1, 576, generator=torch.Generator().manual_seed(1))
    whole = native_step.product(kernels, linear, x)
    scales = linear.layout().scales  # type: ignore[union-attr]
    if kind == "nf4":
        scales[9 * 9 :] = 255 - scales[9 * 9 :]
    else:
        scales.view(33, -1)[9:] = float("inf")
    assert native_step.product(kernels, linear, x)[:, :9].equal(whole[:, :9])
    assert not native_step.product(kernels, linear, x)[:, 9:].equal(whole[:, 9:])


def test_layouts_that_kernels_cannot_read_are_left_to_the_modules() -> None:
    for kind, columns in (
        ("4 16 symmetric", 96),
        ("3 32 symmetric", 72),
        ("4 32 symmetric", 72),
        ("nf4", 72),
        ("nested 3", 72),
        ("trits 2 16", 96),
        ("signs 3 32", 72),
    ):
        assert packed(kind, 5, columns).layout() is None
    moved = copy.deepcopy(packed("4 32 symmetric", 5, 96))
    moved.register_forward_hook(lambda *_: None)
    assert not native_step.readable(moved, torch.float32)
    assert not native_step.readable(packed("nf4", 5, 96), torch.bfloat16)  # its bias is float32


def test_the_kernels_levels_are_those_of_nf4() -> None:
    text = (native.SOURCES / "packed.h").read_text()
    table = text.split("kLevels[16] = {")[1].split("}")[0]
    found = [int(part) for part in table.split(",")]
    assert found == [round(level * 32767) for level in nf4.LEVELS]
