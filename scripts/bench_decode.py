"""Our decode engine against transformers' `generate`, batch 1, in turn in one process.

On a CPU it is the default model in bfloat16 (where that is native) and float32, greedy, and both
have to give the same tokens unless two were as likely as the dtype can tell. With `--shape NAME` it
is a shape with random weights; on a CUDA device that is how the share of the memory bandwidth is
checked: `python scripts/bench_decode.py --device cuda --shape llama2-7b`.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import Any

import torch

from effbench.api.cost import cost_of
from effbench.config.compose import compose
from effbench.evaluators.requests import Times, timed_generate, timed_session
from effbench.models import load as models
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.walk import why_not
from effbench.resources.roofline import Ceilings, decode_bytes, probe
from effbench.resources.timing import Clock, interleaved
from effbench.util.hardware import default_device, default_dtype

SPEEDUP = 1.5
"""What the engine has to reach on a CPU."""
MBU = 0.75
"""What it has to reach on a CUDA device."""
PROMPT = "The history of the Roman empire began when"
NEAR_TIE = 0.05
"""Gap of two logits, as a share of their spread, below which bfloat16 may choose either."""


@torch.inference_mode()
def agreement(model: Any, ids: torch.Tensor, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Say whether both gave the same tokens, and if not, how near a tie the first other one was."""
    differ = (ours != theirs)[0].nonzero()
    if not len(differ):
        return f"the same {ours.shape[1]} tokens"
    first = int(differ[0])
    logits = model(torch.cat([ids, theirs[:, :first]], dim=1), logits_to_keep=1).logits[0, -1]
    gap = float((logits[ours[0, first]] - logits[theirs[0, first]]).abs() / logits.float().std())
    kind = "a near tie" if gap < NEAR_TIE else "NOT a tie"
    return f"the same {first} tokens, then {kind} (two logits {gap:.3f} of their spread apart)"


def bench(words: list[str], dtype: str, device: str, new: int, pairs: int) -> bool:
    """Print one dtype's comparison; return whether the goal is reached."""
    spec = compose("eval", words).spec.model
    loaded = models.load(spec, device=device, dtype=getattr(torch, dtype))
    model: Any = loaded.model.requires_grad_(False)
    cost = cost_of(loaded.shape, dtype)
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    done: dict[str, list[Times]] = {"engine": [], "generate": []}

    def engine() -> None:
        done["engine"].append(timed_session(session_for(model), ids, new, device))

    def generate() -> None:
        done["generate"].append(timed_generate(model, ids, new, device))

    print(f"{spec.name}, {dtype}, {device}, {torch.get_num_threads()} threads")
    print(f"  engine: {why_not(model) or kind_of(model, ids.shape[1] + new)}", flush=True)
    ceilings = _probe(device, dtype, cost.bytes_per_token)
    ratio = interleaved(engine, generate, pairs, clock=Clock(device))
    ceilings = ceilings.best(_probe(device, dtype, cost.bytes_per_token))
    print(f"  {agreement(model, ids, done['engine'][-1].tokens, done['generate'][-1].tokens)}")
    print(
        f"  ceilings: GEMV {ceilings.gemv / 1e9:.1f} GB/s, copy {ceilings.copy / 1e9:.1f} GB/s, "
        f"GEMM {ceilings.gemm / 1e12:.3f} TFLOP/s"
    )
    moved = decode_bytes(cost, 1, ids.shape[1], new)
    shares = {}
    for name, times in done.items():
        seconds = median(sum(t.gaps) for t in times[1:])
        shares[name] = moved / seconds / ceilings.bandwidth
        print(
            f"  {name:<9} {new / seconds:6.1f} tokens/s, {moved / seconds / 1e9:6.1f} GB/s, "
            f"MBU {shares[name]:.1%}, first token after "
            f"{1e3 * median(t.first for t in times[1:]):.1f} ms"
        )
    speedup = ratio.speedup
    print(f"  speed-up of the whole request, {pairs} pairs: ", end="")
    print(f"{speedup.value:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]")
    if device.startswith("cuda"):
        reached, goal = shares["engine"] >= MBU, f"MBU of {MBU:.0%}"
    else:
        reached, goal = speedup.value >= SPEEDUP, f"speed-up of {SPEEDUP}"
    print(f"  {goal}: {'reached' if reached else 'MISSED'}", flush=True)
    return reached


def kind_of(model: Any, length: int) -> str:
    session = StaticSession(model)
    session.reserve(1, length)
    return session.engine


def _probe(device: str, dtype: str, working_set: float) -> Ceilings:
    return probe(device, getattr(torch, dtype), working_set=working_set, repeats=3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", nargs="*", default=[])
    parser.add_argument("--shape", default="", help="a config of models, with random weights")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    given = parser.parse_args()
    dtypes = given.dtype or list(dict.fromkeys([default_dtype(given.device), "float32"]))
    if given.device == "cuda":
        dtypes = given.dtype or [default_dtype("cuda")]
    words = [f"model={given.shape or 'smollm2-135m'}"]
    words += ["model.source=random"] if given.shape else []
    reached = [bench(words, d, given.device, given.new, given.pairs) for d in dtypes]
    return int(not all(reached))


if __name__ == "__main__":
    sys.exit(main())
