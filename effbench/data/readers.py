"""Rows from files, packages, the hub and a rule."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from effbench.api.spec import DatasetSpec
from effbench.util.errors import UserError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a jsonl (gzipped or not), json, csv, parquet or txt file.

    Raises:
        UserError: For a broken line (which one), an unknown ending or a file without rows.
    """
    readers = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
        ".txt": _paragraphs,
        ".gz": _jsonl,
    }
    if path.suffix not in readers:
        raise UserError(f"{path} is of no known kind.", f"Known: {', '.join(readers)}.")
    try:
        rows = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}.", "Convert it to UTF-8.") from None
    if not rows:
        raise UserError(f"{path} has no rows.", "Give a file with at least one.")
    return rows


def _jsonl(path: Path) -> list[Row]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = []
    for number, line in enumerate(text.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error}.", "Mend or remove it.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is no JSON object.", "Mend or remove it.")
        rows.append(row)
    return rows


def _json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {error}.", "Mend the file.") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{path} is no list of JSON objects.", "Mend the file.")
    return rows


def _csv(path: Path) -> list[Row]:
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {reader.line_num} has another number of fields than line 1.",
                    "Mend or remove it.",
                )
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Mend the file.") from None
    return rows


def _paragraphs(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    return [{"text": p.strip()} for p in text.split("\n\n") if p.strip()]


def package_rows(spec: DatasetSpec, split: str) -> list[Row]:
    """Return the rows of a split that lies in a fetched package."""
    import pyarrow as pa

    from effbench.data.assets import fetch

    folder = fetch(spec.id) / spec.subset
    lines = folder / f"{split}.jsonl.gz"
    if lines.is_file():
        return _jsonl(lines)
    files = sorted((folder / split).glob("*.arrow")) or sorted(folder.glob("*.arrow"))
    if not files:
        raise UserError(
            f"Asset {spec.id!r} has no data at {spec.subset}/{split}.",
            "Correct dataset.subset or dataset.splits.",
        )
    rows: list[Row] = []
    for file in files:
        with pa.memory_map(str(file)) as source:
            rows += pa.ipc.open_stream(source).read_all().to_pylist()
    return rows


def hub_rows(spec: DatasetSpec, split: str) -> Iterable[Row]:
    """Return the rows of a split of a dataset on the hub."""
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(spec.id, spec.subset or None, split=split)
    except Exception as error:
        raise UserError(
            f"Dataset {spec.id!r} cannot be had from the hub: {str(error).splitlines()[0]}",
            "Without a hub: dataset=gsm8k-test, piqa, arc-easy or arithmetic, or dataset=file with "
            "your own.",
        ) from None
    return rows


def _arithmetic() -> Iterator[Row]:
    return (row | {"options": [*row["options"]]} for row in _questions())


@cache
def _questions() -> tuple[Row, ...]:
    """Return two thousand sums and differences with four answers each, always the same."""
    draw, rows = random.Random(0), list[Row]()
    for _ in range(2000):
        a, b, plus = draw.randint(1, 99), draw.randint(1, 99), draw.random() < 0.5
        right = a + b if plus else a - b
        offsets = draw.sample([-10, -2, -1, 1, 2, 10], 3)
        options = [str(right), *(str(right + o) for o in offsets)]
        draw.shuffle(options)
        rows.append(
            {
                "prompt": f"Question: What is {a} {'plus' if plus else 'minus'} {b}?\nAnswer:",
                "options": options,
                "label": options.index(str(right)),
            }
        )
    return tuple(rows)


GENERATORS = {"arithmetic": _arithmetic}
