"""What a run made, in another tool's format."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from effbench.api.points import Point
from effbench.config.compose import compose
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import Rank
from effbench.models import load as models
from effbench.nn.adapters import merge
from effbench.nn.pruning import plain
from effbench.results.records import Record
from effbench.runner.open import context, open_model
from effbench.runner.run import open_run
from effbench.runner.stages import train
from effbench.runner.stages.export import _maker, export
from effbench.runner.stages.trainer import Trainer
from effbench.testing.bench import Bench
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


def full(bench: Bench) -> Record:
    """Return a run that trained every weight, one step."""
    return bench.run("train", "method=full", *SMALL, "train.max_steps=1")


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
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        theirs = peft.PeftModel.from_pretrained(base(), folder).eval().requires_grad_(False)
        assert theirs.peft_config["default"].r == rank
        with method.at(ours, Rank(rank)):
            expected = ours(IDS).logits
        torch.testing.assert_close(theirs(IDS).logits, expected, atol=1e-6, rtol=0)
        assert (expected - untouched).abs().max() > 1e-3


def test_a_model_whose_folder_moved_is_taken_from_where_an_evaluation_found_it(
    tmp_path: Path,
) -> None:
    made = compose("train", ["model=tiny", "dataset=arithmetic"]).spec
    made = replace(made, model=replace(made.model, path=str(tmp_path / "gone")))
    looked = replace(made, stage="eval", parent="a", model=replace(made.model, path=str(tmp_path)))
    store: Any = SimpleNamespace(resolve=str, spec_of={"a": made, "b": looked}.__getitem__)
    key, spec = _maker(store, "b")
    assert (key, spec.model.path, spec.stage) == ("a", str(tmp_path), "train")
    with pytest.raises(UserError, match="no longer at") as caught:
        _maker(store, "a")
    assert "effbench eval from=a model.path=FOLDER" in caught.value.hint


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
    with pytest.raises(UserError, match="no adapter that peft"):
        export(full(bench).key, new, "", bench.root, "peft")
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

    def stop(trainer: Trainer) -> float:
        raise StoppedError("step 1")

    monkeypatch.setattr(train, "one_step", stop)
    with pytest.raises(StoppedError):
        bench.run("train", "method=lora", *SMALL)
    with pytest.raises(UserError, match="not finished"):
        export(job.spec.key, tmp_path / "new", "", bench.root)


def test_codes_leave_as_blocks_or_expanded_and_it_says_so(bench: Bench, tmp_path: Path) -> None:
    words = [s for s in SMALL if not s.startswith("train")]
    record = bench.run(
        "compress", "method=rtn", "method.symmetric=true", "method.group_size=32", *words
    )
    for name, to, said in (("plain", "transformers", "expanded"), ("blocks", "gguf", "codes")):
        lines = export(record.key, tmp_path / name, "", bench.root, to)  # type: ignore[arg-type]
        assert any(said in line for line in lines)
        assert all(line in (tmp_path / name / "README.md").read_text() for line in lines)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "blocks", gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-4)
    assert (theirs(IDS).logits - base()(IDS).logits).abs().max() > 1e-3


def test_an_adapter_on_what_was_pruned_comes_with_its_base(bench: Bench, tmp_path: Path) -> None:
    """It fits no other model."""
    words = [s for s in SMALL if not s.startswith("train")]
    drop = bench.run("compress", "method=layer_drop", "method.layers=[1]", *words)
    more = [s for s in SMALL if not s.startswith("dataset")]
    tuned = bench.run("train", f"from={drop.key}", "method=lora", *more)
    said = export(tuned.key, tmp_path / "peft", "", bench.root, "peft")
    export(tuned.key, tmp_path / "whole", "", bench.root, "transformers")
    assert "base" in said[0]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, whole(IDS).logits, atol=1e-5, rtol=1e-4)


def test_the_card_tells_data_metrics_and_command(bench: Bench, tmp_path: Path) -> None:
    evaluated = [s for s in SMALL if s != "evaluator=[]"]
    record = bench.run("train", "method=lora", *evaluated, "evaluator=[perplexity]")
    export(record.key, tmp_path / "new", "", bench.root)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "| loss | test |" in card and record.key in card and "Trained on `arithmetic`" in card
    assert json.loads(card.partition("```json")[2].partition("```")[0]) == record.spec
    front = card.split("---")[1].split("\n")
    assert "library_name: peft" in front and 'base_model: "tiny"' in front
    [loss] = [m for m in record.metrics if (m.name, m.split) == ("loss", "test")]
    [row] = [line for line in card.splitlines() if line.startswith("| loss | test |")]
    found = [float(number) for number in re.findall(r"[\d.]+", row)]
    assert found == pytest.approx([loss.value, loss.low, loss.high, loss.n], rel=0.02)
    # The command that stands there is one that gives this very run.
    [command] = re.findall(rf"\| `{record.key}` \| `(.*)` \|", card)
    _, stage, *words = shlex.split(command)
    assert compose(stage, words).spec.key == record.key


def test_what_would_say_something_else_does_not_leave(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = bench.run("train", "method=lora", *SMALL)
    monkeypatch.setattr(merge, "merged_weight", lambda linear: 2 * linear.weight.detach().float())
    monkeypatch.setattr(plain, "merged_weight", lambda linear: 2 * linear.weight.detach().float())
    with pytest.raises(UserError, match="not say the same"):
        export(record.key, tmp_path / "new", "", bench.root, "transformers")
    assert not (tmp_path / "new").exists()
