"""Rules that label texts, and the file of JSON lines that they stand in, which a person may edit.

A rule says: what predicts one of `words` and resembles `anchor` is of class `label`. It is known by
a hash of that. What was seen of it and who decided about it stands beside it in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effbench.api.schema import digest
from effbench.util.errors import UserError
from effbench.util.files import write_atomic


@dataclass(frozen=True)
class Evidence:
    """What a rule does on rows whose labels are known, and on the others."""

    matches: int = 0
    """Labelled rows of the development half that it fires on."""
    precision: float = 0.0
    """Share of these that are of its class; 0 where there are none."""
    coverage: float = 0.0
    """Share of the unlabelled rows that it fires on."""
    examples: tuple[str, ...] = ()
    """Some of the unlabelled texts, the best matches."""


@dataclass(frozen=True)
class Rule:
    """A rule and what was decided about it."""

    words: tuple[str, ...]
    label: int
    """Class, from 0."""
    anchor: str = ""
    """Text that what it labels resembles; empty for any."""
    template: str = ""
    """What the model was asked after the text; empty where words are those of the text itself."""
    round: int = 0
    """Of the boosting, from 1."""
    answer: str = ""
    """The class in words, for people."""
    sigma: float = 0.0
    """Least matching score at which it fires."""
    accepted: bool | None = None
    """The decision; None for one that waits."""
    by: str = ""
    """Who decided."""
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def id(self) -> str:
        """Hash of what the rule says, 16 hexadecimal digits."""
        return digest([list(self.words), self.label, self.anchor, self.template])

    def line(self) -> str:
        """Return the rule as a line of JSON."""
        seen = {**vars(self.evidence), "examples": list(self.evidence.examples)}
        values = {
            "id": self.id,
            **vars(self),
            "words": list(self.words),
            "class": self.label,
            "evidence": seen,
        }
        del values["label"]
        return json.dumps(values, ensure_ascii=False)


def parse(line: str) -> Rule:
    """Return the rule of a line; only `words` and `class` have to be there.

    Raises:
        ValueError: Or a LookupError or TypeError, for what is no rule.
    """
    values: dict[str, Any] = json.loads(line)
    values.pop("id", None)  # what it says may have been edited
    seen = values.pop("evidence", {})
    words = values.pop("words")
    if isinstance(words, str) or not words:
        raise ValueError("words are a list")
    return Rule(
        words=tuple(str(w).lower() for w in words),
        label=int(values.pop("class")),
        evidence=Evidence(**{**seen, "examples": tuple(seen.get("examples", ()))}),
        **values,
    )


def read(path: Path) -> list[Rule]:
    """Return the rules of a file; none where there is no file. Of two with one id the later counts.

    Raises:
        UserError: For a line that is no rule; it names the line.
    """
    found: dict[str, Rule] = {}
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            rule = parse(line)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number} is no rule: {error}.",
                'A rule is a JSON object with at least "words" and "class".',
            ) from None
        found[rule.id] = rule
    return list(found.values())


def check_classes(rules: Iterable[Rule], classes: int) -> None:
    """Refuse rules of a class that there is not.

    Raises:
        UserError: That names the first.
    """
    odd = next((rule for rule in rules if not 0 <= rule.label < classes), None)
    if odd:
        raise UserError(
            f"The rule of {', '.join(odd.words)} is of class {odd.label}.",
            f"Classes are 0 to {classes - 1}: correct the file, or set method.classes.",
        )


def write(path: Path, rules: Sequence[Rule]) -> None:
    """Write a file of rules, whole or not at all."""
    write_atomic(path, "".join(f"{rule.line()}\n" for rule in rules))


def accepted(rules: Iterable[Rule]) -> list[Rule]:
    """Return those that were accepted."""
    return [rule for rule in rules if rule.accepted]
