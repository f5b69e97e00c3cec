"""Kernels of a decoding step of one sequence on a CUDA device, in Triton.

At batch 1 a step reads every weight once and computes next to nothing, so that what counts is how
evenly the weights stream in and how few kernels there are. Each kernel here reads weights where
they lie; several linears that read the same input are one launch, with the norm before them and
the gate after them inside it:

    project   hidden + added, its RMS norm, and up to three products of it
    gated     the same norm, and silu(gate x) * (up x)
    product   one product

Sums are in float32, and are rounded where the modules of the model round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_K = 512
"""Inputs that a program multiplies at once."""
WARPS = 4
"""Of a program."""


@triton.jit
def _sum(hidden, added, columns, inside, HAS_ADDED: tl.constexpr):
    """Return hidden + added at some columns, rounded as the residual stream is."""
    value = tl.load(hidden + columns, mask=inside, other=0.0)
    if HAS_ADDED:
        more = tl.load(added + columns, mask=inside, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + more).to(value.dtype)
    return value


@triton.jit
def _normed(value, norm, scale, columns, inside):
    """Return the norm of what `_sum` gave, rounded twice, as the module rounds."""
    weight = tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    normed = (value.to(tl.float32) * scale).to(value.dtype)
    return (normed.to(tl.float32) * weight).to(value.dtype)


@triton.jit
def _write_sum(hidden, added, summed, K: tl.constexpr, BLOCK: tl.constexpr):
    """Write hidden + added, [K]."""
    for start in range(0, K, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < K
        tl.store(summed + columns, _sum(hidden, added, columns, inside, True), mask=inside)


@triton.jit
def _norm_scale(hidden, added, D: tl.constexpr, HAS_ADDED: tl.constexpr, eps, BLOCK: tl.constexpr):
    """Return 1 / rms of hidden + added, [D], rounded as their sum is."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, D, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < D
        wide = _sum(hidden, added, columns, inside, HAS_ADDED).to(tl.float32)
        total += wide * wide
    return tl.rsqrt(tl.sum(total, axis=0) / D + eps)


@triton.jit
def _dot(
    weight, bias, x, added, norm, scale, rows, N,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Return the products of some rows of W [N, K] with the (normed) input, float32."""
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    there = rows < N
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < K
        places = rows.to(tl.int64)[:, None] * K + columns[None, :]
        mask = there[:, None] & inside[None, :]
        w = tl.load(weight + places, mask=mask, other=0.0, eviction_policy="evict_first")
        value = _sum(x, added, columns, inside, HAS_ADDED)
        if HAS_NORM:
            value = _normed(value, norm, scale, columns, inside)
        total += w.to(tl.float32) * value.to(tl.float32)[None, :]
    found = tl.sum(total, axis=1)
    if HAS_BIAS:
        found += tl.load(bias + rows, mask=there, other=0.0).to(tl.float32)
    return found


@triton.jit
def _project(
    hidden, added, norm, eps, summed,
    w0, b0, o0, N0, w1, b1, o1, N1, w2, b2, o2, N2,
    K: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Write up to three products of the normed sum; program 0 writes the sum too."""
    program = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    scale = 1.0
    if HAS_NORM:
        scale = _norm_scale(hidden, added, K, HAS_ADDED, eps, 1024)
    if HAS_ADDED:
        if program == 0:
            _write_sum(hidden, added, summed, K, BLOCK_K)
    weight, bias, out, N = w0, b0, o0, N0
    block = program
    if program >= blocks0 + blocks1:
        weight, bias, out, N = w2, b2, o2, N2
        block = program - blocks0 - blocks1
    elif program >= blocks0:
        weight, bias, out, N = w1, b1, o1, N1
        block = program - blocks0
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    found = _dot(
        weight, bias, hidden, added, norm, scale, rows, N,
        K, HAS_BIAS, HAS_NORM, HAS_ADDED, BLOCK_N, BLOCK_K,
    )
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def _gated(
    hidden, added, norm, eps, summed, gate, gate_bias, up, up_bias, out, N,
    K: tl.constexpr, HAS_ADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Write silu(gate x) * (up x) of the normed sum x; program 0 writes the sum too."""
    program = tl.program_id(0)
    kind = out.dtype.element_ty
    scale = _norm_scale(hidden, added, K, HAS_ADDED, eps, 1024)
    if HAS_ADDED:
        if program == 0:
            _write_sum(hidden, added, summed, K, BLOCK_K)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    there = rows < N
    gates = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    ups = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        inside = columns < K
        places = rows.to(tl.int64)[:, None] * K + columns[None, :]
        mask = there[:, None] & inside[None, :]
        g = tl.load(gate + places, mask=mask, other=0.0, eviction_policy="evict_first")
        u = tl.load(up + places, mask=mask, other=0.0, eviction_policy="evict_first")
        value = _sum(hidden, added, columns, inside, HAS_ADDED)
        x = _normed(value, norm, scale, columns, inside).to(tl.float32)[None, :]
        gates += g.to(tl.float32) * x
        ups += u.to(tl.float32) * x
    found_gate, found_up = tl.sum(gates, axis=1), tl.sum(ups, axis=1)
    if HAS_BIAS:
        found_gate += tl.load(gate_bias + rows, mask=there, other=0.0).to(tl.float32)
        found_up += tl.load(up_bias + rows, mask=there, other=0.0).to(tl.float32)
    g = found_gate.to(kind).to(tl.float32)
    u = found_up.to(kind).to(tl.float32)
    tl.store(out + rows, (g / (1.0 + tl.exp(-g)) * u).to(kind), mask=there)


def _rows(outputs: int) -> int:
    """Return how many outputs a program computes, so that there are programs enough."""
    return 8 if outputs >= 8192 else 4


def project(
    norm: Any,
    hidden: torch.Tensor,
    added: torch.Tensor | None,
    linears: Sequence[torch.nn.Linear],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return hidden + added, and the product of its RMS norm with each linear.

    Args:
        norm: An RMS norm's module; None leaves the norm out.
        hidden: The residual stream, [1, 1, d], contiguous.
        added: What the block before adds to it, of the same shape, or None.
        linears: One to three, all with a bias or none.
    """
    shape = (*hidden.shape[:-1], -1)
    outs = [hidden.new_empty(m.out_features) for m in linears]
    summed = hidden if added is None else torch.empty_like(hidden)
    weights = [(m.weight, m.bias, out, m.out_features) for m, out in zip(linears, outs, strict=True)]
    weights += [(linears[0].weight, linears[0].bias, outs[0], 0)] * (3 - len(linears))
    width = _rows(sum(m.out_features for m in linears))
    grid = (sum(triton.cdiv(m.out_features, width) for m in linears),)
    _project[grid](
        hidden, added, None if norm is None else norm.weight,
        0.0 if norm is None else norm.variance_epsilon, summed,
        *(value for one in weights for value in one),
        K=linears[0].in_features,
        HAS_ADDED=added is not None,
        HAS_NORM=norm is not None,
        HAS_BIAS=linears[0].bias is not None,
        BLOCK_N=width, BLOCK_K=BLOCK_K, num_warps=WARPS,
    )
    return summed, [out.view(shape) for out in outs]


def gated(
    norm: Any, hidden: torch.Tensor, added: torch.Tensor | None, gate: Any, up: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + added, and silu(gate x) * (up x) of its RMS norm x; see `project`."""
    out = hidden.new_empty(*hidden.shape[:-1], gate.out_features)
    summed = hidden if added is None else torch.empty_like(hidden)
    width = _rows(2 * gate.out_features) // 2
    _gated[(triton.cdiv(gate.out_features, width),)](
        hidden, added, norm.weight, norm.variance_epsilon, summed,
        gate.weight, gate.bias, up.weight, up.bias, out, gate.out_features,
        K=gate.in_features,
        HAS_ADDED=added is not None,
        HAS_BIAS=gate.bias is not None,
        BLOCK_N=width, BLOCK_K=BLOCK_K, num_warps=WARPS,
    )
    return summed, out


def product(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return the product of one linear with x, [1, 1, d_in]."""
    return project(None, x.contiguous(), None, [linear])[1][0]
