"""The products of linear attention on a CUDA device, in Triton: in stretches, or token by token.

`chunked` and `step` are those of `products`, in float32 and without a gradient. A tile of a state
needs some columns of the keys and of the values alone. So one kernel goes through the stretches for
each tile and writes what it is before each of them, and another makes the outputs of all stretches
side by side; between them lie d / 64 times the bytes of the keys. Their products are three of
TensorFloat-32 each, which is float32 but for its last bits.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from effbench.api.recurrent import CHUNK
from effbench.nn.linear_attention.products import decays

INNER, COLUMNS = 32, 64
"""Of a tile of a state: columns of the keys and of the values."""
STEP_COLUMNS = 32
"""Columns of a state that a program steps: at 32 heads of width 128, 128 programs a sequence."""
WARPS, STAGES = 4, 2
"""Of a program. With these no kernel spills registers on an H100 or H200 at widths of 64 and 128,
and with a larger tile one does."""


@triton.jit
def _step(
    q,
    k,
    v,
    gamma,
    state,
    out,
    G,
    R: tl.constexpr,
    D: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Step some columns of one state in place, and write what its R queries read of them."""
    own = tl.program_id(0)
    inner, columns = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    there, inside = inner < D, columns < D
    both = there[:, None] & inside[None, :]
    place = state + own.to(tl.int64) * D * D + inner[:, None] * D + columns[None, :]
    key = tl.load(k + own * D + inner, mask=there, other=0.0)
    value = tl.load(v + own * D + columns, mask=inside, other=0.0)
    now = key[:, None] * value[None, :]
    if HAS_STATE:
        now += tl.load(gamma + own % G) * tl.load(place, mask=both, other=0.0)
    tl.store(place, now, mask=both)
    for r in tl.static_range(R):
        query = tl.load(q + (own * R + r) * D + inner, mask=there, other=0.0)
        found = tl.sum(query[:, None] * now, axis=0)
        tl.store(out + (own * R + r) * D + columns, found, mask=inside)


@triton.jit
def _states(
    k,
    v,
    gamma,
    fading,
    before,
    between,
    after,
    T,
    G,
    V_ROW,
    V_GROUP,
    V_AT,
    D: tl.constexpr,
    C: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write a tile of one state before each stretch, `between` [B, G, N, D, D], and after all."""
    own = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    there, inside, steps = inner < D, columns < D, tl.arange(0, C)
    both = there[:, None] & inside[None, :]
    place = inner[:, None] * D + columns[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if HAS_STATE:
        state = tl.load(before + own * D * D + place, mask=both, other=0.0)
    rate = tl.load(gamma + own % G)
    fading += own % G * C * C
    k += own * T * D
    v += own // G * V_ROW + own % G * V_GROUP
    between += own * tl.cdiv(T, C) * D * D
    for start in range(0, T, C):
        tl.store(between + place, state, mask=both)
        between += D * D
        at = start + steps
        read, row = at < T, at.to(tl.int64)
        mask = there[:, None] & read[None, :]
        keys = tl.load(k + row[None, :] * D + inner[:, None], mask=mask, other=0.0)
        mask = read[:, None] & inside[None, :]
        values = tl.load(v + row[:, None] * V_AT + columns[None, :], mask=mask, other=0.0)
        last = fading + (tl.minimum(C, T - start) - 1) * C
        left = tl.load(last + steps)  # gamma^(length - 1 - m), and 0 behind the end
        state *= rate * tl.load(last)
        state += tl.dot(keys * left[None, :], values, input_precision="tf32x3")
    if not ENDS:
        tl.store(after + own * D * D + place, state, mask=both)


@triton.jit
def _outputs(
    q,
    k,
    v,
    gamma,
    fading,
    between,
    out,
    T,
    G,
    V_ROW,
    V_GROUP,
    V_AT,
    R: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write some columns of what one query head reads in one stretch, to `out` [B, T, G, R, D]."""
    head, stretch = tl.program_id(0).to(tl.int64), tl.program_id(1)
    own, heads = head // R, G * R
    columns, steps = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V), tl.arange(0, C)
    at = stretch * C + steps
    read, inside, row = at < T, columns < D, at.to(tl.int64)
    q += head * T * D
    k += own * T * D
    v += own // G * V_ROW + own % G * V_GROUP
    between += (own * tl.num_programs(1) + stretch) * D * D
    scores = tl.zeros((C, C), dtype=tl.float32)
    found = tl.zeros((C, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        there = inner < D
        mask = read[:, None] & there[None, :]
        queries = tl.load(q + row[:, None] * D + inner[None, :], mask=mask, other=0.0)
        mask = there[:, None] & read[None, :]
        keys = tl.load(k + row[None, :] * D + inner[:, None], mask=mask, other=0.0)
        mask = there[:, None] & inside[None, :]
        state = tl.load(between + inner[:, None] * D + columns[None, :], mask=mask, other=0.0)
        scores += tl.dot(queries, keys, input_precision="tf32x3")
        found += tl.dot(queries, state, input_precision="tf32x3")
    fading += own % G * C * C
    found *= (tl.load(gamma + own % G) * tl.load(fading + steps * C))[:, None]
    scores *= tl.load(fading + steps[:, None] * C + steps[None, :])
    mask = read[:, None] & inside[None, :]
    values = tl.load(v + row[:, None] * V_AT + columns[None, :], mask=mask, other=0.0)
    found += tl.dot(scores, values, input_precision="tf32x3")
    place = out + (head // heads * T + row)[:, None] * heads * D + head % heads * D
    tl.store(place + columns[None, :], found, mask=mask)


def chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor | None = None,
    ends: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return y and the state S after it; see `products.chunked`."""
    rows, groups, heads, length, width = q.shape
    stretches, across = triton.cdiv(length, CHUNK), triton.cdiv(width, COLUMNS)
    between = k.new_empty(rows, groups, stretches, width, width)
    after = None if ends else k.new_empty(rows, groups, width, width)
    out = q.new_empty(rows, length, groups, heads, width)
    q, k, gamma = q.contiguous(), k.contiguous(), gamma.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    before = None if state is None else state.contiguous()
    fading = decays(gamma, CHUNK)
    tiles = {"BLOCK_K": INNER, "BLOCK_V": COLUMNS, "num_warps": WARPS, "num_stages": STAGES}
    _states[(rows * groups, triton.cdiv(width, INNER), across)](
        *(k, v, gamma, fading, before, between, after, length, groups, *v.stride()[:3]),
        D=width,
        C=CHUNK,
        HAS_STATE=state is not None,
        ENDS=ends,
        **tiles,
    )
    _outputs[(rows * groups * heads, stretches, across)](
        *(q, k, v, gamma, fading, between, out, length, groups, *v.stride()[:3]),
        R=heads,
        D=width,
        C=CHUNK,
        **tiles,
    )
    return out.permute(0, 2, 3, 1, 4), after


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gamma: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y of one position and the state after it, which is written where it was.

    See `products.step`.
    """
    rows, groups, heads, _, width = q.shape
    now = k.new_empty(rows, groups, width, width) if state is None else state.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    q, k, v, gamma = (t.contiguous() for t in (q, k, v, gamma))
    _step[(rows * groups, triton.cdiv(width, STEP_COLUMNS))](
        *(q, k, v, gamma, now, out, groups),
        R=heads,
        D=width,
        HAS_STATE=state is not None,
        BLOCK_D=triton.next_power_of_2(width),
        BLOCK_V=STEP_COLUMNS,
        num_warps=WARPS,
    )
    return out, now
