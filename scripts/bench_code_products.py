"""Products of weights as codes beside those of dense bfloat16 weights, one vector, on a CPU.

Codes and scales are drawn by lot: the time of a product does not depend on them. Formats take
turns; times are relative to bfloat16 of the same round, median of the rounds [least, most].
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

from effbench.nn.decode import native, native_step
from effbench.nn.quant import linears, nested_linear, plane_linears, shifted_linear

FORMATS = (
    *(f"codes {bits} 128" for bits in (2, 3, 4, 5, 6, 8)),
    "shifted 4 64",
    "nf4",
    "trits 2 128",
    *(f"signs {bits} 128" for bits in (2, 3, 4, 6)),
    *(f"nested {bits}" for bits in (3, 4, 5, 6, 8)),
)


def layer(name: str, rows: int, columns: int) -> linears.QuantisedLinear:
    """Return a layer of a format with codes and scales by lot."""
    linear = torch.nn.Linear(columns, rows, bias=False, device="meta")
    kind, *sizes = name.split()
    first, second = (*map(int, sizes), 0, 0)[:2]
    made: linears.QuantisedLinear
    if kind == "codes":
        made = linears.PackedLinear.empty(linear, first, second)
    elif kind == "shifted":
        made = shifted_linear.ShiftedLinear.empty(linear, first, second)
    elif kind == "nf4":
        made = linears.NF4Linear.empty(linear)
    elif kind == "trits":
        made = plane_linears.TritLinear.empty(linear, first, second)
    elif kind == "signs":
        made = plane_linears.BinaryLinear.empty(linear, first, second)
    else:
        made = nested_linear.NestedLinear.empty(linear, 3, 8)
    made = made.to_empty(device="cpu")
    for buffer in made.buffers():
        buffer.random_(0, 256) if buffer.dtype == torch.uint8 else buffer.fill_(0.01)
    if isinstance(made, nested_linear.NestedLinear):
        made.use(first)
    return made


def seconds(kernels: native.Kernels, linear: torch.nn.Linear, x: torch.Tensor) -> float:
    """Return the time of a product, after one that is not timed."""
    native_step.product(kernels, linear, x)
    start = time.perf_counter()
    for _ in range(4):
        native_step.product(kernels, linear, x)
    return (time.perf_counter() - start) / 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["49152x576", "8192x4096"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    kernels = native.kernels()
    if kernels is None:
        raise SystemExit(native.why_not())
    print(f"time / time of bfloat16, {given.threads} threads, {given.rounds} rounds")
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        dense = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
        layers: dict[str, torch.nn.Linear] = {name: layer(name, rows, columns) for name in FORMATS}
        layers["float32"] = torch.nn.Linear(columns, rows, bias=False)
        x = torch.randn(1, columns).bfloat16()
        ratios: dict[str, list[float]] = {name: [] for name in layers}
        for _ in range(given.rounds):
            base = seconds(kernels, dense, x)
            for name, linear in layers.items():
                own = x.float() if name == "float32" else x
                ratios[name].append(seconds(kernels, linear, own) / base)
        for name, found in ratios.items():
            print(f"{shape}  {name:12s} {median(found):.2f} [{min(found):.2f}, {max(found):.2f}]")


if __name__ == "__main__":
    main()
