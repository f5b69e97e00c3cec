"""`effbench generate` and `effbench chat`."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from effbench.config.compose import compose
from effbench.runner.try_out import Speaker, _pieces
from effbench.util.errors import UserError

Cli = Callable[..., tuple[int, str, str]]
TINY = ("model=tiny", "dataset=arithmetic", "hardware.threads=1")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("effbench.cli.talk.write", lines.append)
    return lines


def test_it_goes_on_from_a_prompt_and_says_how_fast(cli: Cli, said: list[str]) -> None:
    status, out, _ = cli("generate", *TINY, "--prompt", "2 + 2", "--max-new-tokens", "5")
    assert status == 0 and out.endswith("\n")
    assert said[0].startswith("[5 tokens, ") and "after a prompt of 5" in said[0]


def test_a_chat_remembers_and_begins_anew(
    cli: Cli, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "ab\ncd\n/clear\n/help\n\nef\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    lines = iter(typed.splitlines())
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    status, _, _ = cli("chat", *TINY, "--max-new-tokens", "2")
    assert status == 0 and "no chat template" in said[0]
    prompts = [line.partition("prompt of ")[2].partition(",")[0] for line in said if "[" in line]
    assert "There is no /help. /clear begins anew, /quit or Ctrl-D ends." in said
    assert prompts[0] == prompts[2] == "2" and int(prompts[1]) > 5


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--prompt", " "], "There is no prompt"),
        (["--prompt", "caf\udce9"], "not UTF-8"),
        (["--prompt", "2", "--point", "r4"], "has no point 'r4'"),
        (["--prompt", "2", "--max-new-tokens", "100000"], "positions"),
    ],
)
def test_what_cannot_be_is_said(cli: Cli, words: list[str], why: str) -> None:
    status, _, err = cli("generate", *TINY, *words)
    assert status == 2 and why in err


@pytest.mark.parametrize("command", [["generate", "--prompt", "2"], ["chat"]])
def test_what_writes_no_text_says_so_whatever_the_dataset_is(cli: Cli, command: list[str]) -> None:
    status, _, err = cli(*command, "model=tiny-encoder")
    assert status == 2 and "writes no text here" in err and "evaluator=choices" in err


def test_what_answers_with_a_head_of_its_own_writes_no_text(tmp_path: Path) -> None:
    job = compose("train", [*TINY, "dataset=noisy-pairs", "method=reward", "evaluator=[]"])
    with pytest.raises(UserError, match=r"answers with a head of its own \(reward\)"):
        Speaker.of(job, "", tmp_path)


def test_an_encoder_reads_a_conversation_as_a_closed_text(tmp_path: Path) -> None:
    job = compose("eval", ["model=tiny-seq2seq", "hardware.device=cpu", "evaluator=[]"])
    speaker = Speaker.of(job, "", tmp_path)
    tokenizer = speaker.tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = speaker.rendered([("user", "ab")])
    tokenizer._tokenizer.post_processor = TemplateProcessing("$A <e>", special_tokens=[("<e>", 7)])
    assert speaker.rendered([("user", "ab")]) == [*plain, 7]


def test_no_character_is_broken() -> None:
    text = "a€é".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    assert list(_pieces(iter(text), decode)) == ["a", "€", "é"]
    assert list(_pieces(iter(text[:-1]), decode)) == ["a", "€", "�"]
