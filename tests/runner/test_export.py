"""What a run made, in another tool's format."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from conftest import Bench

from effbench.api.points import Point
from effbench.config.compose import compose
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import Rank
from effbench.models import load as models
from effbench.runner.open import context, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train
from effbench.runner.stages.export import export
from effbench.util.errors import StoppedError, UserError

SMALL = [
    "dataset=arithmetic",
    "train.max_steps=3",
    "train.batch_size=2",
    "train.learning_rate=0.05",
    "+dataset.limit.train=16",
    "evaluator=[]",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]
IDS = torch.arange(30).view(2, 15)


def base() -> torch.nn.Module:
    spec = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model
    return models.load(spec, device="cpu", dtype=torch.float32).model.requires_grad_(False)


def test_peft_loads_a_point_and_gives_the_same_logits(bench: Bench, tmp_path: Path) -> None:
    words = ("method=dylora", "method.rank=8", *SMALL)
    record = bench.run("train", *words)
    job = bench.job("train", *words)
    work = open_run(job, bench.folder(job), bench.store)
    opened = open_model(work)
    method, artefact = opened.method, bench.folder(job).artefact
    ours = method.load(opened.model, artefact, context(work)).eval()
    ours.requires_grad_(False)
    untouched = base()(IDS).logits
    for name, rank in (("r2", 2), ("", 8)):
        folder = tmp_path / "adapters" / f"x{name}"
        export(record.key[:6], folder, name, bench.root)
        assert sorted(p.name for p in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        theirs = peft.PeftModel.from_pretrained(base(), folder).eval().requires_grad_(False)
        assert theirs.peft_config["default"].r == rank
        with method.at(ours, Rank(rank)):
            expected = ours(IDS).logits
        torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-6, rtol=0)
        assert (expected - untouched).abs().max() > 1e-3


def test_an_evaluation_leads_to_what_it_evaluated(bench: Bench, tmp_path: Path) -> None:
    made = bench.run("train", "method=lora", *SMALL)
    looked = bench.run("eval", f"from={made.key}", *(s for s in SMALL if "train." not in s))
    assert looked.key != made.key
    export("latest", tmp_path / "new", "", bench.root)
    assert (tmp_path / "new" / "adapter_config.json").is_file()


def test_errors_leave_nothing_behind(bench: Bench, tmp_path: Path) -> None:
    record = bench.run("train", "method=dylora", "method.rank=4", *SMALL)
    new = tmp_path / "new"
    with pytest.raises(UserError, match="no point 'r3'") as error:
        export(record.key, new, "r3", bench.root)
    assert "r2" in error.value.hint
    with pytest.raises(UserError, match="no run 'nope'"):
        export("nope", new, "", bench.root)
    packed = bench.run("compress", "method=rtn", *(s for s in SMALL if not s.startswith("train")))
    with pytest.raises(UserError, match="rtn has no export"):
        export(packed.key, new, "", bench.root)
    plain = bench.run("eval", *(s for s in SMALL if not s.startswith("train")))
    with pytest.raises(UserError, match="made nothing to export"):
        export(plain.key, new, "", bench.root)
    assert not new.exists() and not list(tmp_path.glob(".new*"))
    new.mkdir()
    (new / "mine").touch()
    with pytest.raises(UserError, match="there already"):
        export(record.key, new, "r2", bench.root)
    assert [p.name for p in new.iterdir()] == ["mine"]


def test_a_failed_export_leaves_nothing_behind(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = bench.run("train", "method=dylora", "method.rank=4", *SMALL)

    def half(self: DyLoRA, model: torch.nn.Module, point: Point, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(DyLoRA, "export", half)
    with pytest.raises(KeyboardInterrupt):
        export(record.key, tmp_path / "new", "", bench.root)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_an_unfinished_run_is_refused(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job("train", "method=lora", *SMALL)

    def stop(trainer: train.Trainer) -> float:
        raise StoppedError("step 1")

    monkeypatch.setattr(train, "one_step", stop)
    with pytest.raises(StoppedError):
        bench.run("train", "method=lora", *SMALL)
    with pytest.raises(UserError, match="not finished"):
        export(job.spec.key, tmp_path / "new", "", bench.root)
