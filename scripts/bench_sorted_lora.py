"""Decode speed of depths, of early exit and of self-speculation, beside what it can be at most.

Words of the command line override the config. Without any the base model is read out, whose exits
nobody has trained: they are hardly ever right, and early exit and speculation cannot gain. With
`from=RUN` a run of `sorted_lora`, `sorted_full` or `exit_heads` is, its adapters merged into plain
weights; `run.results=FOLDER` says where it is.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from effbench.api.cost import cost_of
from effbench.api.points import Point
from effbench.api.session import Session
from effbench.api.shape import AnyShape, ModelShape
from effbench.config.compose import compose
from effbench.methods.depth.points import Depth, Mixed
from effbench.nn.adapters.merge import merged
from effbench.nn.decode.session import CachedSession, greedy
from effbench.resources.timing import interleaved
from effbench.results.store import RunFolder, Store
from effbench.runner.open import Opened, open_data, open_model
from effbench.runner.run import Run, open_run

DEPTHS = (18, 21, 24, 27, 30)
POINTS = [
    f"method.eval_depths=[{','.join(map(str, DEPTHS))}]",
    "method.decoding=[exit,speculative]",
]
PROMPTS, PROMPT, NEW, PAIRS = 2, 48, 32, 6
FULL = Depth(DEPTHS[-1])

Decode = Callable[[], list[torch.Tensor]]


def opened(words: list[str], scratch: str) -> tuple[Run, Opened]:
    """Return the run that the words compose, and what it evaluates."""
    method = [] if any(w.startswith(("from=", "method=")) for w in words) else ["method=depths"]
    job = compose("eval", [*method, *POINTS, "run.progress=false", *words])
    run = open_run(job, RunFolder(Path(scratch)), Store(Path(job.runtime.results)))
    opened = open_model(run)
    opened.model.eval().requires_grad_(False)
    return run, opened


class Points:
    """Decodes the same prompts at every operating point."""

    def __init__(self, run: Run, opened: Opened) -> None:
        self.method: Any = opened.method
        self.model: Any = opened.model
        examples = open_data(run).examples("test")[:PROMPTS]
        self.prompts = [torch.tensor([e.ids[:PROMPT]]) for e in examples]

    def at(self, point: Point, eager: bool = False) -> Decode:
        """Return what decodes all prompts at a point, in the method's way or by forward passes."""

        def decode() -> list[torch.Tensor]:
            with self.method.at(self.model, point):
                return [greedy(self.session(point, eager), p, NEW) for p in self.prompts]

        return decode

    def session(self, point: Point, eager: bool) -> Session:
        """Return a fresh session."""
        return CachedSession(self.model) if eager else self.method.session(self.model, point)

    def counts(self, way: Mixed) -> str:
        """Return what sessions counted, each a mean over the prompts."""
        found: list[dict[str, float]] = []
        with self.method.at(self.model, way):
            for prompt in self.prompts:
                session: Any = self.session(way, False)
                greedy(session, prompt, NEW)
                found.append(session.counts())
        means = {key: sum(f[key] for f in found) / len(found) for key in found[0]}
        return ", ".join(f"{key} {value:.2f}" for key, value in means.items())


def ratio(a: Decode, b: Decode) -> str:
    """Return how much faster `a` is than `b`, timed in turn, with its interval."""
    found = interleaved(a, b, PAIRS).speedup
    return f"{found.value:.2f}x [{found.low:.2f}, {found.high:.2f}]"


def ceiling(shape: AnyShape, depth: int, dtype: str) -> float:
    """Return the bytes that all layers read for a token over those that `depth` layers read."""
    cut = ModelShape.of(shape).only(range(depth))
    return cost_of(shape, dtype).bytes_per_token / cost_of(cut, dtype).bytes_per_token


def depths(points: Points, shape: AnyShape, dtype: str) -> None:
    """Print the speed of each depth against all layers, in our engine."""
    full = points.at(FULL)
    print(f"our engine at all layers: {ratio(full, points.at(FULL, eager=True))} of forward passes")
    for n in DEPTHS[:-1]:
        print(
            f"depth {n}: {ratio(points.at(Depth(n)), full)} of all layers, "
            f"ceiling {ceiling(shape, n, dtype):.2f}x by bytes read",
            flush=True,
        )


def ways(points: Points) -> None:
    """Print the speed of early exit and speculation beside both ways to decode all layers."""
    for way in (Mixed("exit"), Mixed("speculative")):
        eager = ratio(points.at(way), points.at(FULL, eager=True))
        ours = ratio(points.at(way), points.at(FULL))
        print(f"{way}: {eager} of forward passes, {ours} of our engine at all layers")
        print(f"  {points.counts(way)}", flush=True)


def lossless(points: Points) -> bool:
    """Print and return whether speculation in float32 gives the full model's tokens, one by one."""
    points.model.float()
    expected, found = (points.at(p)() for p in (FULL, Mixed("speculative")))
    same = sum(int((a == b).sum()) for a, b in zip(expected, found, strict=True))
    total = len(points.prompts) * NEW
    print(f"speculative, float32: {same} of {total} tokens are the full model's")
    return same == total


@torch.inference_mode()
def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        run, found = opened(sys.argv[1:], scratch)
        shape = run.lineage.left(found.base)
        with merged(found.model) as linears:
            print(f"{run.spec.label}, {run.spec.hardware.dtype}: {linears} adapters merged")
            points = Points(run, found)
            depths(points, shape, run.spec.hardware.dtype)
            ways(points)
            return 0 if lossless(points) else 1


if __name__ == "__main__":
    sys.exit(main())
