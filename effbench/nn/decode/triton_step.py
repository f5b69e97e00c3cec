"""Kernels of a decoding step of one sequence on a CUDA device, in Triton.

At batch 1 a step reads every weight once and computes next to nothing, so that what counts is how
evenly the weights stream in and how few kernels there are. Each kernel here reads weights where
they lie; several linears that read the same input are one launch, with the norm before them and
the gate after them inside it:

    project   hidden + added, its RMS norm, and up to three products of it
    gated     the same norm, and silu(gate x) * (up x)
    product   one product
    attend    rotary positions, the new key and value into the cache, and attention over it, cut
              along the context into parts that a second kernel puts together

Sums are in float32, and are rounded where the modules of the model round.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from effbench.nn.decode.cache import Placing, StaticLayer, Store
from effbench.nn.decode.pointwise import Normed, Pointwise, Products

ROWS, GATED_ROWS = 2, 2
"""Outputs that a program computes: of one linear, and of gate and up each."""
BLOCK_K, GATED_BLOCK_K = 2048, 1024
"""Inputs that it multiplies at once."""
WARPS = 8
"""Of a program. These read at 2.58 to 2.93 TB/s on an H100 80GB HBM3, whose sum over memory reads
at 3.08 and whose cuBLAS products at 2.0 to 2.6 (sizes of a 7B model)."""
BLOCK_T_BYTES = 128
"""Bytes of one column of the cached positions that a program looks at at once: 64 in bfloat16."""
PROGRAMS = 264
"""Programs that attention is cut into, at about two for each multiprocessor of a large device."""


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
    weight,
    bias,
    x,
    added,
    norm,
    scale,
    rows,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    hidden,
    added,
    norm,
    eps,
    summed,
    w0,
    b0,
    o0,
    N0,
    w1,
    b1,
    o1,
    N1,
    w2,
    b2,
    o2,
    N2,
    K: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write up to three products of the normed sum; program 0 writes the sum too."""
    program = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(N0, BLOCK_N), tl.cdiv(N1, BLOCK_N)
    scale = 1.0
    if HAS_NORM:
        scale = _norm_scale(hidden, added, K, HAS_ADDED, eps, 1024)
    if HAS_ADDED:  # noqa: SIM102 (known when the kernel is compiled)
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
        weight,
        bias,
        hidden,
        added,
        norm,
        scale,
        rows,
        N,
        K,
        HAS_BIAS,
        HAS_NORM,
        HAS_ADDED,
        BLOCK_N,
        BLOCK_K,
    )
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=rows < N)


@triton.jit
def _gated(
    hidden,
    added,
    norm,
    eps,
    summed,
    gate,
    gate_bias,
    up,
    up_bias,
    out,
    N,
    K: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write silu(gate x) * (up x) of the normed sum x; program 0 writes the sum too."""
    program = tl.program_id(0)
    kind = out.dtype.element_ty
    scale = _norm_scale(hidden, added, K, HAS_ADDED, eps, 1024)
    if HAS_ADDED:  # noqa: SIM102 (known when the kernel is compiled)
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


@triton.jit
def _turned(x, places, columns, mask, cos, sin, D: tl.constexpr):
    """Return rows of x at their rotary position, float32."""
    first = columns < D // 2
    partner = tl.where(first, columns + D // 2, columns - D // 2)
    value = tl.load(x + places + columns, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x + places + partner, mask=mask, other=0.0).to(tl.float32)
    inside = columns < D
    c = tl.load(cos + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + columns, mask=inside, other=0.0).to(tl.float32)
    return value * c + tl.where(first, -other, other) * s


@triton.jit
def _attend(
    q,
    k,
    v,
    cos,
    sin,
    keys,
    values,
    place,
    start,
    best,
    total,
    mixed,
    capacity,
    scaling,
    G: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Attend from the query heads of one key head to one part of the context.

    Writes the largest score, the sum of exponentials and the unnormed mix of the part; the part
    that holds the new position puts its key and value into the cache.
    """
    head, part = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(0)
    kind = keys.dtype.element_ty
    new, first = tl.load(place), tl.load(start)
    chunk = tl.cdiv(tl.cdiv(new + 1 - first, PARTS), BLOCK_T) * BLOCK_T
    low = first + part * chunk
    high = tl.minimum(low + chunk, new)
    groups, columns = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    there, inside = groups < G, columns < D
    both = there[:, None] & inside[None, :]
    query = _turned(q, (head * G + groups)[:, None] * D, columns[None, :], both, cos, sin, D)
    query = query.to(kind)
    largest = tl.full((BLOCK_G,), -float("inf"), tl.float32)
    summed = tl.zeros((BLOCK_G,), tl.float32)
    mix = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    base = head.to(tl.int64) * capacity * D
    for begin in range(low, high, BLOCK_T):
        rows = begin + tl.arange(0, BLOCK_T)
        seen = rows < high
        where = base + rows[:, None] * D + columns[None, :]
        mask = seen[:, None] & inside[None, :]
        block = tl.load(keys + where, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(block), input_precision="ieee") * scaling
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp(largest - higher)
        weights = tl.exp(scores - higher[:, None])
        summed = summed * shrink + tl.sum(weights, axis=1)
        block = tl.load(values + where, mask=mask, other=0.0)
        mix = mix * shrink[:, None] + tl.dot(weights.to(kind), block, input_precision="ieee")
        largest = higher
    if (low <= new) & (new < low + chunk):
        own = _turned(k, head * D, columns, inside, cos, sin, D).to(kind)
        value = tl.load(v + head * D + columns, mask=inside, other=0.0)
        tl.store(keys + base + new * D + columns, own, mask=inside)
        tl.store(values + base + new * D + columns, value, mask=inside)
        score = tl.sum(query.to(tl.float32) * own.to(tl.float32)[None, :], axis=1) * scaling
        higher = tl.maximum(largest, score)
        shrink, weight = tl.exp(largest - higher), tl.exp(score - higher)
        summed = summed * shrink + weight
        mix = mix * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
        largest = higher
    row = part * heads * G + head * G + groups
    tl.store(best + row, largest, mask=there)
    tl.store(total + row, summed, mask=there)
    tl.store(mixed + row[:, None] * D + columns[None, :], mix, mask=both)


@triton.jit
def _joined(
    best,
    total,
    mixed,
    out,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Put the parts of one query head together."""
    head, heads = tl.program_id(0), tl.num_programs(0)
    parts, columns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    there, inside = parts < PARTS, columns < D
    rows = parts * heads + head
    largest = tl.load(best + rows, mask=there, other=-float("inf"))
    share = tl.exp(largest - tl.max(largest, axis=0))
    summed = tl.sum(share * tl.load(total + rows, mask=there, other=0.0), axis=0)
    where = rows[:, None] * D + columns[None, :]
    mix = tl.load(mixed + where, mask=there[:, None] & inside[None, :], other=0.0)
    found = tl.sum(mix * share[:, None], axis=0) / summed
    tl.store(out + head * D + columns, found.to(out.dtype.element_ty), mask=inside)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    place: torch.Tensor,
    start: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Put the new key and value into the cache, and return what the new position attends to.

    Args:
        q: Of the new position, [1, 1, H D], not turned yet.
        k: Its keys, [1, 1, H_kv D], not turned yet.
        v: Its values, of the same shape.
        angles: Cosine and sine of its rotary position, D values each.
        cache: Keys and values, [1, H_kv, capacity, D] each.
        place: Where the new position goes, int64.
        start: The first position that it sees, int64.
        scaling: What scores are multiplied by.

    Returns:
        [1, 1, H D].
    """
    keys, values = cache
    _, kv_heads, capacity, width = keys.shape
    heads = q.numel() // width
    positions = BLOCK_T_BYTES // keys.element_size()
    parts = max(1, min(triton.cdiv(PROGRAMS, kv_heads), triton.cdiv(capacity, positions)))
    scores = torch.empty(2, parts, heads, dtype=torch.float32, device=q.device)
    mixed = torch.empty(parts, heads, width, dtype=torch.float32, device=q.device)
    out, block = torch.empty_like(q), triton.next_power_of_2(width)
    _attend[(kv_heads, parts)](
        q,
        k,
        v,
        *angles,
        keys,
        values,
        place,
        start,
        scores[0],
        scores[1],
        mixed,
        capacity,
        scaling,
        G=heads // kv_heads,
        D=width,
        PARTS=parts,
        BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK_D=max(16, block),
        BLOCK_T=positions,
        num_warps=4,
    )
    _joined[(heads,)](
        scores[0],
        scores[1],
        mixed,
        out,
        PARTS=parts,
        D=width,
        BLOCK_P=triton.next_power_of_2(parts),
        BLOCK_D=block,
        num_warps=4,
    )
    return out


def _block(inputs: int, most: int) -> int:
    """Return how many inputs a program multiplies at once: a power of two, at most `most`."""
    return min(most, triton.next_power_of_2(inputs))


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
    return _launched(norm, hidden, added, [(m.weight, m.bias) for m in linears])


def _launched(
    norm: Any,
    hidden: torch.Tensor,
    added: torch.Tensor | None,
    weights: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    outs = [hidden.new_empty(*hidden.shape[:-1], len(weight)) for weight, _ in weights]
    summed = hidden if added is None else torch.empty_like(hidden)
    first, bias = weights[0]
    lists = [(w, b, out, len(w)) for (w, b), out in zip(weights, outs, strict=True)]
    lists += [(first, bias, outs[0], 0)] * (3 - len(weights))
    _project[(sum(triton.cdiv(len(weight), ROWS) for weight, _ in weights),)](
        hidden,
        added,
        None if norm is None else norm.weight,
        0.0 if norm is None else norm.variance_epsilon,
        summed,
        *(value for one in lists for value in one),
        K=first.shape[1],
        HAS_ADDED=added is not None,
        HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None,
        BLOCK_N=ROWS,
        BLOCK_K=_block(first.shape[1], BLOCK_K),
        num_warps=WARPS,
    )
    return summed, outs


def gated(
    norm: Any, hidden: torch.Tensor, added: torch.Tensor | None, gate: Any, up: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden + added, and silu(gate x) * (up x) of its RMS norm x; see `project`."""
    out = hidden.new_empty(*hidden.shape[:-1], gate.out_features)
    summed = hidden if added is None else torch.empty_like(hidden)
    _gated[(triton.cdiv(gate.out_features, GATED_ROWS),)](
        hidden,
        added,
        norm.weight,
        norm.variance_epsilon,
        summed,
        gate.weight,
        gate.bias,
        up.weight,
        up.bias,
        out,
        gate.out_features,
        K=gate.in_features,
        HAS_ADDED=added is not None,
        HAS_BIAS=gate.bias is not None,
        BLOCK_N=GATED_ROWS,
        BLOCK_K=_block(gate.in_features, GATED_BLOCK_K),
        num_warps=WARPS,
    )
    return summed, out


def row_product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T, [1, d_out], of one row x [1, d_in] and a bare W [d_out, d_in]."""
    return _launched(None, x, None, [(weight, None)])[1][0]


def product(linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Return the product of one linear with x, [1, 1, d_in]."""
    return project(None, x.contiguous(), None, [linear])[1][0]


def _dense(*linears: Any) -> bool:
    """Whether all linears are plain; packed ones have kernels of their own, which they call."""
    return all(type(linear) is torch.nn.Linear for linear in linears)


class RowKernels(Pointwise):
    """A step of one row, made of these kernels; packed linears are called as modules."""

    def project(
        self, norm: Any, hidden: torch.Tensor, added: torch.Tensor | None, linears: Sequence[Any]
    ) -> Products:
        """See `Pointwise.project`; without linears there is only the sum."""
        if not linears:
            return hidden if added is None else hidden + added, []
        if not _dense(*linears):
            return super().project(norm, hidden, added, linears)
        return project(norm, hidden, added, linears)

    def gated(self, mlp: Any, hidden: torch.Tensor, added: torch.Tensor | None) -> Normed:
        """See `Pointwise.gated`."""
        if not _dense(mlp.gate, mlp.up):
            return super().gated(mlp, hidden, added)
        return gated(mlp.norm, hidden, added, mlp.gate, mlp.up)

    def product(self, linear: Any, x: torch.Tensor) -> torch.Tensor:
        """See `Pointwise.product`."""
        return product(linear, x) if _dense(linear) else super().product(linear, x)

    def attend(
        self,
        states: Sequence[torch.Tensor],
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: StaticLayer,
        store: Store,
        scaling: float,
    ) -> torch.Tensor | None:
        """See `Pointwise.attend`; None where the place is not known on the device."""
        if not isinstance(store, Placing):
            return None
        q, k, v = states
        place = store.place(cache)
        return attend(q, k, v, angles, cache.buffers, place, store.starts, scaling)
