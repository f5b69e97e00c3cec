"""Writes what a run made in another tool's format."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from effbench.api.points import Point, find_point
from effbench.api.shape import ModelShape
from effbench.api.spec import Job, ModelSpec, Runtime, Spec
from effbench.api.stages import base as stages
from effbench.data.dataset import class_names
from effbench.models.load import known_shape
from effbench.nn.model_kinds.base import CAUSAL, ModelKind, find, kind_of
from effbench.report.model_card import Card, write_card
from effbench.resources.usage import format_bytes
from effbench.results.store import RunFolder, Store
from effbench.util.errors import UserError
from effbench.util.files import making, replace_folder, require_folder, scratch_folder

if TYPE_CHECKING:
    import torch

    from effbench.methods.base import Method
    from effbench.nn.pruning.plain import Plain
    from effbench.runner.run import Run

Target = Literal["auto", "transformers", "peft", "gguf"]
"""`auto` is what suits the method: an adapter for peft, or a folder."""
Held = Literal["auto", "float32", "bfloat16", "float16"]
GGUF = "model.gguf"
PROBE = tuple(range(5, 21))
"""Tokens on which an exported model has to agree with the run's own."""
AGREE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
"""Most that logits may differ by on average, over their spread, by the shorter dtype of the two."""


@dataclass
class Exporting:
    """A run's model at one operating point, on its way out."""

    run: Run
    method: Method
    model: Any
    point: Point
    dtype: torch.dtype | None
    final: Path
    """Where the folder will be."""
    said: list[str] = field(default_factory=list)
    """What it cost."""


def export(
    ref: str,
    folder: Path,
    point: str,
    results: Path,
    to: Target = "auto",
    dtype: Held = "auto",
) -> list[str]:
    """Write the artefact of a run at one operating point into a new folder; say what it cost.

    Args:
        ref: Key of the run, a prefix of it, or `latest`.
        folder: Not there yet, or empty.
        point: Name of an operating point; empty for the one that stands for all.
        results: Where the run is.
        to: For which tool.
        dtype: Of the weights; `auto` is float32 where adapters or packed weights are multiplied
            out, and else what they are held in.

    Raises:
        UserError: For an unknown run or point, a folder that holds something, or a tool that has
            no place for what the method makes. Nothing is left behind then.
    """
    store = Store(results)
    key, spec = _maker(store, ref)
    kind = _kind(spec)
    wanted = _form(spec, kind, to)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already.", "Choose another folder.")
    require_folder(folder.parent)
    import torch

    from effbench.nn.pruning import plain
    from effbench.runner.open import context, open_model
    from effbench.runner.run import open_run
    from effbench.runner.worker import quiet_libraries

    quiet_libraries()
    with TemporaryDirectory() as scratch:  # the run is finished, and nothing is added to it
        run = open_run(Job(spec, Runtime(results=str(results))), RunFolder(Path(scratch)), store)
        opened = open_model(run)
        run.events.close()
    own = opened.method
    at = find_point(own.points(), point, f"Run {key}") if point else own.default_point()
    artefact = store.run(key).check_artefact(whole=True)
    held = None if dtype == "auto" else getattr(torch, dtype)
    writer = {"auto": _auto, "transformers": _plain, "peft": _peft, "gguf": _gguf}[wanted]
    with torch.no_grad():
        stands = wanted == "peft" and bool(run.lineage.earlier)
        base = plain.plain_model(opened.model) if stands else None
        model = own.load(opened.model, artefact, context(run)).eval()
        with making(folder.parent), scratch_folder(folder.parent, folder.name) as new:
            work = Exporting(run, own, model, at, held, folder.absolute())
            form = writer(work, new, base)
            write_card(_card(work, form, kind.auto, store), new)
            replace_folder(new, folder)
    return work.said


def _kind(spec: Spec) -> ModelKind:
    shape = known_shape(spec.model)
    return find(ModelShape.of(shape).kind if shape else CAUSAL)


def _form(spec: Spec, kind: ModelKind, to: Target) -> str:
    """Return in what form a model of a kind leaves.

    Raises:
        UserError: Before anything is loaded, for a form that has no place for it.
    """
    if to == "auto":
        return to if "gguf" in kind.forms else kind.forms[0]
    if to not in kind.forms:
        raise UserError(
            f"{spec.model.called} is {kind.one}, which is not written for {to}.",
            f"Leave --to out, or choose: {', '.join(kind.forms)}.",
        )
    if to == "gguf":
        _require_gguf(spec.model)
    return to


def _require_gguf(spec: ModelSpec) -> None:
    """Refuse a model that is not written as GGUF, where its config is at hand."""
    from transformers import AutoConfig

    from effbench.models.gguf_write import require_known
    from effbench.models.load import config_file

    with suppress(UserError, OSError, ValueError):  # what is wrong with it is said by loading it
        config = None if spec.source in ("random", "gguf") else config_file(spec)
        config = config and AutoConfig.from_pretrained(config.parent)
    if config:
        require_known(config)


def _maker(store: Store, ref: str) -> tuple[str, Spec]:
    """Return the run that made what a run evaluated, or the run itself.

    Files of the model are taken from where the run that is named found them.

    Raises:
        UserError: When nothing was made, or the model's files are no longer there.
    """
    key = store.resolve(ref)
    spec = store.spec_of(key)
    place = spec.model.path
    while not stages.find(spec.stage).makes and spec.parent:
        key, spec = spec.parent, store.spec_of(spec.parent)
    if not stages.find(spec.stage).makes:
        raise UserError(f"Run {key} made nothing to export.", "Choose a train or compress run.")
    if place and not Path(place).expanduser().exists():
        raise UserError(
            f"The model that run {key} started from is no longer at {place}.",
            f"Say where it is, and export that run: effbench eval from={key[:8]} model.path=FOLDER",
        )
    return key, replace(spec, model=replace(spec.model, path=place))


# -- the forms ---------------------------------------------------------------------------------


def _auto(work: Exporting, new: Path, base: Any) -> str:
    """Write what suits the method; return what it is."""
    adapter = work.method.as_peft(work.model, work.point) is not None
    if adapter and work.run.lineage.earlier:
        work.said.append("The adapter stands on what earlier runs made: see --to peft.")
    work.method.export(work.model, work.point, new)
    if (new / "config.json").is_file():  # a whole model is of use with its tokenizer alone
        work.run.tokenizer.save_pretrained(new)
    return "peft" if adapter else "transformers"


def _plain(work: Exporting, new: Path, base: Any) -> str:
    """Write a folder that transformers loads."""
    from effbench.nn.pruning import plain

    made = _checked(work)
    _name_classes(work, made.model)
    plain.write(made, new)
    work.run.tokenizer.save_pretrained(new)
    return "transformers"


def _name_classes(work: Exporting, model: Any) -> None:
    """Let a classifier call its classes what the rows that it last learnt from call them."""
    run = work.run
    learnt = [s for s in (*run.store.ancestors(run.spec).values(), run.spec) if _trains(s)]
    if kind_of(model).speaks or not learnt:
        return
    names = class_names(learnt[-1].dataset)
    if len(names) == model.config.num_labels:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: n for n, name in enumerate(names)}


def _trains(spec: Spec) -> bool:
    return stages.find(spec.stage).trains


def _peft(work: Exporting, new: Path, base: Plain | None) -> str:
    """Write an adapter that peft loads, with its base where an earlier run made that."""
    from effbench.nn.adapters import peft_lora
    from effbench.nn.llama import stack
    from effbench.nn.pruning import plain

    adapter = work.method.as_peft(work.model, work.point)
    if adapter is None:
        raise UserError(
            f"{work.method.name} leaves no adapter that peft could hold.",
            "Write a whole model: --to transformers.",
        )
    name = stack.base_name(work.model)
    if base is not None:
        (new / "base").mkdir()
        plain.write(base, new / "base")
        work.run.tokenizer.save_pretrained(new / "base")
        name = str(work.final / "base")
        work.said.append(f"What it stands on was made by earlier runs, and lies in {name}.")
    elif work.method.weights not in ("compute", "float32"):
        work.said.append(
            f"It was trained on {work.method.weights} weights: load its base so for the same "
            "answers, or write a whole model with --to transformers."
        )
    if not kind_of(work.model).speaks:
        classes = work.model.config.num_labels
        work.said.append(f"The head comes with it: load its base with num_labels={classes}.")
    peft_lora.write_adapter(adapter, new, replace(peft_lora.base_of(work.model), name=name))
    return "peft"


def _gguf(work: Exporting, new: Path, base: Any) -> str:
    """Write a file that llama.cpp reads."""
    from effbench.models.gguf_write import require_known, write_gguf

    require_known(work.model.config)
    made = _checked(work)
    packed = made.packed if work.dtype is None else {}
    done = write_gguf(made.model, work.run.tokenizer, new / GGUF, packed, work.run.spec.label)
    if done.kept:
        work.said.append(f"{done.kept} linears keep their codes, as blocks of ggml.")
    if not done.tokens:
        work.said.append(
            "The file holds no tokenizer: llama.cpp has no name for how this one cuts texts."
        )
    return "gguf"


def _checked(work: Exporting) -> Plain:
    """Return a point as a plain model, after making sure that it says what the run's own does.

    Raises:
        UserError: When it does not.
    """
    made = work.method.as_plain(work.model, work.point, work.dtype)
    work.said += _cost(made)
    from effbench.api.batch import make_batch
    from effbench.api.examples import IGNORED
    from effbench.nn.decode.decoder import forward_logits

    width = made.model.config.vocab_size
    ids = [token % width for token in PROBE]
    half = len(ids) // 2  # a prompt and its answer: encoders read the one alone
    batch = make_batch([(ids, [IGNORED] * half + ids[half:])], 0)
    with work.method.at(work.model, work.point):
        own = work.method.logits(work.model, batch.to(work.run.device), work.point).float().cpu()
    found = forward_logits(made.model, batch).float()
    off = float((found - own).abs().mean() / own.std())
    held = {str(d).removeprefix("torch.") for d in (made.model.dtype, work.run.dtype)}
    if not off <= max(AGREE[name] for name in held):
        raise UserError(
            f"As a plain model it would not say the same: its logits are {off:.2g} of their "
            "spread away.",
            "Its artefact can be used through `effbench eval from=RUN` and `effbench generate`.",
        )
    return made


def _cost(made: Plain) -> list[str]:
    """Return in words what became of a model on its way to a plain one."""
    size = sum(p.numel() for p in made.model.parameters())
    said = []
    if made.merged:
        said.append(f"{made.merged} adapters were added to their weights.")
    if made.expanded:
        held = str(made.model.dtype).removeprefix("torch.")
        bytes_ = format_bytes(size * made.model.dtype.itemsize)
        said.append(f"{made.expanded} packed linears were expanded: {bytes_} as {held}.")
    if made.filled:
        said.append(
            f"{made.filled:,} of {size:,} weights are zeros: layers of a slice differ, and were "
            "filled up to the widest."
        )
    return said


def _card(work: Exporting, form: str, auto: str, store: Store) -> Card:
    """Return what the folder's README says."""
    from effbench.results.records import read

    spec, keys = work.run.spec, [*store.ancestors(work.run.spec), work.run.spec.key]
    files = [store.records / f"{key}.json" for key in keys]
    return Card(
        kind=form,
        auto=auto,
        folder=work.final.name,
        spec=spec,
        point=work.point.name,
        records=[read(path, outcomes=False) for path in files if path.is_file()],
        notes=work.said,
    )
