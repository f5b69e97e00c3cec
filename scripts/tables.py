"""Make results/tables from results/records: every run, all campaigns and the grand table.

The README has the short form of the last one.

python scripts/tables.py
"""

from __future__ import annotations

from pathlib import Path

from effbench.cli.tables import campaign_named, grand_named
from effbench.report.campaign_written import write_tables
from effbench.report.grand_table import in_readme, write_grand
from effbench.report.table import RUN_COLUMNS, Table, run_row
from effbench.results.records import read_all

RESULTS, README = Path("results"), Path("README.md")


def runs_text(results: Path) -> str:
    """Return the table of all records."""
    records = read_all(results / "records", outcomes=False)
    return Table("", RUN_COLUMNS, [run_row(record) for record in records]).markdown()


def main() -> None:
    path = RESULTS / "tables" / "runs.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(runs_text(RESULTS))
    print(path)
    for keys in sorted((RESULTS / "campaigns").glob("*.json")):
        for written in write_tables(campaign_named(keys.stem), RESULTS):
            print(written)
    grand = grand_named("grand", RESULTS)
    for written in write_grand(grand, RESULTS):
        print(written)
    README.write_text(in_readme(README.read_text(), grand))


if __name__ == "__main__":
    main()
