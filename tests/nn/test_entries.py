"""Kernels of caches: codes expanded and keys turned, to the bit as torch's operations do it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import generator

from effbench.nn.decode import coded_attention, entries, view
from effbench.nn.decode.quantised import QuantisedLayer
from effbench.util import cpp
from effbench.util.hardware import cpu_flags

native = pytest.mark.skipif(cpp.compiler() is None, reason="there is no C++ compiler")


def held(bits: int, group: int, keys: int, values: int, dtype: torch.dtype) -> QuantisedLayer:
    """Return a layer with two rows of three heads, some groups of which are in codes."""
    layer, draws = QuantisedLayer(bits, group, 5), generator(7)
    sizes = ((2, 3, 6 * group + 7, width) for width in (keys, values))
    k, v = (3 * torch.randn(*size, generator=draws) + 1 for size in sizes)
    layer.update(k.to(dtype), v.to(dtype))
    assert layer.packed is not None and layer.keys is not None and layer.keys.shape[2] >= 5
    return layer


@native
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("group", "keys", "values"), [(32, 64, 64), (8, 24, 40), (4, 6, 10)])
def test_codes_are_expanded_as_torch_expands_them(
    bits: int, group: int, keys: int, values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = held(bits, group, keys, values, torch.float32)
    assert layer.packed and layer.keys is not None and layer.values is not None
    found = entries.expanded(layer.packed, bits, group, (layer.keys, layer.values))
    monkeypatch.setenv("EFFBENCH_NATIVE", "0")
    assert entries.expanded(layer.packed, bits, group, (layer.keys, layer.values)) is None
    expected = layer._all((layer.keys, layer.values), step=True)
    assert found is not None
    assert found[0].equal(expected[0]) and found[1].equal(expected[1])


@native
def test_codes_that_do_not_lie_together_are_expanded_alike() -> None:
    layer = held(4, 32, 64, 64, torch.float32)
    assert layer.packed and layer.keys is not None and layer.values is not None
    apart = [
        type(part)(*(t.transpose(0, 1).contiguous().transpose(0, 1) for t in part))
        for part in layer.packed
    ]
    recent = layer.keys, layer.values
    expected = entries.expanded(layer.packed, 4, 32, recent)
    found = entries.expanded((apart[0], apart[1]), 4, 32, recent)
    assert expected is not None and found is not None
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@native
@torch.inference_mode()
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(("group", "width"), [(32, 64), (64, 96), (32, 128)])
@pytest.mark.parametrize("each", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_attends_to_codes_as_to_what_they_stand_for(
    bits: int, group: int, width: int, each: int, dtype: torch.dtype
) -> None:
    layer, draws = QuantisedLayer(bits, group, 5), generator(3)
    for tokens in (11 * group + 3, 1, 1):
        layer.attends = tokens == 1
        k, v = (3 * torch.randn(2, 3, tokens, width, generator=draws) + 1 for _ in range(2))
        layer.update(k.to(dtype), v.to(dtype))
    view, query = layer.view, torch.randn(2, 3 * each, 1, width, generator=draws).to(dtype)
    assert view is not None and view.direct is not None and layer.packed is not None
    layer.dtype = torch.float32  # codes say numbers that are not rounded to bfloat16
    keys, values = layer._all((view.keys.float(), view.values.float()), step=False)
    asked = query.view(2, 3, each, width).double()
    expected = F.scaled_dot_product_attention(asked, keys.double(), values.double(), scale=0.1)
    found = view.direct(query, 0.1)
    assert found.shape == (2, 1, 3 * each, width)
    assert found.dtype == dtype
    near = {"atol": 1e-4, "rtol": 1e-5 if dtype == torch.float32 else 2**-8}
    torch.testing.assert_close(found.double(), expected.view(2, 1, 3 * each, width), **near)


@native
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-mavx2", "-mfma", "-mf16c")], ids=str)
def test_kernels_for_other_processors_give_the_same(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for the oldest of this one's kind, and for those with AVX2 alone."""
    if options and not {"avx2", "fma", "f16c"} <= cpu_flags():
        pytest.skip("needs a CPU with AVX2")
    monkeypatch.setattr(cpp, "NATIVE", options)
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    coded_attention._loaded.cache_clear()
    try:
        for bits, group, width in ((8, 32, 64), (4, 64, 96), (2, 32, 128), (4, 48, 48)):
            for dtype in coded_attention.DTYPES:
                test_a_step_attends_to_codes_as_to_what_they_stand_for(bits, group, width, 5, dtype)
        assert list(tmp_path.rglob("attention.so"))
    finally:
        coded_attention._loaded.cache_clear()


@native
def test_a_step_does_not_attend_to_codes_by_itself_where_it_cannot() -> None:
    wide, narrow = held(4, 32, 64, 64, torch.float32), held(4, 8, 24, 40, torch.float32)
    half, double = (held(4, 32, 64, 64, dtype) for dtype in (torch.bfloat16, torch.float64))

    def applies(layer: QuantisedLayer) -> bool:
        assert layer.keys is not None and layer.values is not None
        return coded_attention.applies(layer.bits, layer.group, layer.keys, layer.values)

    assert not applies(wide)  # gradients are wanted
    with torch.inference_mode():
        assert applies(wide) and applies(half)
        assert not applies(narrow)  # a group fills no register
        assert not applies(double)


@native
@pytest.mark.parametrize("shared", [True, False])
def test_keys_are_turned_as_torch_turns_them(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = generator(3)
    angles = torch.randn(40, 16, generator=draws), torch.randn(40, 16, generator=draws)
    places = torch.randint(40, (1 if shared else 2, 30), generator=draws)
    flat = torch.randn(2, 30, 48, generator=draws)
    for x in (
        flat.unflatten(2, (3, 16)).transpose(1, 2),
        flat.view(2, 3, 30, 16),
        flat[:, -1:].view(2, 3, 1, 16),
    ):
        at = places[:, : x.shape[2]]
        found = entries.turned(x, angles, at)
        with monkeypatch.context() as off:
            off.setenv("EFFBENCH_NATIVE", "0")
            expected = view.turned(x, angles, at)
        assert found is not None and found.equal(expected)
        assert view.turned(x, angles, at, step=True).equal(expected)


def test_what_the_kernels_are_not_for_is_left_to_torch() -> None:
    layer = held(4, 32, 64, 64, torch.bfloat16)
    assert layer.packed and layer.keys is not None and layer.values is not None
    assert entries.expanded(layer.packed, 4, 32, (layer.keys, layer.values)) is None
    halves = held(4, 1, 64, 64, torch.float32)  # a channel of one token, half a byte
    assert halves.packed and halves.keys is not None and halves.values is not None
    assert entries.expanded(halves.packed, 4, 1, (halves.keys, halves.values)) is None
    angles, places = (torch.ones(9, 16), torch.ones(9, 16)), torch.arange(9)[None]
    assert entries.turned(torch.ones(1, 2, 9, 16).bfloat16(), angles, places) is None
    learned = torch.ones(1, 2, 9, 16, requires_grad=True)
    assert entries.turned(learned, angles, places) is None
    apart = torch.ones(1, 2, 16, 9).transpose(2, 3)
    assert entries.turned(apart, angles, places) is None
