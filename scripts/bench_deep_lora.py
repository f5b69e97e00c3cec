"""Deep LoRA: matrix completion over time, a step beside LoRA's, and the spectra of updates.

- A matrix of rank 3 is completed from a fifth of its entries by gradient descent: the full form,
  its compressed form with frames that train or do not, the narrow form, and two factors.
- A step of the compressed form and one of LoRA at the same rank are timed in turn, on the real
  model: the products between the frames should cost less than 3 %.
- One short run of each method leaves an update; the plot has its singular values, mean over layers,
  each over the largest: how many directions a method really uses.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import load_file

from effbench.config.compose import compose
from effbench.nn.adapters.deep import DeepLinear, Form
from effbench.report.table import Table
from effbench.resources.timing import interleaved
from effbench.results.store import Store
from effbench.runner.local import execute
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train as stage
from effbench.runner.stages.export import export
from effbench.runner.stages.trainer import Trainer, build_trainer

matplotlib.use("agg")

# -- matrix completion -----------------------------------------------------------------------------

WIDTH, TRUE_RANK, SEEN = 200, 3, 0.2
RANK, EPS, RATE, STEPS = 10, 1e-2, 0.2, 3000
"""RANK: of the compressed and the narrow form; more than twice the true one, as the gradient of a
fifth of the entries is not of rank 3."""
SHOWN = (500, 1000, 1500, 2000, 3000)


@dataclass(frozen=True)
class Arm:
    """A way to complete the matrix; `frames` is the rate of the frames over that of the factors."""

    form: Form
    depth: int = 3
    frames: float = 0.0


ARMS = {
    "full": Arm("full"),
    "compressed, frames at 0.1": Arm("compressed", frames=0.1),
    "compressed, frames at 0.01": Arm("compressed", frames=0.01),
    "compressed, frames frozen": Arm("compressed"),
    "narrow": Arm("narrow"),
    "two factors": Arm("full", depth=2),
}


def completed(arm: Arm, target: torch.Tensor, seen: torch.Tensor) -> tuple[list[float], float]:
    """Return the error at each of SHOWN, relative to the target, and the seconds of a step."""
    base = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    layer = DeepLinear(base, arm.form, RANK, arm.depth, EPS, 0, "matrix").double()

    def missed() -> torch.Tensor:
        return (layer.delta() - target) * seen

    groups = [{"params": list(layer.factors), "lr": RATE}]
    if arm.form == "compressed":
        with torch.no_grad():
            layer.set_subspace(layer.directions(missed(), torch.Generator().manual_seed(0)))
        groups.append({"params": [layer.left, layer.right], "lr": arm.frames * RATE})
    optimizer = torch.optim.SGD(groups)
    errors, begun = [], time.perf_counter()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        (missed().square().sum() / (2 * SEEN)).backward()
        optimizer.step()
        if step in SHOWN:
            errors.append(float((layer.delta().detach() - target).norm() / target.norm()))
    return errors, (time.perf_counter() - begun) / STEPS


def completion() -> None:
    """Print how far each form is from the whole matrix, over steps and time."""
    draws = torch.Generator().manual_seed(0)
    factors = (torch.randn(WIDTH, TRUE_RANK, generator=draws).double() for _ in range(2))
    u, v = (torch.linalg.qr(f).Q for f in factors)
    target = u @ v.T
    seen = (torch.rand(WIDTH, WIDTH, generator=draws) < SEEN).double()
    rows = []
    for name, arm in ARMS.items():
        errors, seconds = completed(arm, target, seen)
        rows.append((name, f"{1e3 * seconds:.2f}", *(f"{e:.2e}" for e in errors)))
    head = ("form", "ms a step", *(f"after {n}" for n in SHOWN))
    title = f"{WIDTH} x {WIDTH}, rank {TRUE_RANK}, {SEEN:.0%} of the entries seen: relative error"
    print(Table(title, head, rows).markdown(), flush=True)


# -- a step ----------------------------------------------------------------------------------------

PAIRS, LIMIT = 15, 1.03
STEP = ["train.batch_size=4", "train.max_steps=1000", "train.checkpoint_every=1000"]


def trainer(method: str, results: str) -> Trainer:
    """Return the training loop of a method at rank 8 on the seven linears, not yet begun."""
    words = [f"method={method}", "method.rank=8", *STEP, "run.progress=false"]
    job = compose("train", [*words, f"run.results={results}", *sys.argv[1:]])
    store = Store(Path(results))
    folder = store.run(job.spec.key)
    folder.create(job.spec)
    run = open_run(job, folder, store)
    return build_trainer(run, open_model(run), open_data(run))


def steps(results: str) -> bool:
    """Print the ratio of a step's time; return whether it is within the limit."""
    deep, lora = (trainer(name, results) for name in ("deep_lora", "lora"))
    for one in (deep, lora):
        stage.one_step(one)
    ratio = interleaved(lambda: stage.one_step(lora), lambda: stage.one_step(deep), PAIRS).speedup
    reached = ratio.value <= LIMIT
    print(f"Deep LoRA step / LoRA step: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    print(f"{PAIRS} pairs, limit {LIMIT}: {'reached' if reached else 'MISSED'}", flush=True)
    return reached


# -- spectra ---------------------------------------------------------------------------------------

FIGURE = Path("results/figures/deep_lora_spectra.png")
SHORT = [
    "run.progress=false",
    "dataset=gsm8k-test",
    "+dataset.limit.train=16",
    "train.max_steps=20",
    "train.batch_size=2",
    "train.schedule=constant",
    "evaluator=[]",
]
TRAINED = {
    "LoRA": ["method=lora", "train.learning_rate=1e-3"],
    "compressed": ["method=deep_lora"],
    "narrow": ["method=deep_lora", "method.form=narrow"],
}


def spectrum(results: str, words: list[str]) -> torch.Tensor:
    """Train, and return the mean over layers of the update's singular values over the largest."""
    job = compose("train", [*SHORT, "method.rank=16", *words, f"run.results={results}"])
    key = execute(job).key
    folder = Path(results) / "exports" / key
    export(key, folder, "", Path(results))
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = []
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].double()
            between = torch.linalg.qr(b).R @ torch.linalg.qr(a.double().T).R.T
            values = torch.linalg.svdvals(between)
            rows.append(values / values[0].clamp(min=1e-30))
    return torch.stack(rows).mean(0)


def draw(spectra: dict[str, torch.Tensor]) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, values in spectra.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=label)
    axes.set(yscale="log", xlabel="index", ylabel="singular value / largest")
    axes.legend(fontsize=8)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=150)
    print(f"Spectra: {FIGURE}")


def main() -> int:
    completion()
    with tempfile.TemporaryDirectory() as results:
        reached = steps(results)
        draw({label: spectrum(results, words) for label, words in TRAINED.items()})
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
