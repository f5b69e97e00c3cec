"""Make results/tables/runs.md from results/records: every run, newest last."""

from __future__ import annotations

from pathlib import Path

from effbench.report.table import RUN_COLUMNS, Table, run_row
from effbench.results.records import read_all

RESULTS = Path("results")


def runs_text(results: Path) -> str:
    """Return the table of all records."""
    records = read_all(results / "records", outcomes=False)
    return Table("", RUN_COLUMNS, [run_row(record) for record in records]).markdown()


def main() -> None:
    path = RESULTS / "tables" / "runs.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(runs_text(RESULTS))
    print(path)


if __name__ == "__main__":
    main()
