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

    from effbench.kernels import nf4
    from effbench.measure.roofline import probe

    device = "cpu" if stage.tiny else "cuda"
    dtype = torch.float32 if stage.tiny else torch.bfloat16
    most = stage.size(2**31, 2**20)
    ceilings = probe(device, dtype, working_set=most, most=most, side=stage.size(2048, 128))
    for d_in, d_out in SIZES if not stage.tiny else ((128, 64),):
        with stage.part(f"{d_in} x {d_out}"), torch.inference_mode():
            copies = range(stage.size(COPIES, 2))
            dense = [torch.randn(d_out, d_in, device=device, dtype=dtype) for _ in copies]
            packed = [nf4.quantise(w) for w in dense]
            x = torch.randn(1, d_in, device=device, dtype=dtype)
            plain = _seconds(device, lambda: [torch.nn.functional.linear(x, w) for w in dense])
            fused = _seconds(device, lambda: [_product(x, p, (d_out, d_in)) for p in packed])
            read = len(dense) * nf4.nf4_bytes(d_in, d_out)
            sizes = f"{d_in} x {d_out}"
            stage.note(Row(f"{sizes}: times as fast as dense", plain / fused))
            share = read / fused / ceilings.bandwidth
            stage.note(Row(f"{sizes}: share of the bytes/s ceiling", share))
            dense_read = sum(w.numel() * w.element_size() for w in dense)
            share = dense_read / plain / ceilings.bandwidth
            stage.note(Row(f"{sizes}: the same of the dense product", share))


def _product(x: Any, packed: Any, shape: tuple[int, int]) -> Any:
    from effbench.kernels import nf4

    if x.is_cuda:
        return nf4.product_bitsandbytes(x, packed, shape)
    return x @ nf4.dequantise(packed, shape, x.dtype).T


def _seconds(device: str, work: Callable[[], object]) -> float:
    """Return the median seconds of a call, as a graph where there is a GPU."""
    import torch

    from effbench.measure.timing import Clock, steady

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
