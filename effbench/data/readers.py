"""Rows from files, packages and the hub."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from effbench.api.spec import DatasetSpec
from effbench.util.errors import UserError

Row = dict[str, Any]
Documents = Literal["paragraph", "line", "file"]

GZIPPED = b"\x1f\x8b"
"""How a gzipped file begins."""
ZIPPED, OLE = b"PK\x03\x04", b"\xd0\xcf\x11\xe0"
"""First bytes of a zip file, as .xlsx and .ods are, and of older workbooks."""
LONGEST_FIELD = 2**31 - 1
"""Characters of a csv field; the module's own limit is 128 Ki."""


def read_rows(path: Path, documents: Documents = "paragraph") -> list[Row]:
    """Return the rows of a jsonl, json, csv, tsv, parquet or txt file, gzipped or not.

    A mark of the byte order at the start is no content, and says where a file is UTF-16. A json
    file may hold a list or, as jsonl, a line for each row. In tsv nothing is quoted.

    Args:
        path: The file; its ending says what it is.
        documents: What the documents of a txt file are.

    Raises:
        UserError: For a broken row (which one), a name that stands twice in one, an unknown ending
            or a file without rows.
    """
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": partial(_csv, "excel"),
        ".tsv": partial(_csv, "tsv"),
        ".parquet": _parquet,
        ".txt": partial(_texts, documents),
    }
    suffix = path.suffix.lower()
    ending = Path(path.stem).suffix.lower() or ".jsonl" if suffix == ".gz" else suffix
    if ending not in readers:
        raise UserError(
            f"{path} is of no known kind.", f"Known: {', '.join(readers)}, .gz of them."
        )
    try:
        rows = readers[ending](path)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply.", "Mend the file.") from None
    if not rows:
        raise UserError(f"{path} has no rows.", "Give a file with at least one.")
    return rows


def _decoded(path: Path) -> str:
    """Return the text of a file, unpacked where it is gzipped whatever its name.

    Raises:
        UserError: When it is damaged, or not UTF-8.
    """
    data = path.read_bytes()
    try:
        if data.startswith(GZIPPED):
            data = gzip.decompress(data)
        if data.startswith((ZIPPED, OLE)):
            raise UserError(
                f"{path} is a workbook or an archive, whatever its name, and no text.",
                "Save what is in it as .csv or .jsonl.",
            )
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as Excel's "Unicode text"
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = shlex.quote(str(path))
        raise UserError(
            f"{path} is not UTF-8: {error}.",
            f"Convert it: iconv -f windows-1252 -t utf-8 {where} > utf8{path.suffix}, or what it "
            "is in the place of windows-1252.",
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be unpacked: {error}.", "It is damaged or cut off: get it again."
        ) from None


def _jsonl(path: Path) -> list[Row]:
    return _lines(path, _decoded(path))


def _lines(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except ValueError as error:  # broken JSON, or an integer of thousands of digits
            raise UserError(f"{path}, line {number}: {error}.", "Mend or remove it.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is no JSON object.", "Mend or remove it.")
        rows.append(row)
    return rows


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return the object of some keys and values.

    Raises:
        ValueError: When a key stands there twice, of which Python's reader would take the last.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the key {_twice([key for key, _ in pairs])!r} stands there twice")
    return found


def _twice(names: Sequence[str]) -> str:
    """Return the first name that stands there twice; there is one."""
    return next(name for place, name in enumerate(names) if name in names[:place])


def _json(path: Path) -> list[Row]:
    text = _decoded(path)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":  # a line for each row
            return _lines(path, text)
        raise UserError(f"{path}: {error}.", "Mend the file.") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{path} is no list of JSON objects.", _where_rows_are(rows))
    return rows


def _where_rows_are(value: object) -> str:
    """Return what to do about a JSON value that is no list of rows."""
    fields = value.items() if isinstance(value, dict) else ()
    lists = [name for name, part in fields if isinstance(part, list) and part]
    if any(isinstance(value[name][0], dict) for name in lists):  # type: ignore[index]
        held = " or ".join(map(repr, lists))
        return f"Keep the list of rows alone, which seems to be its {held}."
    return "Mend the file: [{...}, {...}], or an object a line."


SEPARATORS = (";", "\t", "|")
"""What stands between the fields of files that are called csv all the same."""


def _csv(form: Literal["excel", "tsv"], path: Path) -> list[Row]:
    import csv

    csv.field_size_limit(LONGEST_FIELD)
    settings: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if form == "tsv" else {}
    )
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), **settings)
    rows = []
    try:
        names = list(reader.fieldnames or [])
        if len(names) == 1 and (marks := [m for m in SEPARATORS if m in names[0]]):
            raise UserError(
                f"{path} has one column, {names[0]!r}: fields seem to stand between {marks[0]!r}.",
                "Put commas there, or name a file with tabs .tsv.",
            )
        if len({*names}) < len(names):
            raise UserError(
                f"{path}, line 1: the column {_twice(names)!r} stands there twice.", "Rename one."
            )
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {reader.line_num} has another number of fields than line 1.",
                    "Mend or remove it.",
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}.", "Mend or remove it.") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        said = str(error).rstrip(".")
        raise UserError(f"{path} cannot be read: {said}.", "Mend the file.") from None
    return rows


def _texts(documents: Documents, path: Path) -> list[Row]:
    text = _decoded(path).replace("\r\n", "\n").replace("\r", "\n")
    if documents == "file":
        parts = [text]
    else:
        parts = text.split("\n\n" if documents == "paragraph" else "\n")
    return [{"text": part.strip()} for part in parts if part.strip()]


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
        rows: Iterable[Row] = datasets.load_dataset(
            spec.id, spec.subset or None, split=split, revision=spec.fingerprint or None
        )
    except Exception as error:
        raise UserError(
            f"Dataset {spec.id!r} cannot be had from the hub: {str(error).splitlines()[0]}",
            "Without a hub: dataset=gsm8k-test, piqa, arc-easy or arithmetic, or dataset=file with "
            "your own.",
        ) from None
    return rows
