"""Products of 4-bit weights at 7B sizes: bitsandbytes' fused kernel beside bfloat16 ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_stage import Row, Stage

SECONDS = 60
SIZES = ((4096, 4096), (4096, 11008), (11008, 4096))
"""`(d_in, d_out)` of the linears of a 7B block."""
COPIES = 24
"""Matrices of one size that are gone through, so that none is in the cache when it is read."""


def run(stage: Stage) -> None:
    """Time the products, each matrix of a size in turn."""
    import torch

    from effbench.resources.roofline import probe

    device = "cpu" if stage.tiny else "cuda"
    dtype = torch.float32 if stage.tiny else torch.bfloat16
    most = stage.size(2**31, 2**20)
    ceilings = probe(device, dtype, working_set=most, most=most, side=stage.size(2048, 128))
    for sizes in ((128, 64),) if stage.tiny else SIZES:
        with stage.part("{} x {}".format(*sizes)), torch.inference_mode():
            _compare(stage, device, dtype, sizes, ceilings.bandwidth)


def _compare(
    stage: Stage, device: str, dtype: Any, sizes: tuple[int, int], bandwidth: float
) -> None:
    """Note how the fused product of one size compares with the dense one, and with the bytes."""
    import torch

    from effbench.nn.quant import nf4

    d_in, d_out = sizes
    draws = (torch.randn(d_out, d_in, device=device, dtype=dtype) for _ in range(COPIES))
    dense = list(draws)[: stage.size(COPIES, 2)]
    packed = [nf4.quantise(w) for w in dense]
    x = torch.randn(1, d_in, device=device, dtype=dtype)
    plain = _seconds(device, lambda: [torch.nn.functional.linear(x, w) for w in dense])
    fused = _seconds(device, lambda: [_product(x, p, (d_out, d_in)) for p in packed])
    what, read = f"{d_in} x {d_out}", len(dense) * nf4.nf4_bytes(d_in, d_out)
    stage.note(Row(f"{what}: times as fast as dense", plain / fused))
    stage.note(Row(f"{what}: share of the bytes/s ceiling", read / fused / bandwidth))
    read = sum(w.numel() * w.element_size() for w in dense)
    stage.note(Row(f"{what}: the same of the dense product", read / plain / bandwidth))


def _product(x: Any, packed: Any, shape: tuple[int, int]) -> Any:
    from effbench.nn.quant import nf4

    if x.is_cuda and nf4.bitsandbytes_available():
        return nf4.product_bitsandbytes(x, packed, shape)
    return x @ nf4.dequantise(packed, shape, x.dtype).T


def _seconds(device: str, work: Callable[[], object]) -> float:
    """Return the median seconds of a call, as a graph where there is a GPU."""
    import torch

    from effbench.resources.timing import Clock, steady

    clock, replayed = Clock(device), work
    if device == "cuda":
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replayed = graph.replay
    return steady([clock.seconds(replayed) for _ in range(12)], drop=2)[0]
