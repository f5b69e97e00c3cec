"""Instructions: what to do, perhaps with an input, and the output that is wanted.

The form of Stanford Alpaca (Taori et al., 2023) with its prompt, which says that a request follows;
with `dataset.chat=true` the model's chat template takes its place. `system` and `history` (earlier
questions and answers, as LLaMA-Factory has them) need the chat template.
"""

from __future__ import annotations

from typing import Any, ClassVar

from effbench.api.spec import DatasetSpec
from effbench.data.kinds.pairs import Pairs
from effbench.data.render import Place, Text, Turn, columns_of, content_hash, is_missing
from effbench.util.errors import UserError

OPENING = "Below is an instruction that describes a task"
WITH_INPUT = (
    OPENING + ", paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}"
    "\n\n### Response:\n"
)
WITHOUT_INPUT = (
    OPENING + ". Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Response:\n"
)


class Alpaca(Pairs):
    """Instruction, input and output; fields of other names are given by `dataset.columns`."""

    templates: ClassVar[tuple[str, ...]] = ("chat",)
    columns: ClassVar[tuple[str, ...]] = ("instruction", "input", "output", "system", "history")

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's prompt and output.

        Raises:
            UserError: For earlier turns without a chat template to put them into.
        """
        asked, answered = self.source(place, spec)
        instruction, given = asked["instruction"], asked["input"]
        answer = answered["output"]
        place.require(answer, "output")
        turns = _turns(place, spec)
        if turns and not spec.chat:
            raise UserError(
                f"{place.where} has a system prompt or earlier turns, which need a chat template.",
                "Use the model's own: dataset.chat=true",
            )
        if spec.chat:
            prompt = f"{instruction}\n{given}" if given.strip() else instruction
            turns = (*turns, ("user", prompt))
        else:
            form = WITH_INPUT if given.strip() else WITHOUT_INPUT
            prompt = form.format(instruction=instruction, input=given)
        said = [text for turn in turns[:-1] for text in turn]
        id_ = content_hash(*said, prompt, answer)
        columns = columns_of(place, spec, self.columns)
        return Text(id_, prompt, answer, turns=turns, columns=columns)

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return instruction, input and output, which no template has to spell."""
        instruction, output = (_value(place, spec, name) for name in ("instruction", "output"))
        return {"instruction": instruction, "input": _value(place, spec, "input")}, {
            "output": output
        }


def _value(place: Place, spec: DatasetSpec, name: str) -> str:
    """Return the text of a field; an input and a system prompt may be missing."""
    field = spec.columns.get(name, name)
    if name in ("input", "system") and is_missing(place.row.get(field)):
        return ""
    return place.fill("{" + field + "}")


def _turns(place: Place, spec: DatasetSpec) -> tuple[Turn, ...]:
    """Return what stands before the instruction: a system prompt, and earlier turns."""
    system = _value(place, spec, "system")
    earlier = place.row.get(spec.columns.get("history", "history")) or []
    turns: list[Turn] = [("system", system)] if system else []
    for pair in _pairs(place, earlier):
        turns += [("user", pair[0]), ("assistant", pair[1])]
    return tuple(turns)


def _pairs(place: Place, earlier: Any) -> list[tuple[str, str]]:
    pairs: list[Any] = earlier if isinstance(earlier, list) else [None]
    for pair in pairs:
        if not (
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)
        ):
            raise UserError(
                f"{place.where}: 'history' is no list of questions with answers.",
                'Write it as [["question", "answer"], ...].',
            )
    return [(question, answer) for question, answer in pairs]
