"""lm-eval's own tasks: its prompts, its few-shot examples, its filters and its metrics.

Only the rows come from elsewhere, see `lm_eval_rows`: lm-eval lets a task bring its data along
(`custom_dataset`), so nothing of a task is written again here. lm-eval is imported when a task is
loaded, and not before.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.api.keys import WHOLE
from effbench.api.schema import digest
from effbench.data.lm_eval_rows import ASSET as ASSET
from effbench.data.lm_eval_rows import GROUPS as GROUPS
from effbench.data.lm_eval_rows import TASKS as TASKS
from effbench.data.lm_eval_rows import Entry, Files, check_hub, evaluated, from_hub, needed, rows_of
from effbench.data.lm_eval_rows import find as find
from effbench.data.lm_eval_rows import members as members
from effbench.data.lm_eval_rows import overlaps as shared_rows
from effbench.data.tokens import Encoder, prefix_token
from effbench.util.errors import UserError
from effbench.util.hashes import hash_of

if TYPE_CHECKING:
    from effbench.api.spec import DatasetSpec
    from effbench.data.overlap import Trained
    from effbench.nn.scoring.prefix_tree import Request

FEWSHOT_SEED = 1234
"""Seed with which lm-eval draws examples; part of what makes a score comparable."""


def names(kind: str = "") -> list[str]:
    """Return the names of all tasks and groups, without importing lm-eval.

    Args:
        kind: An output type of lm-eval; empty for every one.
    """
    tasks = [n for n, entry in TASKS.items() if kind in ("", entry.kind)]
    groups = [g for g, parts in GROUPS.items() if set(parts) <= set(tasks)]
    return [*groups, *tasks]


def check(name: str, num_fewshot: int | None = None, files: Files | None = None) -> None:
    """Refuse a task or group that could not be loaded, without importing lm-eval.

    Raises:
        UserError: For an unknown name, examples that the task cannot have, and rows that are
            neither in a file nor in the asset nor on a hub that answers.
    """
    for member in members(name):
        check_hub(find(member), num_fewshot, files or {})


def overlaps(
    name: str,
    dataset: DatasetSpec,
    files: Files | None = None,
    rows: Trained | None = None,
    limit: int | None = None,
) -> bool:
    """Whether a run that trains on `dataset` trains on rows that a task or group evaluates.

    Args:
        name: Of the task or group.
        dataset: Known by its name, split and files.
        files: Local files by task and split.
        rows: What was trained on, to find rows by what they hold; None looks at names alone.
        limit: Only the first rows of each task are evaluated.
    """
    entries, given = map(find, members(name)), files or {}
    return any(
        shared_rows(entry, dataset, given)
        or (rows is not None and rows.shared(evaluated(entry, given, limit)).rows > 0)
        for entry in entries
    )


def fingerprint(files: Files) -> str:
    """Return a content hash of local files; empty when there are none.

    Raises:
        UserError: When one is missing.
    """
    hashes = {}
    for task, by_split in sorted(files.items()):
        for split, name in sorted(by_split.items()):
            path = Path(name).expanduser()
            if not path.is_file():
                raise UserError(
                    f"{name}, given as split {split!r} of {task}, is not a file.",
                    "Correct the path.",
                )
            hashes[f"{task}.{split}"] = hash_of(path)
    return digest(hashes, WHOLE) if hashes else ""


@dataclass
class BenchmarkTask:
    """One task of lm-eval with its rows.

    Args:
        entry: What the table says of it.
        task: lm-eval's object.
        split: The split that is evaluated.
        num_fewshot: Examples before each question.
        limit: Only the first rows, in the task's own order; None for all.
    """

    entry: Entry
    task: Any
    split: str
    num_fewshot: int
    limit: int | None = None
    docs: list[dict[str, Any]] = field(init=False)
    """The rows, as lm-eval's own preprocessing leaves them."""
    ids: list[str] = field(init=False)
    """Content hash of each row, 16 hexadecimal digits."""
    _by_doc: list[list[Any]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        with _quiet():
            docs = self.task.doc_iterator(limit=self.limit)
            self.docs = [doc for _, doc in docs]
        self.ids = [digest(doc) for doc in self.docs]

    @property
    def name(self) -> str:
        """lm-eval's name."""
        return self.entry.name

    @property
    def version(self) -> str:
        """lm-eval's version of the task; scores of two versions are not comparable."""
        return str(self.task.VERSION)

    @property
    def output_type(self) -> str:
        """lm-eval's output type: `multiple_choice`, `loglikelihood` or `generate_until`."""
        return str(self.task.OUTPUT_TYPE)

    @property
    def metrics(self) -> list[str]:
        """lm-eval's names of the task's metrics."""
        return list(self.task.aggregation())

    def instances(self) -> list[list[Any]]:
        """Return lm-eval's requests of each row; `.args` holds the texts.

        Of `multiple_choice` and `loglikelihood` they are (context, continuation), of
        `generate_until` (context, generation settings).
        """
        if not self._by_doc:
            with _quiet():
                self.task.build_all_requests(limit=self.limit)
            self._by_doc = [[] for _ in self.docs]
            for instance in self.task.instances:
                self._by_doc[instance.doc_id].append(instance)
        return self._by_doc

    def results(self, index: int, responses: Sequence[Any]) -> dict[str, Any]:
        """Return lm-eval's metrics of one row, after its filters.

        Args:
            index: Which row.
            responses: One per request: (log-likelihood, whether greedy), or generated text.

        Returns:
            Value by metric; `metric,filter` where the task has filters with names of their own,
            as in lm-eval's result files.
        """
        instances = self.instances()[index]
        for instance, response in zip(instances, responses, strict=True):
            instance.resps, instance.filtered_resps = [response], {}
        with _quiet():
            for ensemble in self.task._filters:
                ensemble.apply(instances)
            found = {}
            for name in instances[0].filtered_resps:
                filtered = [i.filtered_resps[name] for i in instances]
                for metric, value in self.task.process_results(self.docs[index], filtered).items():
                    found[metric if name == "none" else f"{metric},{name}"] = value
        return found

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        """Return what lm-eval makes of the values of all rows: mostly their mean.

        Args:
            metric: A key of `results`.
            values: One per row.
        """
        made: float = self.task.aggregation()[metric.partition(",")[0]](list(values))
        return float(made)


def load(
    name: str,
    num_fewshot: int | None = None,
    limit: int | None = None,
    seed: int = FEWSHOT_SEED,
    files: Files | None = None,
) -> BenchmarkTask:
    """Return a task of lm-eval with its rows.

    Args:
        name: lm-eval's name of a task, not of a group.
        num_fewshot: Examples before each question; None for what lm-eval defines.
        limit: Only the first rows, in the task's own order.
        seed: Of the draw of examples, where they are drawn.
        files: Local files by task and split.

    Raises:
        UserError: For an unknown name, examples that the task cannot have, rows that cannot be
            had, and a package that the task needs and that is missing.
    """
    entry, files = find(name), files or {}
    check_hub(entry, num_fewshot, files)
    splits = needed(entry, num_fewshot, files)
    hub = from_hub(entry, num_fewshot, files)
    data = None if hub else {split: rows_of(entry, split, files) for split in splits}
    if data:
        data[splits[0]] = data[splits[0]][:limit]  # lm-eval prepares every row that it has
        _check_shots(entry, splits, data, num_fewshot)
    task = _task(entry, data)
    shots = entry.default_shots if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    return BenchmarkTask(entry, task, entry.split if hub else splits[0], shots, limit)


def load_all(name: str, **settings: Any) -> list[BenchmarkTask]:
    """Return the tasks of a group, or the one task of that name; settings as for `load`."""
    return [load(member, **settings) for member in members(name)]


def _check_shots(
    entry: Entry, splits: Sequence[str], data: Mapping[str, Sequence[Any]], asked: int | None
) -> None:
    shots = entry.default_shots if asked is None else asked
    if len(splits) > 1 and shots > len(data[splits[1]]):
        raise UserError(
            f"{entry.name} has {len(data[splits[1]])} examples in split {splits[1]!r}, "
            f"not {shots}.",
            f"Set num_fewshot={len(data[splits[1]])} or less.",
        )


def requests(task: BenchmarkTask, tokenizer: Any) -> list[list[Request]]:
    """Return each row's requests as tokens, cut into context and continuation as lm-eval does it.

    Spaces at the end of a context belong to the continuation; both are tokenised together, and
    the context's own tokens are taken off the front. An empty context is the token that begins a
    text, or else the one that ends it.

    Raises:
        UserError: When a continuation has no token of its own.
    """
    from effbench.nn.scoring.prefix_tree import Request

    pairs = [[_moved(*i.args) for i in row] for row in task.instances()]
    texts = {t for row in pairs for context, answer in row for t in (context, context + answer)}
    ids = _encoded(sorted(texts), tokenizer)
    made: list[list[Request]] = []
    for number, row in enumerate(pairs):
        made.append([])
        for context, answer in row:
            if context:
                start = ids[context]
                rest = ids[context + answer][len(start) :]
            else:
                start, rest = _without_context(answer, tokenizer)
            if not rest:
                raise UserError(
                    f"Row {number + 1} of {task.name} has an answer without a token: {answer!r}.",
                    "Its data or the tokenizer are damaged.",
                )
            made[-1].append(Request(start, rest))
    return made


def _moved(context: str, continuation: str) -> tuple[str, str]:
    bare = context.rstrip()
    return (bare, context[len(bare) :] + continuation) if context else (context, continuation)


def _encoded(texts: Sequence[str], tokenizer: Any) -> dict[str, list[int]]:
    """Return the tokens of each text; one that names the first token itself gets no other."""
    begin = tokenizer.decode(prefix_token(tokenizer))
    found: dict[str, list[int]] = {}
    for special in (True, False):
        some = [t for t in texts if t and t.startswith(begin) != special]
        if some:
            ids = tokenizer(some, add_special_tokens=special)["input_ids"]
            closing = Encoder(tokenizer).closing if special else 0
            found |= {t: i[: len(i) - closing] for t, i in zip(some, ids, strict=True)}
    return found


def _without_context(answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    prefix = prefix_token(tokenizer)
    return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)


# -- lm-eval's objects ---------------------------------------------------------------------------


def _task(entry: Entry, data: Mapping[str, Sequence[Any]] | None) -> Any:
    """Return lm-eval's task, on the given rows or on what it loads from the hub itself."""
    overrides: dict[str, Any] = {}
    if data is not None:
        overrides = _on_rows(entry, data)
    try:
        with _quiet():
            found = _manager(entry.folder).load(
                {"group": "effbench", "task": [{"task": entry.name, **overrides}]}
            )
    except ModuleNotFoundError as error:
        raise UserError(
            f"{entry.name} needs the package {error.name!r}, which is not installed.",
            f"pip install {error.name}",
        ) from None
    except (OSError, ValueError) as error:
        if data is not None:
            raise
        raise UserError(
            f"{entry.hub} cannot be had from the hub: {str(error).splitlines()[0]}",
            f"Give the rows as a file: evaluator.NAME.files.{entry.name}.{entry.split}=FILE.jsonl",
        ) from None
    return found["tasks"][entry.name]


def _on_rows(entry: Entry, data: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Return what has to be set so that lm-eval's task reads these rows, and nothing else."""
    from datasets import Dataset, DatasetDict

    held = DatasetDict({split: Dataset.from_list(list(rows)) for split, rows in data.items()})
    config = _manager(entry.folder).task_index[entry.name].cfg or {}
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    absent = {key: None for key in keys if config.get(key) and config[key] not in held}
    return {"custom_dataset": lambda **_: held, **absent}


@cache
def _manager(folder: str) -> Any:
    """Return lm-eval's index of one folder; that of all its tasks takes seconds."""
    import lm_eval.tasks

    place = Path(lm_eval.tasks.__file__).parent / folder
    with _quiet():
        return lm_eval.tasks.TaskManager(include_path=str(place), include_defaults=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show neither log lines nor progress bars of lm-eval and datasets."""
    from datasets.utils import logging as datasets_logging
    from datasets.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    verbosity, bars = datasets_logging.get_verbosity(), not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets_logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        datasets_logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()
