"""The README of an exported folder: what it is, how to load it, from what, and how well."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from effbench.api.account import lines
from effbench.api.schema import plain
from effbench.api.spec import DatasetSpec, Spec
from effbench.report.labels import command_of
from effbench.report.table import Value, readable
from effbench.results.records import Metric, Record
from effbench.util.package_data import conf_dir

LOAD = {
    "transformers": """from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({folder!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r})""",
    "peft": """from peft import {peft}

model = {peft}.from_pretrained({folder!r})""",
    "gguf": "# llama-cli -m {folder}/model.gguf",
}
"""How each form is loaded."""
LOAD_INSIDE = """from transformers import {auto}

model = {auto}.from_pretrained({base!r})
model.load_adapter({folder!r})"""
INSIDE = ("AutoModelForSeq2SeqLM",)
"""What peft 0.21 cannot wrap with transformers 5, which puts its layers in all the same."""


@dataclass(frozen=True)
class Card:
    """What is to be told of an exported folder."""

    kind: str
    """A key of `LOAD`."""
    auto: str
    """The class of transformers that loads it."""
    folder: str
    """Its name."""
    spec: Spec
    """Of the run that made it."""
    point: str
    """Name of the operating point."""
    records: Sequence[Record]
    """Of the runs that made it, first to last, as far as there are any."""
    notes: Sequence[str]
    """What the form cost."""


def write_card(card: Card, folder: Path) -> None:
    """Write the README of a folder."""
    (folder / "README.md").write_text("\n".join(_text(card)) + "\n", encoding="utf-8")


def _text(card: Card) -> Iterator[str]:
    spec = card.spec
    base = spec.model.id or spec.model.path or spec.model.name
    at = f", operating point `{card.point}`" if card.point else ""
    yield from ("---", f"library_name: {card.kind}", f"base_model: {json.dumps(base)}")
    yield from ("tags: [effbench]", "---", "", f"# {Path(base).name}, {spec.method.name}", "")
    yield f"Made by effbench from `{base}`{at}."
    yield from (f"\n{note}" for note in card.notes)
    peft = card.auto.replace("AutoModel", "AutoPeftModel")
    form = LOAD_INSIDE if card.kind == "peft" and card.auto in INSIDE else LOAD[card.kind]
    load = form.format(folder=card.folder, auto=card.auto, peft=peft, base=base)
    yield from ("", "```python", load, "```", "")
    yield from ("## How it was made", "", "| run | command |", "|---|---|")
    yield from (f"| `{r.key}` | `{command_of(r)}` |" for r in card.records)
    yield from ("", "## Data", "", *_data(card), "")
    yield from _metrics(card)
    yield from ("## Spec", "", "```json", json.dumps(plain(spec), indent=1, sort_keys=True), "```")


def _data(card: Card) -> Iterator[str]:
    yield f"Trained on `{card.spec.dataset.name}`{_told(card.spec.dataset)}"
    for record in card.records[-1:]:
        yield from (f"- {line}" for line in lines(record.data))


def _told(dataset: DatasetSpec) -> str:
    """Return what the config of a dataset says of it in its comment; a full stop without one."""
    path = conf_dir() / "dataset" / f"{dataset.name}.yaml"
    if dataset.source == "file" or not path.is_file():
        files = ", ".join(f"{split}: `{file}`" for split, file in dataset.files.items())
        return f" ({files})." if files else "."
    words = [x.removeprefix("#").strip() for x in path.read_text().splitlines() if x[:1] == "#"]
    return f": {' '.join(words).rstrip('.')}."


def _metrics(card: Card) -> Iterator[str]:
    found = [m for record in card.records[-1:] for m in record.metrics if _told_of(m, card.point)]
    if not found:
        return
    yield from ("## Metrics", "", "95 % intervals over items.", "")
    yield from ("| metric | data | value | interval | items |", "|---|---|---|---|---|")
    for m in found:
        data = " ".join(filter(None, (m.task, m.split)))
        value = f"{readable(m.value, m.unit)} {'' if m.unit.startswith('bytes') else m.unit}"
        yield f"| {m.name} | {data} | {value.strip()} | {_interval(m)} | {m.n or ''} |"
    yield ""


def _told_of(metric: Metric, point: str) -> bool:
    counted = metric.name in ("params", "weight_bytes")
    return metric.point == point and (counted or bool(metric.split or metric.task))


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return ""
    return str(Value(metric.value, metric.unit, metric.low, metric.high)).partition(" ")[2]
