"""The kernels of a step against the modules; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.api.sharing import LayerMap
from effbench.nn.decode.cuda_graph import StaticStep
from effbench.nn.decode.pointwise import EAGER, fused, gate, rms_norm, turn
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.shared_attention import share

pytestmark = pytest.mark.gpu
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 8e-2}


@pytest.fixture(scope="module")
def kernels(triton_runs: None) -> Any:
    from effbench.nn.decode import triton_step

    return triton_step


def drawn(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(
        device, dtype
    )


def linear(d_in: int, d_out: int, bias: bool, device: str, dtype: torch.dtype) -> torch.nn.Linear:
    made = torch.nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        made.weight.copy_(drawn(d_out, d_in, device="cpu", dtype=torch.float32) / d_in**0.5)
    return made.to(device, dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(("d", "outs"), [(72, (120, 40, 40)), (640, (33,)), (2100, (51, 20))])
def test_products(
    kernels: Any, d: int, outs: tuple[int, ...], adds: bool, bias: bool, dtype: Any, device: str
) -> None:
    hidden = drawn(1, 1, d, device=device, dtype=dtype)
    added = drawn(1, 1, d, device=device, dtype=dtype) / 2 if adds else None
    norm = SimpleNamespace(weight=drawn(d, device=device, dtype=dtype), variance_epsilon=1e-5)
    linears = [linear(d, o, bias, device, dtype) for o in outs]
    close = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    total, x = rms_norm(hidden, added, norm.weight, 1e-5)
    summed, found = kernels.project(norm, hidden, added, linears)
    torch.testing.assert_close(summed, total, atol=2e-2 if dtype != torch.float32 else 0, rtol=1e-2)
    for out, module in zip(found, linears, strict=True):
        torch.testing.assert_close(out, module(x), **close)
    wide, up = (linear(d, 90, bias, device, dtype) for _ in range(2))
    summed, inner = kernels.gated(norm, hidden, added, wide, up)
    torch.testing.assert_close(inner, gate(wide(x), up(x)), **close)
    torch.testing.assert_close(kernels.product(linears[0], hidden), linears[0](hidden), **close)


CASES = [
    *((4, 4, 16, 128, 0, 0), (6, 2, 20, 256, 37, 0), (8, 2, 64, 384, 200, 5)),
    *((4, 1, 16, 128, 127, 0), (3, 3, 32, 640, 64, 64), (32, 32, 128, 4096, 4095, 0)),
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "capacity", "place", "start"), CASES)
def test_attention(
    kernels: Any,
    heads: int,
    kv_heads: int,
    width: int,
    capacity: int,
    place: int,
    start: int,
    dtype: Any,
    device: str,
) -> None:
    if device == "cpu" and (dtype != torch.float32 or capacity > 1000):
        pytest.skip("too slow, or no bfloat16, in the interpreter")
    some = {"device": device, "dtype": dtype}
    q = drawn(1, 1, heads * width, **some)
    k, v = drawn(1, 1, kv_heads * width, **some), drawn(1, 2, kv_heads * width, **some)[:, :1]
    cos, sin = drawn(1, 1, 1, width, **some), drawn(2, 1, 1, width, **some)[:1]
    cache = tuple(drawn(1, kv_heads, capacity, width, **some) for _ in range(2))
    keys, values = (t.clone() for t in cache)
    keys[:, :, place] = turn(k.view(1, kv_heads, 1, width), cos, sin)[:, :, 0]
    values[:, :, place] = v.view(1, kv_heads, width)
    seen = slice(start, place + 1)
    query = turn(q.view(1, kv_heads, -1, width), cos, sin)
    right = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen], scale=0.2)
    places = [torch.tensor([n], device=device) for n in (place, start)]
    found = kernels.attend(q, k, v.contiguous(), (cos, sin), cache, *places, 0.2)
    close = {"atol": TOLERANCES[dtype], "rtol": TOLERANCES[dtype]}
    torch.testing.assert_close(found, right.reshape(1, 1, -1), **close)
    for now, before in zip(cache, (keys, values), strict=True):
        torch.testing.assert_close(now, before, **close)


SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 72,
    "intermediate_size": 106,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "initializer_range": 0.1,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("mode", [None, "kv", "qk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_kernels_gives_what_modules_give(
    kernels: Any, family: str, mode: Any, device: str
) -> None:
    """Not captured, so that the interpreter runs it too; after padding, and with shared states."""
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(copy.deepcopy(FAMILIES[family]))
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
    model = model.to(device).eval().requires_grad_(False)
    if mode:
        share(model, LayerMap(mode, (0, 1, 1)))
    ids = torch.randint(1, 131, (1, 16), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones(1, 9, dtype=torch.long, device=device)
    mask[0, :3] = 0
    session, other = (StaticSession(model, use_native=False) for _ in range(2))
    for one in (session, other):
        one.prefill(ids[:, :9], mask)
    step = StaticStep(session, fused(lambda function: function, kernels.RowKernels))
    modules = StaticStep(other, EAGER)
    with torch.inference_mode():
        for t in range(9, 16):
            found = []
            for one, its in ((step, session), (modules, other)):
                one.token.copy_(ids[:, t : t + 1])
                found.append(one.logits(its).clone())
                one.advance(its)
            assert found[1].std() > 0.5
            torch.testing.assert_close(*found, atol=5e-4, rtol=5e-4)
