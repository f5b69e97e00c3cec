"""The records that come with the repository can be listed and compared in a fresh clone."""

from __future__ import annotations

from pathlib import Path

from effbench.records import read_all
from effbench.report.compare import compare

RECORDS = Path(__file__).parent.parent / "results" / "records"


def test_the_committed_records_can_be_compared():
    records = read_all(RECORDS)
    demo = {r.name_of("method"): r for r in records if r.name_of("dataset") == "gsm8k-test"}
    found = compare([demo["qlora"], demo["qdylora"], demo["none"]])
    loss = next(m for m in found.metrics if m.kind.metric == "loss")
    assert [row.point for row in loss.rows] == ["", "r1", "r2", "r4", "r8", "r16", ""]
    assert all(row.difference is not None for row in loss.rows[1:])


def test_the_committed_records_come_from_committed_code():
    for record in read_all(RECORDS, outcomes=False):
        assert record.environment["commit"], record.key
        assert record.environment["dirty"] is False, record.key
