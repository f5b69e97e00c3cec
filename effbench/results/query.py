"""SQL over records: the views `records` and `metrics`, in DuckDB."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from effbench.results.records import Record, read_all, strict
from effbench.util.errors import UserError

HEAD = {
    "key": "VARCHAR",
    "label": "VARCHAR",
    "stage": "VARCHAR",
    "method": "VARCHAR",
    "model": "VARCHAR",
    "dataset": "VARCHAR",
    "seed": "BIGINT",
    "parent": "VARCHAR",
}
"""Columns that both views have."""

RECORD_COLUMNS = {
    **HEAD,
    "started": "VARCHAR",
    "seconds": "DOUBLE",
    "device": "VARCHAR",
    "dtype": "VARCHAR",
    "spec": "JSON",
    "environment": "JSON",
    "plan": "JSON",
    "notes": "JSON",
}

METRIC_COLUMNS = {
    **HEAD,
    "name": "VARCHAR",
    "value": "DOUBLE",
    "unit": "VARCHAR",
    "point": "VARCHAR",
    "split": "VARCHAR",
    "n": "BIGINT",
    "low": "DOUBLE",
    "high": "DOUBLE",
    "obtained": "VARCHAR",
    "phase": "VARCHAR",
    "task": "VARCHAR",
}


class Rows(NamedTuple):
    """The answer to a query."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def answer(records: Sequence[Record], sql: str) -> Rows:
    """Answer a query over the views `records` and `metrics`.

    One row of `metrics` is one metric with its run's key, label, stage, method, model, dataset,
    seed and parent. The query can reach no file and no network.

    Raises:
        UserError: When the query is wrong.
    """
    import duckdb

    connection = duckdb.connect(config={"autoinstall_known_extensions": False})
    try:
        _fill(connection, "records", RECORD_COLUMNS, [_record_row(r) for r in records])
        metrics = [{**_head(r), **asdict(m)} for r in records for m in r.metrics]
        _fill(connection, "metrics", METRIC_COLUMNS, metrics)
        connection.execute("SET enable_external_access = false; SET lock_configuration = true")
        result = connection.execute(sql)
        if result is None or not result.description:
            return Rows((), [])
        return Rows(tuple(column[0] for column in result.description), result.fetchall())
    except duckdb.Error as error:
        raise UserError(
            f"The query failed: {str(error).splitlines()[0]}",
            f"records has {', '.join(RECORD_COLUMNS)}; metrics has {', '.join(METRIC_COLUMNS)}.",
        ) from None
    finally:
        connection.close()


def _fill(
    connection: Any, name: str, columns: dict[str, str], rows: Sequence[dict[str, Any]]
) -> None:
    """Make the view `name` from rows; one JSON text is much faster than many inserts."""
    form = json.dumps([columns])
    text = json.dumps(strict(list(rows)), allow_nan=False)
    connection.execute(
        f"CREATE TABLE {name}_rows AS SELECT unnest(from_json(?, ?), recursive := true)",
        [text, form],
    )
    connection.execute(f"CREATE VIEW {name} AS SELECT * FROM {name}_rows")


def _head(record: Record) -> dict[str, Any]:
    return {
        "key": record.key,
        "label": record.label,
        "stage": record.stage,
        "method": record.name_of("method"),
        "model": record.name_of("model"),
        "dataset": record.name_of("dataset"),
        "seed": record.spec.get("seed"),
        "parent": record.parent,
    }


def _record_row(record: Record) -> dict[str, Any]:
    hardware = record.spec.get("hardware") or {}
    return {
        **_head(record),
        "started": record.started,
        "seconds": record.seconds,
        "device": hardware.get("device"),
        "dtype": hardware.get("dtype"),
        "spec": record.spec,
        "environment": record.environment,
        "plan": record.plan,
        "notes": record.notes,
    }


def query(folder: Path, sql: str) -> Rows:
    """Answer a DuckDB query over the views `records` and `metrics` of a folder.

    Raises:
        UserError: When the query is wrong or a record cannot be read.
    """
    return answer(read_all(folder, outcomes=False), sql)
