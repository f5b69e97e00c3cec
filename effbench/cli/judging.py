"""What `effbench judge` does in a terminal: rules with their evidence, decided one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from effbench.nn.weak_labels import rules as files
from effbench.nn.weak_labels.rules import Rule
from effbench.util.errors import UserError

PERSON = "person"
"""Who decided, in the file."""
ANSWERS = "[a]ccept, [r]eject, [u]ndo or [q]uit? "
SHOWN_LETTERS = 300
"""Of a text; the rest is left out."""


def judge_file(path: Path, ask: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Ask about each rule of a file that waits, and write each decision at once.

    Args:
        path: The file of rules.
        ask: Returns what is typed after a question.
        say: Prints a line or several.

    Raises:
        UserError: When there is no such file, or a line of it is no rule.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is not a file.",
            "A run with method.judge=recorded and method.files.decisions=FILE makes it.",
        )
    rules = files.read(path)
    decided = [i for i, rule in enumerate(rules) if rule.by == PERSON]
    while (place := waiting(rules)) is not None:
        say(shown(rules[place], f"Rule {place + 1} of {len(rules)}"))
        word = typed(ask)
        if word == "q":
            break
        if word == "u" and not decided:
            say("There is nothing to undo.")
            continue
        if word == "u":
            place = decided.pop()
            rules[place] = replace(rules[place], accepted=None, by="")
        else:
            decided.append(place)
            rules[place] = replace(rules[place], accepted=word == "a", by=PERSON)
        files.write(path, rules)
    say(summary(rules))


def waiting(rules: Sequence[Rule]) -> int | None:
    """Return the place of the first rule that waits for a decision."""
    return next((i for i, rule in enumerate(rules) if rule.accepted is None), None)


def typed(ask: Callable[[str], str]) -> str:
    """Return the letter of an answer, asked for until it is one; the end of the input quits."""
    while True:
        try:
            letter = ask(ANSWERS).strip().lower()[:1]
        except EOFError:
            return "q"
        if letter and letter in "aruq":
            return letter


def shown(rule: Rule, place: str) -> str:
    """Return a rule with its evidence in words."""
    words = " or ".join(f'"{word}"' for word in rule.words)
    asked = f'the model goes on from "{rule.template.strip()}" with' if rule.template else "it has"
    seen = rule.evidence
    right = round(seen.precision * seen.matches)
    lines = [
        "",
        f"{place}, round {rule.round}",
        f"If {asked} {words}, and a text is like",
        f"    {_short(rule.anchor)}" if rule.anchor else "    any",
        f"then it is: {rule.answer or f'class {rule.label}'}",
        f"Of {seen.matches} labelled texts that it fits, {right} are. Of the others it would label "
        f"{seen.coverage:.1%}:",
        *(f"  - {_short(text)}" for text in seen.examples),
    ]
    return "\n".join(lines)


def summary(rules: Sequence[Rule]) -> str:
    """Return how far a file is decided."""
    kept, left = len(files.accepted(rules)), sum(rule.accepted is None for rule in rules)
    told = f"{len(rules) - left} of {len(rules)} rules are decided, {kept} of them accepted."
    if left:
        return f"{told} The same command goes on with the other {left}."
    return f"{told} Give the run's command again to go on."


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]} …"
