"""What a kind of dataset is, and how it is found: by its file here, or by an entry point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

from effbench.api.examples import Example
from effbench.api.sources import source_of
from effbench.api.spec import DatasetSpec
from effbench.data.render import Place, Text
from effbench.util.rooms import Room


class Kind:
    """Base of all kinds. A kind has no settings of its own; it reads those of `DatasetSpec`."""

    name: ClassVar[str] = ""
    """The name of its file; set when it is found."""
    code: ClassVar[str] = ""
    """Hash of its code where another package offers it (`api.sources`); set when it is found."""
    asks: ClassVar[bool] = True
    """Whether a row is a prompt that a model can be asked to answer."""
    choices: ClassVar[bool] = False
    """Whether its examples have wrong answers beside the right one."""
    rates: ClassVar[bool] = False
    """Whether its answers have ratings; examples of pairs among them have a wrong answer too."""
    packs: ClassVar[bool] = False
    """Whether rows are packed to train on, so that `documents` differs from `examples`."""
    talks: ClassVar[bool] = False
    """Whether its rows always go through the chat template."""
    templates: ClassVar[tuple[str, ...]] = ()
    """Settings of `DatasetSpec` that decide what the text of a row is."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Names in `DatasetSpec.columns` that it reads itself, as other things than numbers."""

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row as text; None for one that holds nothing and is left out.

        Raises:
            UserError: For a field that the row lacks, or that holds what cannot be.
        """
        raise NotImplementedError

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return the values of a row by field: those that it asks with, and those of its answers.

        They say which row it is, whatever the words around them are.
        """
        raise NotImplementedError

    def examples(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Return texts as examples to train on."""
        raise NotImplementedError

    def documents(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Return texts as examples to evaluate on, one each."""
        return self.examples(texts, spec, tokenizer)

    def check(self, splits: Mapping[str, Sequence[Text]], spec: DatasetSpec) -> None:
        """Refuse splits whose rows lack together what no single row has to have.

        Raises:
            UserError: With what to change.
        """


ROOM = Room("data.kinds", Kind, "dataset.kind={} is not a kind.", "kinds")
names = ROOM.names


@cache
def find(name: str) -> Kind:
    """Return the kind called `name`.

    Raises:
        UserError: When there is none.
    """
    kind = ROOM.find(name)
    kind.code = source_of(kind)
    return kind()
