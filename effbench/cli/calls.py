"""The commands as Python functions: the same words, and results with types.

`import effbench` has them; nothing heavy is imported before one is called, and a run still has a
process of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.report.table import Table, comparison, run_row
from effbench.results.records import Metric, Record
from effbench.results.store import RunFolder, Store, results_dir
from effbench.util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from pandas import DataFrame

    from effbench.report.comparison.metric_table import Kind, Row
    from effbench.report.comparison.result import Comparison


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run."""

    record: Record
    """All that is known of it."""
    results: Path
    """Folder of runs and records."""

    @property
    def key(self) -> str:
        """The run key, 16 hexadecimal digits."""
        return self.record.key

    @property
    def metrics(self) -> list[Metric]:
        """Every number of the run."""
        return self.record.metrics

    @property
    def folder(self) -> RunFolder:
        """Its files; a record that came with a clone has none."""
        return Store(self.results).run(self.key)

    def metric(self, name: str, point: str = "", split: str = "") -> Metric:
        """Return a metric.

        Args:
            name: Such as `loss` or `peak_bytes`.
            point: Operating point; empty for the first one that has it.
            split: Of the dataset; empty for the first one.

        Raises:
            UserError: When there is none.
        """
        for metric in self.metrics:
            if metric.name == name and point in ("", metric.point) and split in ("", metric.split):
                return metric
        place = "".join(f" at {part}" for part in (point, split) if part)
        raise UserError(
            f"Run {self.key} has no metric {name!r}{place}.",
            did_you_mean(name, {m.name for m in self.metrics}),
        )

    def to_pandas(self) -> DataFrame:
        """Return the metrics as a table, a row each; needs pandas."""
        return _frame([asdict(metric) for metric in self.metrics], [f.name for f in fields(Metric)])

    def _repr_html_(self) -> str:
        return comparison([self.record]).html()

    def __repr__(self) -> str:
        return f"<Run {self.key}: {self.record.label}>"


@dataclass(frozen=True, repr=False)
class Runs(Sequence[Run]):
    """Finished runs, the latest first."""

    found: tuple[Run, ...]

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.found)

    def __getitem__(self, place: Any) -> Any:
        """Return a run, or the runs of a slice."""
        return Runs(self.found[place]) if isinstance(place, slice) else self.found[place]

    def to_pandas(self) -> DataFrame:
        """Return what the runs were, a row each; needs pandas."""
        rows = [dict(zip(COLUMNS, self._row(run), strict=True)) for run in self.found]
        return _frame(rows, COLUMNS)

    def _row(self, run: Run) -> tuple[str, ...]:
        return (run.key, *run_row(run.record)[1:])

    def _table(self) -> Table:
        return Table("", COLUMNS, [self._row(run) for run in self.found])

    def _repr_html_(self) -> str:
        return self._table().html()

    def __repr__(self) -> str:
        return self._table().text() if self.found else "<no runs>"


COLUMNS = ("key", "started", "stage", "method", "model", "dataset", "seed", "result")


@dataclass(frozen=True, repr=False)
class Compared:
    """What differs between runs, and what cannot be told apart."""

    comparison: Comparison
    """All that was found."""

    @property
    def words(self) -> list[str]:
        """It in sentences."""
        return self.comparison.words

    def to_pandas(self) -> DataFrame:
        """Return every number, a row for each run and metric; needs pandas."""
        rows = [_flat(table.kind, row) for table in self.comparison.metrics for row in table.rows]
        return _frame(rows, list(rows[0]) if rows else [])

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.comparison.tables(full=False))

    def __repr__(self) -> str:
        return self.comparison.markdown()


def _flat(kind: Kind, row: Row) -> dict[str, Any]:
    """Return a row of a comparison; its difference is that to the run compared with."""
    seen = row.difference
    return {
        **kind._asdict(),
        "label": row.label,
        "key": row.key,
        "point": row.point,
        "value": row.value.value,
        "low": row.value.low,
        "high": row.value.high,
        "difference": seen.value if seen else None,
        "difference_low": seen.low if seen else None,
        "difference_high": seen.high if seen else None,
        "p_adjusted": row.p_adjusted,
        "finding": row.finding,
    }


def train(*words: str, like: str = "", fresh: bool = False, config_dir: str = "") -> Run:
    """Train, and evaluate what was trained: `effbench train WORDS`.

    Args:
        words: As in a command: `method=qdylora`, `train.max_steps=20`, or a file with a spec.
        like: An earlier run whose spec is taken where nothing else is said.
        fresh: Run anew what is finished or was interrupted.
        config_dir: A folder with configs of your own.

    Raises:
        UserError: For anything that you can mend; what is wrong and what to do are in its text.
        RunFailedError: When the run's process failed; its text is the reason.
    """
    return _made("train", words, like, fresh, config_dir)


def compress(*words: str, like: str = "", fresh: bool = False, config_dir: str = "") -> Run:
    """Compress a model, and evaluate it: `effbench compress WORDS`; see `train`."""
    return _made("compress", words, like, fresh, config_dir)


def evaluate(*words: str, like: str = "", fresh: bool = False, config_dir: str = "") -> Run:
    """Evaluate a model, or what an earlier run made: `effbench eval WORDS`; see `train`."""
    return _made("eval", words, like, fresh, config_dir)


def _made(stage: str, words: Sequence[str], like: str, fresh: bool, config_dir: str) -> Run:
    from effbench.config.compose import compose
    from effbench.runner.local import execute

    for word in words:
        if not isinstance(word, str):
            raise UserError(
                f"{word!r} is no word.",
                'Give each as a text of its own: ("model=tiny", "seed=1"), or (*words) for a list.',
            )

    job = compose(stage, words, [Path(config_dir)] if config_dir else (), like)
    return Run(execute(job, fresh), Path(job.runtime.results))


def runs(results: str | Path = "") -> Runs:
    """Return the finished runs of a folder, the latest first.

    Args:
        results: Folder of runs and records; empty for that of the commands.

    Raises:
        UserError: For a word of a command, which is no folder.
    """
    from effbench.results.records import read_all

    folder = _folder(results)
    if "=" in folder.name and not folder.is_dir():
        raise UserError(
            f"There is no folder {folder}.",
            "Runs are chosen from the list: [run for run in effbench.runs() if ...].",
        )
    records = read_all(folder / "records", outcomes=False)
    latest = sorted(records, key=lambda record: record.ended, reverse=True)
    return Runs(tuple(Run(record, folder) for record in latest))


def compare(
    *runs: Run | str, results: str | Path = "", margins: dict[str, float] | None = None
) -> Compared:
    """Compare runs on the same items; the first is the one compared with.

    Args:
        runs: Two or more: results of these functions, keys, prefixes or `latest`.
        results: Folder of runs and records; empty for that of the commands.
        margins: By metric, the difference that still counts as none, in its unit.

    Raises:
        UserError: When one is not there, or they have nothing to compare.
    """
    from effbench.report.comparison.compare import compare as compare_records
    from effbench.report.comparison.compare import margins_of
    from effbench.report.facts import told_of
    from effbench.results.lookup import find

    if not runs or not all(isinstance(run, Run | str) for run in runs):
        raise UserError(
            "What is compared are runs, keys, prefixes or latest, each given by itself.",
            'For example: effbench.compare(base, "latest"), or (*runs) for a list.',
        )
    given = next((run.results for run in runs if isinstance(run, Run)), results)
    store = Store(_folder(results or given))
    records = [run.record if isinstance(run, Run) else find(store.records, run) for run in runs]
    known = told_of(records, store)
    given_margins = margins_of([f"{name}={value}" for name, value in (margins or {}).items()])
    return Compared(compare_records(records, known, given_margins))


def _folder(results: str | Path) -> Path:
    return Path(results).expanduser() if results else results_dir()


def _frame(rows: list[dict[str, Any]], columns: Sequence[str]) -> DataFrame:
    try:
        from pandas import DataFrame
    except ImportError:
        raise UserError("pandas is not installed.", "pip install pandas") from None
    return DataFrame(rows, columns=list(columns))
