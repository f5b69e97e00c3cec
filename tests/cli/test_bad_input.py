"""What a user gets wrong: a short message, a hint, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import BYTES_SHAPE

from effbench.util.errors import UserError

RUN = ["model=tiny", "dataset=arithmetic", "run.progress=false", "dataset.limit.test=8"]
STEPS = ["train.max_steps=2", "train.batch_size=2"]


def refused(cli, *words: str) -> str:
    """Give a command that must fail; return the one message it shows."""
    before = set(Path().rglob("*"))
    status, out, said = cli(*words)
    text = said.strip()
    assert status == 2, (words, out, text)
    assert len(text.splitlines()) <= 6, text
    assert "Traceback" not in text
    assert set(Path().rglob("*")) == before, "something is left behind"
    return text


# -- words -----------------------------------------------------------------------------------------

TRAIN = ["train", "model=tiny"]
TOO_MANY = ["evaluator.generation.max_new_tokens=512"]


@pytest.mark.parametrize(
    "words, parts",
    [
        ([*TRAIN, "method.rnak=4"], ["'method.rnak'", "'rank'"]),
        ([*TRAIN, "method=qdylora", "method.rnak=4"], ["'method.rnak'", "'rank'"]),
        ([*TRAIN, "train.max_stpes=3"], ["'train.max_stpes'", "'max_steps'"]),
        ([*TRAIN, "run.resutls=x"], ["'run.resutls'", "'results'"]),
        ([*TRAIN, "hardware.tflop=1"], ["'hardware.tflop'", "'tflops'"]),
        ([*TRAIN, "dataset.limt.test=1"], ["'dataset.limt'", "'limit'"]),
        ([*TRAIN, "model.shape.hiden_size=32"], ["'model.shape.hiden_size'", "'hidden_size'"]),
        ([*TRAIN, "evaluator.perplexity.splt=test"], ["splt", "'split'"]),
        ([*TRAIN, "evaluator.speed.repeats=2"], ["speed is not chosen", "evaluator=["]),
        ([*TRAIN, "evaluator.sped.repeats=2"], ["no evaluator called 'sped'", "'speed'"]),
        ([*TRAIN, "evaluator.perplexity.split=tset"], ["no split 'tset'", "'test'"]),
        (["train", "mdoel=tiny"], ["'mdoel'", "'model'"]),
        ([*TRAIN, "dataset.limit.tset=3"], ["dataset.limit.tset", "no split 'tset'", "'test'"]),
        ([*TRAIN, "train.betas=[0.9,inf]"], ["train.betas=inf", "finite"]),
        (
            ["eval", "model=tiny", "evaluator=memory", "evaluator.memory.new_tokens=9999"],
            ["evaluator.memory: a context of 10479 tokens", "512 positions", "new_tokens"],
        ),
        (
            ["plan", "model=tiny", "evaluator=generation", *TOO_MANY],
            ["max_new_tokens=512 leaves no position of 512", "Lower evaluator.generation"],
        ),
        (
            ["plan", "model=tiny", "method=snapkv", "method.budget=[0]"],
            ["method.budget.0=0", "greater than 0"],
        ),
        (
            ["plan", "model=tiny", "method=lorc", "method.kept_keys=[1.5]"],
            ["method.kept_keys.0=1.5", "less than or equal to 1"],
        ),
        (
            ["plan", "model=tiny", "method=tova", "method.decoding=[speculative]"],
            ["does not go with tova", "cannot be taken back", "Leave that way"],
        ),
        (
            ["compress", "model=tiny", "method=layer_drop", "method.layers=[]"],
            ["method.layers=[] removes nothing"],
        ),
        ([*TRAIN, "sede=1"], ["'sede'", "'seed'"]),
        (["train", "model=tniy"], ["no model called 'tniy'", "'tiny'"]),
        (["train", "method=qdlora"], ["no method called 'qdlora'", "'qdylora'"]),
        ([*TRAIN, "evaluator=[perplexity,choises]"], ["'choises'", "'choices'"]),
        ([*TRAIN, "experiment=qdilora"], ["no experiment called", "'qdylora'"]),
        ([*TRAIN, "launcher=slrum"], ["no launcher called", "'slurm'"]),
        (["trian"], ["No such command 'trian'", "'train'"]),
        (["train", "--dryrun"], ["--dryrun", "--dry-run"]),
        (["list", "method"], ["'method'", "'methods'"]),
        (["list", "methods", "zzz*"], ["No methods fit", "effbench list methods"]),
        (["show", "method", "qdlora"], ["'qdlora'", "'qdylora'"]),
        (["show", "evaluator", "perplexty"], ["'perplexty'", "'perplexity'"]),
        ([*TRAIN, "--config-dir", "nowhere"], ["nowhere is not a folder", "Create it"]),
        ([*TRAIN, "--like", ""], ["--like names no run", "leave --like out"]),
        (["plan", "--like", ""], ["--like names no run", "leave --like out"]),
    ],
)
def test_a_misspelt_word_gets_the_nearest_right_one(cli, words, parts) -> None:
    text = refused(cli, *words)
    assert all(p in text for p in parts), text


@pytest.mark.parametrize(
    "words, parts",
    [
        (["train.max_steps=abc"], ["train.max_steps='abc'", "integer"]),
        (["train.max_steps=0"], ["train.max_steps=0", "greater than 0"]),
        (["train.epochs=-1"], ["train.epochs=-1", "greater than or equal to 0"]),
        (["train.epochs=1", "train.max_steps=3"], ["two lengths of one training", "Give one"]),
        (["train.schedule=steep"], ["train.schedule='steep'", "'cosine'"]),
        (["train.betas=[0.9]"], ["train.betas=[0.9]", "too few"]),
        (["train.betas=[0.9,1.0]"], ["train.betas.1=1.0", "less than 1"]),
        (["seed=9223372036854775808"], ["seed=9223372036854775808", "less than"]),
        (["model.shape.num_heads=3"], ["num_heads=3", "num_kv_heads=2"]),
        (["+hydra.callbacks.x._target_=os.system"], ["_target_=os.system", "may run code"]),
        (["-m", "seed=0,1", "+hydra.callbacks.x._target_=os.system"], ["may run code"]),
        (["hydra.searchpath=[pkg://os]"], ["hydra.searchpath is not for a command"]),
        (["train.learning_rate=nan"], ["train.learning_rate=nan", "finite"]),
        (["train=5"], ["train must hold keys", "train.KEY=VALUE"]),
        (["run=null"], ["run must hold keys"]),
        (["seed=-1"], ["seed=-1", "greater than or equal to 0"]),
        (["seed=1.5"], ["seed=1.5", "integer"]),
        (["method.rank=0"], ["method.rank=0", "greater than 0"]),
        (["method.rank=100"], ["method.rank=100", "64 or less"]),
        (["method.targets=[q_prj]"], ["'q_prj'", "'q_proj'"]),
        (["dataset.cut.train=2"], ["dataset.cut.train=2"]),
        (["dataset.max_length=9999"], ["512 positions", "dataset.max_length=512"]),
        (["seed=" + "9" * 5000], ["seed has a number that is too long"]),
        (["hardware.threads=9999"], ["hardware.threads=9999", "less than or equal to 4096"]),
        (["model.shape.num_layers=2147483648"], ["num_layers=2147483648", "65536"]),
        (["train.max_steps=9007199254740992"], ["train.max_steps=9007199254740992", "less than"]),
        (["-train.max_steps=3"], ["No such option: -train.max_steps=3", "overrides none"]),
        (["train.warmup=${nope}"], ["train.warmup cannot be resolved", "nope"]),
        (
            ["evaluator=perplexity", "evaluator.perplexity.split=test", "method/rank=3"],
            ["method/rank=3 cannot be composed", "group.key=value"],
        ),
        (
            ["evaluator=speed", "evaluator.sped.repeats=3", "evaluator.speed.repeats=2"],
            ["no evaluator called 'sped'", "'speed'"],
        ),
        (["hardware.device=tpu"], ["hardware.device='tpu'", "'cpu'"]),
        (["run.tracker=other"], ["run.tracker='other'", "'wandb'"]),
        (["dataset.prompt='caf\udce9'"], ["dataset.prompt is not UTF-8: '\\udce9'", "in UTF-8"]),
        (["hello"], ["'hello' is not an override", "key=value"]),
        (["a b=3"], ["is not an override", "key=value"]),
        (["seed=1,,2,"], ["is not an override", "beside a comma: seed=1,2"]),
        (["=3"], ["no config group or key ''"]),
        (["method.rank=4,8"], ["method.rank=4,8 asks for several runs", "-m"]),
        (["seed=range(0,3)"], ["several runs", "-m"]),
        (["method.rank=4,8", "--dry-run"], ["several runs", "-m"]),
        (["model=null"], ["exactly one model", "tiny"]),
        (["~dataset"], ["exactly one dataset", "gsm8k-test"]),
        (["hardware=[null]"], ["exactly one hardware"]),
        (["evaluator=[null]"], ["a list for evaluator holds names", "evaluator=[]"]),
        (["evaluator=[perplexity,[choices]]"], ["a list for evaluator holds names"]),
        (["method=[lora,full]"], ["exactly one method", "adalora"]),
        (["model=hub"], ["model.id has no value", "model.id=VALUE"]),
        (["model=folder"], ["model.path has no value", "model.path=VALUE"]),
        (["train.weight_decay=${oc.env:NO_SUCH}"], ["NO_SUCH"]),
        (["method=rtn"], ["rtn is not a method to train with", "effbench compress method=rtn"]),
        (["method=none"], ["nothing to train", "effbench eval"]),
        (["launcher=slurm"], ["launcher=slurm needs is not installed", "pip install"]),
        (["dataset=file"], ["names no file", "dataset.files.all=PATH"]),
        (["dataset=file", "dataset.files.all=no.jsonl"], ["no.jsonl is not a file", "path"]),
        (["from=abcd"], ["no run 'abcd'", "effbench runs"]),
        (["from=latest"], ["no finished run", "effbench train"]),
    ],
)
def test_an_impossible_value_is_refused(cli, words, parts) -> None:
    text = refused(cli, *TRAIN, *words)
    assert all(p in text for p in parts), text


def test_a_method_for_another_stage_is_refused(cli) -> None:
    assert "effbench train method=lora" in refused(cli, "compress", "model=tiny", "method=lora")
    assert "eval from=RUN" in refused(cli, "eval", "model=tiny", "method=lora")


def test_a_rank_that_does_not_fit_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.argv = ['effbench', 'train', 'model=tiny', 'method.rank=65']\n"
        "from effbench.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.split() == ["2", "False"]
    assert "method.rank=65" in done.stderr
    assert not list(tmp_path.iterdir())


# -- models ----------------------------------------------------------------------------------------

SHAPE = replace(BYTES_SHAPE, max_positions=128)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    import torch

    from effbench.models.random import byte_tokenizer, random_model

    folder = tmp_path / "model"
    random_model(SHAPE, 0, "cpu", torch.float32).save_pretrained(folder)
    byte_tokenizer(SHAPE).save_pretrained(folder)
    return folder


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, harm, part",
    [
        ("config.json", Path.unlink, "holds no config.json"),
        ("config.json", _truncate, "cannot be read"),
        ("model.safetensors", Path.unlink, "holds no weights"),
        ("model.safetensors", _truncate, "model.safetensors has "),
        ("model.safetensors", lambda p: p.write_bytes(b"\xff" * 99), "has no header"),
        ("tokenizer.json", Path.unlink, "holds no tokenizer"),
        ("tokenizer.json", _truncate, "tokenizer.json is no JSON"),
    ],
)
def test_a_broken_model_folder_is_named(cli, inline, saved, name, harm, part) -> None:
    harm(saved / name)
    words = ["eval", "model=folder", f"model.path={saved}", *RUN[1:]]
    for how in ([], ["--dry-run"]):
        text = refused(cli, *words, *how)
        assert part in text
        assert str(saved) in text


def test_a_whole_model_folder_runs(cli, inline, saved) -> None:
    status, _, said = cli("eval", "model=folder", f"model.path={saved}", *RUN[1:])
    assert status == 0, said


def test_without_a_hub_it_says_what_can_be_had(cli, inline, monkeypatch) -> None:
    monkeypatch.setattr("effbench.util.hf.hub_reachable", lambda: False)
    text = refused(cli, "eval", "model=hub", "model.id=no/such-model-anywhere", *RUN[1:])
    assert "no/such-model-anywhere cannot be had" in text
    assert "smollm2-135m" in text


# -- data ------------------------------------------------------------------------------------------


def rows(count: int = 40) -> str:
    return "".join(json.dumps({"prompt": f"{i}?", "answer": f"{i}!"}) + "\n" for i in range(count))


@pytest.mark.parametrize(
    "name, text, parts",
    [
        ("a.jsonl", "", ["has no rows", "at least one"]),
        ("a.jsonl", rows(3) + '{"prompt": \n', ["a.jsonl, line 4"]),
        ("a.jsonl", rows(3) + "[1]\n", ["a.jsonl, line 4 is no JSON object"]),
        ("a.jsonl", rows().replace("answer", "anwser"), ["no field 'answer'", "'anwser'"]),
        ("a.json", '[{"prompt": "a", "answer": "b"}', ["a.json"]),
        ("a.json", '{"prompt": "a"}', ["no list of JSON objects"]),
        ("a.json", '{"v": 1, "data": [{"prompt": "a"}]}', ["seems to be its 'data'"]),
        ("a.csv", "prompt,answer\na,b\nc\n", ["a.csv, line 3", "number of fields"]),
        ("a.parquet", "PAR1 no", ["a.parquet cannot be read"]),
        ("a.xlsx", "x", ["no known kind", ".jsonl"]),
        (
            "a.jsonl",
            '{"a": "x", "b": "y"}',
            ["no form that is known", "'a', 'b'", "dataset.prompt="],
        ),
    ],
)
def test_a_broken_data_file_is_named(cli, inline, tmp_path, name, text, parts) -> None:
    (tmp_path / name).write_text(text)
    words = ["model=tiny", "dataset=file", f"dataset.files.all={name}", "run.progress=false"]
    message = refused(cli, "train", *words, *STEPS)
    assert all(p in message for p in parts), message


def test_a_split_to_train_on_without_rows_is_named(cli, inline, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows())
    words = ["dataset=file", "dataset.files.all=a.jsonl", "dataset.cut.train=0"]
    text = refused(cli, "train", "model=tiny", *words, "run.progress=false", *STEPS)
    assert "Split 'train' of dataset 'a.jsonl' has no rows" in text
    assert "dataset.cut.train" in text


def test_a_file_that_is_not_utf8_is_named(cli, inline, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "\xe9"}'.encode("latin-1"))
    text = refused(cli, "train", "model=tiny", "dataset=file", "dataset.files.all=a.jsonl")
    assert "a.jsonl is not UTF-8" in text


def test_rows_in_two_splits_are_refused(cli, inline, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(9))
    (tmp_path / "test.jsonl").write_text(rows(4))
    files = ["dataset.files.train=train.jsonl", "dataset.files.test=test.jsonl"]
    words = ["model=tiny", "dataset=file", *files, "run.progress=false"]
    text = refused(cli, "train", *words, *STEPS)
    assert "4 rows stand both in split 'train' and in split 'test'" in text
    assert "dataset.allow_overlap=true" in text
    assert cli("train", *words, *STEPS, "dataset.allow_overlap=true")[0] == 0


# -- going on --------------------------------------------------------------------------------------


def test_going_on_from_a_run_in_a_way_that_cannot_be(cli, inline) -> None:
    def said(*words: str) -> str:
        status, _, text = cli(*words)
        assert status == 2
        assert len(text.strip().splitlines()) <= 6
        return text

    assert cli("train", *RUN, *STEPS, "method.rank=2")[0] == 0
    first = next(Path("results/records").glob("*.json")).stem
    assert cli("train", *RUN, *STEPS, "method=lora_drop")[0] == 0
    drop = next(p.stem for p in Path("results/records").glob("*.json") if p.stem != first)
    assert "cannot go on from what lora_drop left" in said("train", "method=lora", f"from={drop}")
    assert "cannot go on from what lora_drop left" in said("compress", "method=rtn", f"from={drop}")
    assert "already fixes the model (tiny)" in said("eval", f"from={first}", "model=tiny")
    assert "already fixes the method" in said("eval", f"from={first}", "method.rank=4")
    assert "is there already" in said("export", first, "results")
    with pytest.MonkeyPatch.context() as patch:  # none of these loads the model
        patch.setattr("effbench.runner.open.open_model", None)
        Path("file").touch()
        assert "A file stands where a folder" in said("export", first, "file/deep/out")
        Path("file").unlink()
        with pytest.MonkeyPatch.context() as no_access:
            no_access.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
            assert "folder that you may write to" in said("export", first, "deep/out")
    assert "no point 'r9'" in said("export", first, "out", "--point", "r9")
    with pytest.MonkeyPatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError("32768 requested and 1312 written")  # as numpy says it

        patch.setattr("effbench.runner.stages.export.write_card", full)
        assert "No space left" in said("export", first, "deep/down/out")
    assert not Path("deep").exists()

    assert cli("train", *RUN, *STEPS, "method.rank=4")[0] == 0
    second = next(
        p.stem for p in Path("results/records").glob("*.json") if p.stem not in (first, drop)
    )
    Path("results/runs", second, "FINISHED").unlink()
    assert "is not finished" in said("eval", f"from={second}")
    Path("results/runs", second, "artefact/weights.safetensors").write_bytes(b"x" * 99)
    Path("results/runs", second, "FINISHED").write_text("1.0\n")
    text = said("eval", f"from={second}", "run.progress=false")
    assert "weights.safetensors cannot be read" in text
    assert "--fresh" in text
    assert len(list(Path("results/runs").glob("[!.]*"))) == 3


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [[], ["--fresh"], ["-m", "seed=0,1"]])
def test_a_file_where_the_results_should_be(cli, inline, tmp_path: Path, extra) -> None:
    (tmp_path / "taken").write_text("mine")
    text = refused(cli, "train", *RUN, *STEPS, "run.results=taken", *extra)
    assert "taken" in text
    assert "another folder" in text
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_that_is_sent_to_a_full_disk(cli, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("effbench.cli.choosing.write", full)
    text = refused(cli, "list", "methods")
    assert "output cannot be written: No space left" in text
    assert "Free some space" in text


def test_a_current_folder_that_is_gone(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "cwd", (tmp_path / "gone").readlink)
    status, _, text = cli("runs")
    assert status == 2
    assert "current folder is gone" in text


@pytest.mark.parametrize("words", [["runs", "--results"], ["train", *TRAIN[1:], "run.results="]])
def test_a_name_that_is_too_long(cli, words) -> None:
    *before, last = words
    long = "a" * 300
    words = [*before, last + long] if last.endswith("=") else [*words, long]
    text = refused(cli, *words)
    assert "cannot be" in text
    assert "shorter name" in text


def test_a_link_that_leads_to_itself_among_the_records(cli, tmp_path: Path) -> None:
    records = tmp_path / "results" / "records"
    records.mkdir(parents=True)
    link = records / "0123456789abcdef.json"
    link.symlink_to(link)
    text = refused(cli, "runs")
    assert link.name in text
    assert "links" in text


def test_a_full_disk_leaves_nothing_and_the_same_command_ends_it(bench, monkeypatch) -> None:
    words = ["train", *RUN, *STEPS, "method.rank=2"]
    job = bench.job(*words)
    sync, full = os.fsync, [True]

    def fsync(descriptor: int) -> None:
        if full[0] and ".artefact." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left") as caught:
        bench.run(*words)
    assert "Free some space" in caught.value.hint
    folder = bench.folder(job)
    assert not folder.finished
    assert not folder.artefact.exists()
    assert not list(folder.path.glob(".*.part"))
    assert not bench.store.records.exists()
    full[0] = False
    assert bench.run(*words).key == job.spec.key
    assert folder.finished


def test_too_little_memory_is_said_and_leaves_what_was_saved(bench, monkeypatch) -> None:
    from effbench.runner import worker

    def full(job, folder, store) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 549 bytes")

    monkeypatch.setattr(worker, "_run", full)
    with pytest.raises(UserError, match=r"Memory ran out: .*549 bytes") as caught:
        bench.run("train", *RUN, *STEPS)
    assert "effbench plan" in caught.value.hint


def test_a_full_disk_is_known_however_it_is_said(tmp_path: Path) -> None:
    from effbench.util.files import mendable

    with pytest.raises(UserError, match="No space left"), mendable(tmp_path):
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")
    with pytest.raises(UserError, match="No space left"), mendable(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904
    with pytest.raises(RuntimeError, match="a bug"), mendable(tmp_path):
        raise RuntimeError("a bug")


def test_a_tracker_that_is_not_installed(cli, inline, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    text = refused(cli, "train", *RUN, *STEPS, "run.tracker=wandb")
    assert "wandb is not installed" in text
    assert "pip install 'effbench[wandb]'" in text
