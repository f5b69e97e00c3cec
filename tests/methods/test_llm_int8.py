"""LLM.int8(): the paper's equations, the authors' library, outliers, bytes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, generator, tiny_model

from effbench.api.points import UNNAMED
from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.llm_int8 import LLMInt8
from effbench.nn.quant import int8
from effbench.nn.quant.int8_linear import Int8Linear
from effbench.nn.quant.linears import storage_bytes
from effbench.util.errors import UserError

IDS = torch.arange(3, 23).view(2, 10)


def layer_of(threshold: float, d_in: int = 96, d_out: int = 24) -> tuple[Int8Linear, torch.Tensor]:
    linear = torch.nn.Linear(d_in, d_out, bias=False)
    weight = (
        torch.randn(d_out, d_in, generator=generator(1)) * torch.logspace(-3, 2, d_out)[:, None]
    )
    linear.weight.data = weight.half().float()
    return Int8Linear.quantise(linear, threshold), linear.weight.data


def tokens(rows: int, d_in: int = 96) -> torch.Tensor:
    """Activations of which two columns are large in every token, and one in the first alone."""
    x = torch.randn(rows, d_in, generator=generator(2)).clamp(-4, 4)
    x[:, 7] = 40.0
    x[:, 50] = -9.0
    x[0, 20] = 6.0
    return x.half().float()


def test_a_product_is_that_of_the_papers_equations() -> None:
    layer, w = layer_of(6.0)
    found = layer(x := tokens(5))
    for t, token in enumerate(x.double()):
        inside = token.abs() < 6.0
        assert (~inside).sum() == 2 + (t == 0)
        c_x, c_w = (token * inside).abs().max(), w.double().abs().amax(1)
        x8 = torch.round(127 * token * inside / c_x)
        w8 = torch.round(127 * w.double() / c_w[:, None])
        y = (w8 @ x8) * c_x * c_w / 127**2 + (c_w[:, None] * w8 / 127) @ (token * ~inside)
        torch.testing.assert_close(
            found[t].double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max())
        )


def test_codes_and_products_are_those_of_bitsandbytes() -> None:
    """Of tokens that all have the same large columns, for theirs takes a column out for all."""
    functional = pytest.importorskip("bitsandbytes").functional
    layer, w = layer_of(6.0)
    codes, scales, _ = functional.int8_vectorwise_quant(w.half())
    assert codes.equal(layer.codes) and scales.equal(layer.scales)
    x = tokens(6)[1:]
    x8, c_x, columns = functional.int8_vectorwise_quant(x.half(), threshold=6.0)
    assert columns.tolist() == [7, 50]
    sums = functional.int8_linear_matmul(x8, codes)
    theirs = torch.ops.bitsandbytes.int8_mm_dequant(sums, c_x, scales, dtype=torch.float32)
    theirs += x[:, columns] @ (codes[:, columns] * scales[:, None] / 127).T
    largest = float(theirs.abs().max())
    torch.testing.assert_close(layer(x), theirs, rtol=1e-3, atol=1e-5 * largest)


def test_sums_of_integers_are_exact_where_float32_is_not() -> None:
    a = torch.full((1, 9001), 127, dtype=torch.int8)
    a[0, ::2] = 126
    expected = int((a.long() ** 2).sum())
    assert int(int8._integer_product(a, a)) == expected
    assert int((a.float() @ a.float().T).long()) != expected, "the sum is no trial"


def test_what_a_token_becomes_depends_on_no_other() -> None:
    layer, _ = layer_of(6.0)
    x = tokens(5)
    together = layer(x)
    for t in range(5):
        torch.testing.assert_close(layer(x[t : t + 1])[0], together[t], rtol=1e-6, atol=1e-5)
    assert layer(x.view(1, 5, -1)).equal(together[None])


def test_outliers_make_the_error_small_and_a_threshold_of_zero_rounds_weights_alone() -> None:
    x, errors = tokens(40), {}
    for threshold in (0.0, 6.0, 1e9):
        layer, _ = layer_of(threshold)
        exact = x.double() @ layer.dense_weight(torch.float64).T
        errors[threshold] = float((layer(x) - exact).norm() / exact.norm())
    assert errors[0.0] < 1e-6 < errors[6.0] < errors[1e9] / 3


def test_zeros_and_what_is_not_finite() -> None:
    layer, _ = layer_of(6.0)
    assert layer(torch.zeros(2, 96)).equal(torch.zeros(2, 24))
    x = tokens(3)
    x[1, 3] = float("nan")
    out = layer(x)
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()
    linear = torch.nn.Linear(8, 2, bias=False)
    torch.nn.init.zeros_(linear.weight)
    assert Int8Linear.quantise(linear, 6.0)(torch.ones(1, 8)).equal(torch.zeros(1, 2))
    linear.weight.data[1, 1] = float("inf")
    with pytest.raises(UserError, match="finite"):
        Int8Linear.quantise(linear, 6.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_close_to_dense_and_takes_the_stated_bytes(dtype: str, tmp_path: Path) -> None:
    dense: Any = tiny_model(dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    model: Any = tiny_model(dtype=getattr(torch, dtype)).requires_grad_(False).eval()
    method = LLMInt8()
    compress_whole(method, model, [batch_of()], context())
    assert storage_bytes(model) == chain_cost([method], SHAPE, dtype).resident_bytes
    with torch.no_grad():
        found, expected = model(IDS).logits, dense(IDS).logits
        off = float((found.float() - expected.float()).norm() / expected.float().norm())
        assert 0 < off < (0.03 if dtype == "float32" else 0.05)
        method.save(model, tmp_path)
        alone = LLMInt8(threshold=0.0).load(dense, tmp_path, context())
        assert not alone(IDS).logits.equal(found), "another threshold is another product"
        with pytest.raises(UserError, match="round what they multiply"):
            method.as_plain(model, UNNAMED)
        plain = LLMInt8(threshold=0.0).as_plain(alone, UNNAMED).model
        torch.testing.assert_close(plain(IDS).logits, alone(IDS).logits.float(), atol=0.1, rtol=0.1)
        assert method.load(tiny_model(dtype=getattr(torch, dtype)).eval(), tmp_path, context())(
            IDS
        ).logits.equal(found)
