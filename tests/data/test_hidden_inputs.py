"""What a template or a tokenizer could ask the machine for is fixed, or in the key of the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import effbench
from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.data import tokens
from effbench.data.render import Text
from effbench.data.tokenise import tokenise
from effbench.data.tokens import chat_prompt, tokenizer_hash
from effbench.models.load import load_tokenizer

DATED = "{{ strftime_now('%d %b %Y, %A %H %p') }}: {{ messages[0]['content'] }}"
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}Today Date: {{ date_string }}"
)


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model)


ROUNDABOUT = "\n{% set f = strftime_now %}{{ f('%Y-%m-%d %-d %B') }}"


@pytest.mark.parametrize(
    "template, shown",
    [
        (DATED, "26 Jul 2024, Friday 12 PM: Hi"),
        (LLAMA, "Today Date: 26 Jul 2024"),
        (ROUNDABOUT, "\n2024-07-26 26 July"),
        ("\nPlain {{ messages[0]['content'] }}", "\nPlain Hi"),
    ],
)
def test_a_chat_template_is_told_the_same_date_each_day(
    tokenizer: Any, template: str, shown: str
) -> None:
    tokenizer.chat_template = template
    assert chat_prompt("Hi", tokenizer) == shown


def test_chat_templates_are_filled_in_one_place() -> None:
    files = Path(effbench.__file__).parent.rglob("*.py")
    callers = [p.name for p in files if re.search(r"\.apply_chat_template\(", p.read_text())]
    assert callers == ["tokens.py"]


CHANGES: dict[str, Callable[[Any], object]] = {
    "chat template": lambda t: setattr(t, "chat_template", "x"),
    "special token": lambda t: setattr(t, "bos_token", "b"),
    "added token": lambda t: t.add_tokens(["qqq"]),
    "setting": lambda t: t.init_kwargs.update(add_prefix_space=True),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_tokens_changes_the_hash_of_a_tokenizer(tokenizer: Any, what: str) -> None:
    before = tokenizer_hash(tokenizer)
    CHANGES[what](tokenizer)
    assert tokenizer_hash(tokenizer) != before


def test_another_library_changes_the_hash_of_a_tokenizer(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tokenizer_hash(tokenizer)
    monkeypatch.setattr(tokens, "version", lambda name: "0.0.1")
    assert tokenizer_hash(tokenizer) != before


def test_where_a_tokenizer_lies_does_not_change_its_hash(tokenizer: Any, tmp_path: Path) -> None:
    found = set()
    for name in ("a", "b"):
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        from transformers import AutoTokenizer

        found.add(tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / name)))
    assert len(found) == 1


def test_a_flipped_digit_in_the_cache_of_tokens_is_seen(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effbench.data.assets.cache_dir", lambda: tmp_path)
    spec = DatasetSpec(name="x", source="file", kind="pairs")
    texts = [Text("a" * 16, "1 + 1 =", " 2")]
    [example] = tokenise(texts, spec, tokenizer)
    [path] = tmp_path.rglob("*.json")
    check, _, body = path.read_text().partition("\n")
    values = json.loads(body)
    values[0]["sequences"][0]["ids"][1] += 1
    path.write_text(f"{check}\n{json.dumps(values)}")
    assert tokenise(texts, spec, tokenizer) == [example]
