"""NF4: 4-bit weights on the quantiles of a normal distribution, with doubly quantised scales.

    w ≈ NF4[code] · a,    a = D8[absmax] · absmax_scale + offset

A weight matrix is cut, row after row, into blocks of 64; a block is divided by its largest
magnitude a and each weight becomes the nearest of 16 levels. The a themselves, less their mean
`offset`, are stored in 8 bits with one float32 scale per 256 of them. For n weights:

    codes          [⌈n / 2⌉]      uint8, two codes per byte, the first in the high half
    absmax         [⌈n / 64⌉]     uint8
    absmax_scales  [⌈n / 16384⌉]  float32
    offset         []             float32

that is 0.5 + 1/64 + 4/16384 = 0.51587 bytes per weight and 4 bytes per matrix. The two code books
are constants of the format and count as nothing.

Sources: Dettmers et al., "QLoRA", NeurIPS 2023, arXiv 2305.14314 (levels of its appendix E); the
8-bit levels are those of Dettmers, arXiv 1511.04561. Byte order and numbers are bitsandbytes', so
that either can read what the other wrote, to the same bits. Rounding is always to the nearest
level; bitsandbytes' search on a CPU takes a neighbour for some of the 8-bit scales (0.15 % of them
on a Gaussian float32 matrix, up to 2 % where bfloat16 makes scales repeat).
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import NamedTuple

from effbench.nn.quant.packing import fill_up
from effbench.util.lazy import torch
from effbench.util.libraries import import_uncompiled

BLOCK = 64
"""Weights that share one scale."""
GROUP = 256
"""Scales that share one second-level scale."""
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
CHUNK_BLOCKS = 4096
"""Blocks expanded at a time on a CPU: 2^18 weights, so that the intermediates stay in cache."""


class NF4(NamedTuple):
    """The four stored tensors of one weight matrix."""

    codes: torch.Tensor
    absmax: torch.Tensor
    absmax_scales: torch.Tensor
    offset: torch.Tensor


def nf4_bytes(d_in: int, d_out: int) -> int:
    """Return the exact bytes of a [d_out, d_in] matrix: codes, both levels of scales, offset."""
    n = d_in * d_out
    return -(n // -2) - (n // -BLOCK) - 4 * (n // -(BLOCK * GROUP)) + 4


def empty(n: int, device: torch.device | None = None) -> NF4:
    """Return zeroed storage for n weights."""
    blocks = -(n // -BLOCK)
    return NF4(
        torch.zeros(-(n // -2), dtype=torch.uint8, device=device),
        torch.zeros(blocks, dtype=torch.uint8, device=device),
        torch.zeros(-(blocks // -GROUP), device=device),
        torch.zeros((), device=device),
    )


def quantise(weight: torch.Tensor) -> NF4:
    """Return `weight`, of any shape and floating dtype, as NF4."""
    flat = weight.detach().reshape(-1).float()
    blocks = _cut(flat, BLOCK)
    absmax = blocks.abs().amax(1)
    codes = _nearest(_unit(blocks, absmax), _levels(flat.device)).view(-1)
    codes = codes[: flat.numel() + flat.numel() % 2]

    offset = absmax.mean()
    groups = _cut(absmax - offset, GROUP)
    scales = groups.abs().amax(1)
    absmax_codes = _nearest(_unit(groups, scales), dynamic_levels(flat.device)).view(-1)
    absmax_codes = absmax_codes[: absmax.numel()].clone()
    return NF4(codes[0::2] << 4 | codes[1::2], absmax_codes, scales, offset)


def dequantise(stored: NF4, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the weights in plain PyTorch: one look-up per byte gives two weights.

    The product with the scale is made in float32 and rounded once, to `dtype`.
    """
    device = stored.codes.device
    absmax = restored_absmax(stored)[:, None]
    codes = fill_up(stored.codes, BLOCK // 2)
    pairs = _pairs(device)
    out = torch.empty(absmax.numel(), BLOCK, dtype=dtype, device=device)
    step = CHUNK_BLOCKS if device.type == "cpu" else max(1, absmax.numel())
    for start in range(0, absmax.numel(), step):
        index = codes[start * BLOCK // 2 : (start + step) * BLOCK // 2].int()
        values = pairs.index_select(0, index).view(torch.float32).view(-1, BLOCK)
        torch.mul(values, absmax[start : start + step], out=out[start : start + step])
    return out.view(-1)[: prod(shape)].view(shape)


def dequantise_bitsandbytes(
    stored: NF4, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return the same weights from bitsandbytes' compiled kernel, where it covers the case.

    Where a block spans two rows, its AVX512 kernel (0.50.2) takes wrong scales.
    """
    ragged = stored.codes.device.type == "cpu" and shape[-1] % BLOCK != 0
    if ragged or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return dequantise(stored, shape, dtype)
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        stored.codes, restored_absmax(stored), BLOCK, "nf4", shape, dtype
    )
    return weight


def product_bitsandbytes(x: torch.Tensor, stored: NF4, shape: tuple[int, int]) -> torch.Tensor:
    """Return x W^T from bitsandbytes' fused kernel, which never writes W to memory.

    Args:
        x: [..., d_in]; d_in must be a multiple of 64.
        stored: The packed W.
        shape: (d_out, d_in).

    Returns:
        [..., d_out] in the dtype of x.
    """
    out: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(
        x,
        stored.codes.view(-1, 1),
        shape,
        stored.absmax_scales,
        BLOCK,
        "nf4",
        absmax_8bit=stored.absmax,
        absmax_code=dynamic_levels(x.device),
        absmax_offset=stored.offset,
    )
    return out


@cache
def bitsandbytes_available() -> bool:
    """Return whether bitsandbytes imports; importing it registers its kernels with PyTorch."""
    try:
        import_uncompiled("bitsandbytes")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def restored_absmax(stored: NF4) -> torch.Tensor:
    """Return the scale of each block, [⌈n / 64⌉] float32."""
    codes = stored.absmax
    scales = stored.absmax_scales.repeat_interleave(GROUP)[: codes.numel()]
    return dynamic_levels(codes.device)[codes.int()] * scales + stored.offset


def _cut(flat: torch.Tensor, size: int) -> torch.Tensor:
    """Return [⌈n / size⌉, size], the end filled with zeros."""
    return fill_up(flat, size).view(-1, size)


def _unit(rows: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """Return rows divided by their largest magnitude; a row of zeros stays one."""
    return (rows * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of the ascending `levels`, uint8; ties go down."""
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values, middles, out_int32=True).to(torch.uint8)


@cache
def _levels(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor(LEVELS, dtype=torch.float32, device=device)


@cache
def _pairs(device: torch.device) -> torch.Tensor:
    """Return the two levels of each byte, [256], two float32 side by side in one int64."""
    with torch.inference_mode(False):
        levels, byte = _levels(device), torch.arange(256, device=device)
        pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
        return pairs.view(torch.int64).view(-1)


@cache
def dynamic_levels(device: torch.device) -> torch.Tensor:
    """Return the 256 ascending levels of signed dynamic 8-bit numbers, float32.

    Decade e of 0..6 has 2^e levels of each sign: the middles of equal parts of [0.1, 1] times
    10^(e - 6). Zero and one complete them.
    """
    with torch.inference_mode(False):
        levels = [0.0, 1.0]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
            middles = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
            levels += middles + [-m for m in middles]
        return torch.tensor(sorted(levels), dtype=torch.float32, device=device)
