"""Make results/tables/runs.md from results/records: every run, newest last."""

from __future__ import annotations

from pathlib import Path

from effbench.report.table import runs_table
from effbench.results.records import read_all

RESULTS = Path("results")


def main() -> None:
    path = RESULTS / "tables" / "runs.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(runs_table(read_all(RESULTS / "records", outcomes=False)).markdown())
    print(path)


if __name__ == "__main__":
    main()
