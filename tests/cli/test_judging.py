"""`effbench judge`: a dialogue about rules, whose every decision is in the file at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from effbench.cli.judging import judge_file
from effbench.nn.weak_labels import rules
from effbench.nn.weak_labels.rules import Evidence, Rule
from effbench.util.errors import UserError

Cli = Callable[..., tuple[int, str, str]]
SEEN = Evidence(5, 0.8, 0.021, ("a dull film", "x" * 1000))
RULES = [
    Rule((word,), 0, "what a  mess", "It was", 1, "negative", evidence=SEEN)
    for word in ("bad", "dull", "poor")
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rules.write(tmp_path / "rules.jsonl", RULES)
    return tmp_path / "rules.jsonl"


def answer(path: Path, typed: str) -> str:
    """Return what was said while these letters were typed, one after the other."""
    letters, said = iter(typed), list[str]()

    def ask(_: str) -> str:
        letter = next(letters, None)
        if letter is None:
            raise EOFError
        return letter

    judge_file(path, ask, said.append)
    return "\n".join(said)


def decisions(path: Path) -> list[bool | None]:
    return [rule.accepted for rule in rules.read(path)]


def test_a_rule_is_shown_with_its_evidence(path: Path) -> None:
    said = answer(path, "q")
    for words in ("Rule 1 of 3, round 1", 'from "It was" with "bad"', "what a mess", "negative"):
        assert words in said
    assert "Of 5 labelled texts that it fits, 4 are" in said and "2.1%" in said
    assert "a dull film" in said and "x" * 301 not in said
    assert decisions(path) == [None] * 3


def test_decisions_can_be_undone_and_odd_letters_are_asked_again(path: Path) -> None:
    assert "nothing to undo" in answer(path, "u?aru r".replace(" ", "") + "a")
    assert decisions(path) == [True, False, True]


def test_a_dialogue_goes_on_where_it_stopped(path: Path) -> None:
    assert "other 2" in answer(path, "a")  # the input ends
    assert decisions(path) == [True, None, None]
    said = answer(path, "ra")
    assert "Rule 1 of" not in said and "2 of them accepted" in said
    assert {rule.by for rule in rules.read(path)} == {"person"}
    assert "3 of 3 rules are decided" in answer(path, "")


def test_an_earlier_sitting_can_be_undone(path: Path) -> None:
    answer(path, "a")
    answer(path, "urq")
    assert decisions(path) == [False, None, None]


def test_each_decision_is_written_before_the_next_question(path: Path) -> None:
    def ask(_: str) -> str:
        if decisions(path)[0] is not None:
            raise KeyboardInterrupt
        return "a"

    with pytest.raises(KeyboardInterrupt):
        judge_file(path, ask, lambda _: None)
    assert decisions(path) == [True, None, None]


def test_the_command_reads_the_keyboard(
    cli: Cli, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = iter("rrr")
    monkeypatch.setattr("builtins.input", lambda _: next(letters))
    status, out, _ = cli("judge", str(path))
    assert status == 0 and "0 of them accepted" in out
    assert decisions(path) == [False] * 3
    status, _, err = cli("judge", str(path) + "x")
    assert status == 2 and "is not a file" in err


def test_a_broken_line_is_named(path: Path) -> None:
    path.write_text("{\n")
    with pytest.raises(UserError, match="line 1"):
        answer(path, "")
