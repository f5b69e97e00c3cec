"""What the machine can do at best, probed in this process, and shares of it.

The roofline of Williams, Waterman and Patterson (2009) has two ceilings: FLOP/s of matrix products,
and bytes/s of memory. Utilisation of the first is MFU (Chowdhery et al., PaLM, arXiv 2204.02311),
of the second MBU. Both count what a model has to do, from shapes, not what an implementation did:

    MFU = FLOPs / (seconds * FLOP/s ceiling)
    MBU = (weight bytes + key/value bytes) / (seconds * bytes/s ceiling)

A ceiling has to be one, so it is the best rate that was seen: of square products for the first, and
of matrix-vector products in several shapes, a copy and (on CUDA) a sum for the second. What is read
again and again lies in caches if it is small, so that the second is probed over as many bytes as
the model reads per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from effbench.resources.timing import Clock
from effbench.util.errors import UserError
from effbench.util.hardware import has_triton
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.cost import Cost
    from effbench.api.shape import AnyShape

SIDES = (512, 1024, 2048, 4096, 8192)
"""Widths of the square products, and of the matrices in matrix-vector products."""
MOST_MATRICES = 64
"""Most matrices of one width: narrower ones would measure how fast products can be started."""
SMALLEST = 2**20
"""Bytes of the smallest set of matrices that a probe goes through."""
CUDA_SIDE = 8192
"""Side of the largest square product on a CUDA device, which needs larger ones than a CPU."""


@dataclass(frozen=True)
class Ceilings:
    """The best rates that were seen on a machine, in one dtype."""

    gemm: float
    """Square matrix products, FLOP/s."""
    gemv: float
    """Matrix-vector products, bytes/s."""
    copy: float
    """A copy, bytes/s, read and written ones."""
    read: float = 0.0
    """A sum over memory, bytes/s; probed on CUDA devices, where a copy is slower than it."""

    @property
    def bandwidth(self) -> float:
        """Bytes/s of memory: the best that anything reached."""
        return max(self.gemv, self.copy, self.read)

    def best(self, other: Ceilings) -> Ceilings:
        """Return the higher one of each ceiling."""
        return Ceilings(
            max(self.gemm, other.gemm),
            max(self.gemv, other.gemv),
            max(self.copy, other.copy),
            max(self.read, other.read),
        )


def probe(
    device: Any,
    dtype: torch.dtype,
    *,
    working_set: float = 2**28,
    most: float = 2**28,
    side: int = 2048,
    repeats: int = 5,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Ceilings:
    """Return the ceilings of a device; takes a few seconds and `most` bytes of memory.

    Args:
        device: `cpu` or `cuda`.
        dtype: Of all matrices.
        working_set: Bytes that the model in question reads per token.
        most: Largest set of matrices that is gone through, in bytes.
        side: Of the largest square product on a CPU.
        repeats: Timed repeats of each; the first one besides warms up and is dropped.
        progress: Called with what is done, how many and of how many.
    """
    size = int(min(max(working_set, SMALLEST), most))
    clock = Clock(device)
    largest = CUDA_SIDE if str(device).startswith("cuda") and side >= SIDES[0] else side
    found = Ceilings(0.0, 0.0, 0.0)
    with torch.inference_mode():
        matrices = torch.full((size // dtype.itemsize,), 0.01, dtype=dtype, device=device)
        jobs = [
            lambda: {"gemm": _gemm(clock, device, dtype, largest, repeats)},
            *(
                lambda width=width: {"gemv": _gemv(clock, matrices, width, repeats)}
                for width in SIDES
                if 1 <= matrices.numel() // width**2 <= MOST_MATRICES
            ),
            lambda: {"copy": _copy(clock, matrices, repeats)},
        ]
        if matrices.is_cuda:
            jobs.append(lambda: {"read": _read(clock, matrices, repeats)})
        for number, job in enumerate(jobs, 1):
            found = found.best(replace(Ceilings(0.0, 0.0, 0.0), **job()))
            progress("roofline", number, len(jobs))
    return found


def _fastest(clock: Clock, work: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of `repeats` calls, after one that does not count."""
    work()
    return max(min(clock.seconds(work) for _ in range(repeats)), 1e-9)


def _gemm(clock: Clock, device: Any, dtype: torch.dtype, largest: int, repeats: int) -> float:
    rates = []
    for side in {largest, max(1, largest // 2)}:
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        seconds = _fastest(clock, lambda a=a, b=b: a @ b, repeats)  # type: ignore[misc]
        rates.append(2 * side**3 / seconds)
    return max(rates)


def _gemv(clock: Clock, matrices: torch.Tensor, width: int, repeats: int) -> float:
    """Return the rate at which matrices of one width are multiplied by a vector, one by one."""
    count = matrices.numel() // (width * width)
    used = matrices[: count * width * width].view(count, width, width)
    x = torch.ones(width, dtype=matrices.dtype, device=matrices.device)
    seconds = min(
        _fastest(clock, lambda way=way: [way(w, x) for w in used], repeats)  # type: ignore[misc]
        for way in _ways(matrices)
    )
    return used.numel() * used.element_size() / seconds


def _ways(like: torch.Tensor) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Return the matrix-vector products that there are: torch's and ours."""
    from effbench.nn.decode import native

    ways: list[Any] = [lambda w, x: torch.nn.functional.linear(x[None], w)]
    kernels = native.kernels() if like.device.type == "cpu" else None
    if kernels is not None and str(like.dtype) in native.SUFFIXES:
        ways.append(kernels.gemv)
    if like.is_cuda and has_triton():
        from effbench.nn.decode import triton_step

        ways.append(lambda w, x: triton_step.row_product(w, x[None]))
    return ways


def _copy(clock: Clock, matrices: torch.Tensor, repeats: int) -> float:
    half = matrices.numel() // 2
    source, target = matrices[:half], matrices[half : 2 * half]
    seconds = _fastest(clock, lambda: target.copy_(source), repeats)
    return 2 * half * matrices.element_size() / seconds


def _read(clock: Clock, matrices: torch.Tensor, repeats: int) -> float:
    whole = matrices[: matrices.numel() // 8 * 8].view(torch.int64)
    seconds = _fastest(clock, whole.sum, repeats)
    return whole.numel() * 8 / seconds


# -- what has to be done -----------------------------------------------------------------------


def prefill_flops(cost: Cost, shape: AnyShape, batch: int, prompt: int) -> float:
    """Return the FLOPs of reading prompts: causal attention, the head at the last position only.

    Layers that need that position alone count with it alone.
    """
    head = 2 * shape.head_products
    first = shape.num_layers - shape.tail
    upper = sum(i * o for layer, _, i, o in shape.linears() if layer >= first)
    # Whatever lies beside the linears, as adapters do, is taken to be spread as they are.
    share = upper / max(1, shape.linear_params)
    layers = (cost.flops_per_token - head) * (prompt * (1 - share) + share)
    pairs = prompt * (prompt + 1) // 2
    heads = sum(x.size.num_heads for x in shape.layers)
    skipped = sum(x.size.num_heads for x in shape.layers[first:]) / max(1, heads)
    attention = _attention_flops(shape) * (pairs * (1 - skipped) + prompt * skipped)
    return batch * (layers + head + attention)


def decode_flops(cost: Cost, batch: int, prompt: int, tokens: int) -> float:
    """Return the FLOPs of `tokens` steps after prompts of `prompt` positions.

    Each attends to what its layers keep of all positions so far, the new one included.
    """
    attention = sum(cost.attention(prompt + t, prompt) for t in range(1, tokens + 1))
    return batch * (tokens * cost.flops_per_token + attention)


def decode_bytes(cost: Cost, batch: int, prompt: int, tokens: int) -> float:
    """Return the bytes that `tokens` steps have to read: all weights each, and the cache so far.

    States are read and written. The rows of the embedding and all activations are left out.
    """
    read = sum(cost.cached(prompt + t, batch, prompt) for t in range(1, tokens + 1))
    written = batch * tokens * cost.kv_bytes_per_sequence
    return tokens * cost.bytes_per_token + read + written


def _attention_flops(shape: AnyShape) -> int:
    """Return the FLOPs of attending from one position to one other, over all layers."""
    return shape.flops_per_token(1) - shape.flops_per_token(0)


def share(what: str, done: float, seconds: float, ceiling: float, source: str) -> float:
    """Return `done / (seconds * ceiling)`, which cannot be above 1.

    Args:
        what: Name of the share, for the message.
        done: FLOPs or bytes.
        seconds: The time they took.
        ceiling: The most per second.
        source: Where the ceiling is from, `probed` or `stated`.

    Raises:
        UserError: When it is above 1: a ceiling or an account is wrong.
    """
    found = done / (seconds * ceiling)
    if found <= 1.0:
        return found
    advice = {
        "stated": "Set hardware.tflops and hardware.bandwidth_gbs to what the device really has.",
        "probed": "Something else used the machine while it was probed, or the model reads less "
        "than its cost states: run it again on an idle machine, and report it if it stays so.",
    }
    raise UserError(
        f"{what} of {found:.1%} of the {source} ceiling cannot be: {done / seconds:.3g} of "
        f"{ceiling:.3g} per second.",
        advice[source],
    )
