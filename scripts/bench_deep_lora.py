"""Few training rows: Deep LoRA against LoRA over ranks, on the real small model.

Each method and rank trains on the same few rows, with the learning rate that gives the lower loss
on validation rows; shown is the loss on test rows. The plot has the singular values of the updates,
mean over layers, each divided by the largest: how many directions a method really uses.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib
import torch
from safetensors.torch import load_file

from effbench.config import compose
from effbench.launch import execute
from effbench.records import Metric, Record
from effbench.report.table import Table, as_value
from effbench.stages.export import export

matplotlib.use("agg")
RANKS = (2, 8, 32)
METHODS = {"lora": (1e-4, 1e-3), "deep_lora": (3e-3, 1e-2)}
"""Learning rates that each is tried with; the number of trials is the same for both."""
SETTINGS = [
    "dataset=gsm8k-test",
    "+dataset.limit.train=16",
    "+dataset.limit.validation=12",
    "+dataset.limit.test=24",
    "train.max_steps=24",
    "train.batch_size=2",
    "train.schedule=constant",
    "evaluator=perplexity",
]


def trained(results: str, method: str, rank: int, rate: float) -> Record:
    words = [
        *SETTINGS,
        f"method={method}",
        f"method.rank={rank}",
        *([f"method.alpha={2 * rank}"] if method == "lora" else []),
        f"train.learning_rate={rate}",
        "evaluator.perplexity.split=validation",
        f"run.results={results}",
        *sys.argv[1:],
    ]
    return execute(compose("train", words))


def tested(results: str, record: Record) -> Record:
    words = [f"from={record.key}", "evaluator=perplexity", f"run.results={results}"]
    return execute(compose("eval", words))


def loss_of(record: Record) -> Metric:
    return next(m for m in record.metrics if m.name == "loss")


def spectrum(results: str, record: Record) -> torch.Tensor:
    """Return the mean over layers of the update's singular values, each over the largest."""
    folder = Path(results) / "exports" / record.key
    export(record.key, folder, "", Path(results))
    tensors = load_file(folder / "adapter_model.safetensors")
    rows = []
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")].double()
            between = torch.linalg.qr(b).R @ torch.linalg.qr(a.double().T).R.T
            values = torch.linalg.svdvals(between)
            rows.append(values / values[0].clamp(min=1e-30))
    return torch.stack(rows).mean(0)


def draw(spectra: dict[str, torch.Tensor], path: Path) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, values in spectra.items():
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="index", ylabel="singular value / largest")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    rows, spectra = [], {}
    with tempfile.TemporaryDirectory() as results:
        for method, rates in METHODS.items():
            for rank in RANKS:
                tried = [trained(results, method, rank, rate) for rate in rates]
                best = min(tried, key=lambda record: loss_of(record).value)
                rate = best.spec["train"]["learning_rate"]
                loss = as_value(loss_of(tested(results, best)))
                rows.append((method, str(rank), f"{rate:g}", loss))
                spectra[f"{method} r={rank}"] = spectrum(results, best)
        draw(spectra, Path("results/figures/deep_lora_spectra.png"))
    head = ("method", "rank", "learning rate", "test loss")
    print(Table("16 training rows, one seed", head, rows).markdown())
    print("Spectra: results/figures/deep_lora_spectra.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
