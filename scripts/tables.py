"""Make results/tables from results/records: all runs, and per dataset one comparison."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from effbench.records import Record, read_all
from effbench.report.table import comparison, runs_table

RESULTS = Path("results")


def dataset(record: Record) -> str:
    return f"{record.name_of('model')}-{record.name_of('dataset')}"


def main() -> None:
    records = read_all(RESULTS / "records", outcomes=False)
    folder = RESULTS / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.md").write_text(runs_table(records).markdown())
    for name, group in groupby(sorted(records, key=dataset), dataset):
        table = comparison(list(group))
        (folder / f"{name}.md").write_text(table.markdown())
        (folder / f"{name}.csv").write_text(table.csv())
    print(*sorted(str(p) for p in folder.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
