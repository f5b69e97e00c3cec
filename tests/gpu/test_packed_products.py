"""Products of packed weights by Triton; without a GPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.nn.decode.pointwise import EAGER, fused
from effbench.nn.decode.static import StaticSession
from effbench.nn.quant import nested_linear
from effbench.nn.quant.formats.any_precision import AnyPrecisionCodes
from effbench.nn.quant.formats.grouped import Grouped
from effbench.nn.quant.linears import MOST_VECTORS, PackedLinear, QuantisedLinear, pack_linears
from effbench.nn.quant.plane_linears import BinaryLinear, TritLinear
from effbench.nn.quant.shifted_linear import ShiftedLinear

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Of the largest product, in float64 from the same codes and vectors."""


@pytest.fixture(scope="module")
def kernels(triton_runs: None) -> Any:
    from effbench.nn.quant import triton_products

    return triton_products


def packed(kind: str, linear: torch.nn.Linear) -> QuantisedLinear:
    name, *numbers = kind.split()
    sizes = [int(n) for n in numbers]
    if name == "codes":
        return PackedLinear.quantise(linear, sizes[0], sizes[1])
    if name == "symmetric":
        return PackedLinear.quantise(linear, sizes[0], sizes[1], symmetric=True)
    if name == "shifted":
        return ShiftedLinear.quantise(linear, sizes[0], sizes[1])
    if name == "trits":
        return TritLinear.quantise(linear, sizes[0], sizes[1])
    if name == "signs":
        return BinaryLinear.quantise(linear, sizes[0], sizes[1], offset=len(sizes) > 2, rounds=1)
    made = nested_linear.NestedLinear.quantise(linear, 2, 8)
    made.use(sizes[0])
    return made


KINDS = [
    *(f"codes {bits} 32" for bits in range(2, 9)),
    *("codes 3 96", "symmetric 3 32", "symmetric 8 96", "shifted 4 32", "shifted 5 96"),
    *("trits 1 32", "trits 2 96", "signs 1 32", "signs 3 96", "signs 2 32 1"),
    *(f"nested {bits}" for bits in (2, 3, 4, 8)),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(5, 96), (11, 288), (3, 544)])
def test_products_are_those_of_the_expanded_weight(
    kernels: Any, kind: str, rows: int, columns: int, dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(rows)
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = torch.randn(rows, columns, generator=generator)
    linear.weight.data *= torch.logspace(-2, 2, rows)[:, None]
    layer = packed(kind, linear).to(device)
    x = torch.randn(2, 1, columns, generator=generator).to(device, dtype)
    layout = layer.layout()
    assert kernels.multiplies(layout, layer.weight)
    found = kernels.product(layout, layer.weight, x, rows)
    right = x.double() @ layer.dense_weight(torch.float64).T
    assert found.shape == (2, 1, rows)
    assert found.dtype == dtype
    wrong = (found.double() - right).abs() / (
        x.double().abs() @ layer.dense_weight(torch.float64).abs().T
    )
    assert wrong.max() < TOLERANCES[dtype]


@pytest.mark.parametrize("form", [Grouped(3, 32), AnyPrecisionCodes(5, 3)], ids=str)
def test_a_step_is_captured_with_packed_weights(kernels: Any, form: Any, device: str) -> None:
    """On a GPU as a graph, at each width; its row kernels leave packed linears to their own."""
    torch.manual_seed(4)
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1)).eval()
    pack_linears(model, form, torch.float32)
    model = model.to(device).requires_grad_(False)
    ids = torch.randint(1, 97, (1, 12), generator=torch.Generator().manual_seed(1)).to(device)
    step = fused(lambda function: function, _row_kernels())
    for width in (3, 5):
        with nested_linear.read_at(model, width), torch.inference_mode():
            session = StaticSession(model, use_native=False)
            session.reserve(1, 12)
            assert session.engine == ("graph" if device == "cuda" else "walk")
            session.prefill(ids[:, :8])
            tables = [m.table for m in model.modules() if hasattr(m, "table")]
            assert {id(t) for t in tables} <= {id(t) for t in session.buffers()}
            for t in range(8, 12):
                right = model(ids[:, : t + 1]).logits[:, -1]
                found = session.step(ids[:, t : t + 1])
                torch.testing.assert_close(found, right, atol=2e-4, rtol=2e-4)
        part = session.blocks[0].mlp
        hidden = torch.randn(1, 1, 64, device=device)
        for pair in zip(
            step.gated(part, hidden, None), EAGER.gated(part, hidden, None), strict=True
        ):
            torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


def _row_kernels() -> Any:
    from effbench.nn.decode import triton_step

    return triton_step.RowKernels


def test_many_vectors_are_multiplied_with_the_expanded_weight(
    kernels: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PackedLinear.quantise(torch.nn.Linear(64, 8, bias=False), 4, 32).to(device)
    asked = []
    monkeypatch.setattr(kernels, "product", lambda *args: asked.append(args[2].shape))
    for count in (1, MOST_VECTORS, MOST_VECTORS + 1):
        layer.product(torch.randn(count, 64, device=device))
    assert [len(shape) and shape[0] for shape in asked] == (
        [1, MOST_VECTORS] if device == "cuda" else []
    )
    monkeypatch.setenv("EFFBENCH_NATIVE", "0")
    assert not layer.streams(torch.device("cuda"))
