"""Instructions that can be verified, against lm-eval's own checkers."""

from __future__ import annotations

import random
import sys
import types
from typing import Any

import pytest

from effbench.evaluators.ifeval import RULES, follows, grades, supported, variants

TEXTS = [
    "Hello there. This is fine! Is it? Yes, it is.",
    "* one\n* two\n- three\n\n** not a bullet",
    "*a* and **b** and ** ** and *\n*",
    "First part\n***\nSecond part *** Third\n***\n",
    "***\n\n***",
    "Section 1\nText\nSECTION 2\nSection 3 more",
    '\'"Quoted," word\n\nsecond Paragraph\n\n\n\nfourth? one',
    '"all of it is quoted"',
    '{"a": [1, 2]}',
    '```json\n{"a": 1}\n```',
    "```\nnot json\n```",
    "<<A title>> and <<>> and < <no> >",
    "<<   >>",
    "One answer ****** another answer",
    "Same ****** Same",
    "a ****** ****** b",
    "My answer is maybe. And so on",
    "text\nP.S. one more\nP. P. S two more",
    "THE WHOLE TEXT IS LOUD: 12 TIMES",
    "all of this is quiet [name] [address] [] x",
    "MIXED case with ONE, TWO-PART and THREE's",
    "repeat this request\nand then answer. Any other questions?",
    "Sure, here it is:\nall lower\nBye!",
    "",
    "   \n ",
    ",",
    "x",
]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "keywords:existence": [{"keywords": ["this", "is"]}, {"keywords": ["fine", "zebra"]}],
    "keywords:frequency": [
        {"keyword": "is ", "frequency": 2, "relation": r} for r in ("less than", "at least")
    ],
    "keywords:forbidden_words": [{"forbidden_words": ["one", "fin"]}],
    "keywords:letter_frequency": [
        {"letter": "T", "let_frequency": 3, "let_relation": r} for r in ("less than", "at least")
    ],
    "length_constraints:number_paragraphs": [{"num_paragraphs": n} for n in (1, 2, 3)],
    "length_constraints:number_words": [
        {"num_words": 6, "relation": r} for r in ("less than", "at least")
    ],
    "length_constraints:nth_paragraph_first_word": [
        {"num_paragraphs": 3, "nth_paragraph": n, "first_word": w}
        for n, w in ((1, "Quoted"), (2, "second"), (3, "fourth"))
    ],
    "detectable_content:number_placeholders": [{"num_placeholders": n} for n in (1, 3, 4)],
    "detectable_content:postscript": [{"postscript_marker": m} for m in ("P.S.", "P.P.S", "Bye")],
    "detectable_format:number_bullet_lists": [{"num_bullets": n} for n in (1, 3)],
    "detectable_format:constrained_response": [{}],
    "detectable_format:number_highlighted_sections": [{"num_highlights": n} for n in (1, 3)],
    "detectable_format:multiple_sections": [
        {"section_spliter": "Section", "num_sections": n} for n in (1, 2, 3)
    ],
    "detectable_format:json_format": [{}],
    "detectable_format:title": [{}],
    "combination:two_responses": [{}],
    "combination:repeat_prompt": [{"prompt_to_repeat": "Repeat this request"}],
    "startend:end_checker": [{"end_phrase": "Any other questions?"}],
    "change_case:english_capital": [{}],
    "change_case:english_lowercase": [{}],
    "punctuation:no_comma": [{}],
    "startend:quotation": [{}],
}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's checkers, with everything in English and no download."""
    import nltk

    english = types.ModuleType("langdetect")
    english.detect = lambda text: "en"  # type: ignore[attr-defined]
    english.LangDetectException = ValueError  # type: ignore[attr-defined]
    frozen = types.ModuleType("immutabledict")
    frozen.immutabledict = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "langdetect", english)
    monkeypatch.setitem(sys.modules, "immutabledict", frozen)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    for name in [m for m in sys.modules if m.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    import lm_eval.tasks.ifeval.utils as utils

    yield utils
    for name in [m for m in sys.modules if m.startswith("lm_eval.tasks.ifeval")]:
        del sys.modules[name]


def test_it_judges_as_lm_eval_does(theirs: Any) -> None:
    random.seed(0)
    seen: dict[str, set[float]] = {}
    for name, cases in SETTINGS.items():
        for settings in cases:
            row = {"key": 1, "prompt": "p", "instruction_id_list": [name], "kwargs": [settings]}
            for text in [*TEXTS, *(f"{a}\n{b}" for a in TEXTS for b in TEXTS)]:
                ours, expected = grades(row, text), theirs.process_results(row, [text])
                for metric, value in expected.items():
                    value = [float(v) for v in value] if isinstance(value, list) else float(value)
                    assert ours[metric] == value, (name, settings, text, metric)
                seen.setdefault(name, set()).add(float(ours["prompt_level_strict_acc"]))  # type: ignore
    assert all(values == {0.0, 1.0} for values in seen.values()), seen
    rest = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
    assert set(SETTINGS) | rest == set(RULES)
    named = set(theirs.instructions_registry.INSTRUCTION_DICT)
    assert named - set(RULES) == {"language:response_language"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One.", 1),
        ("One. Two! Three?", 3),
        ("No end", 1),
        ('He said "Yes." Then he went (at last.) End', 3),
        ("Pi is 3.14 or so.\nNew line", 2),
        ("Wait... what?", 2),
    ],
)
def test_sentences(text: str, count: int) -> None:
    name = "length_constraints:number_sentences"
    for n in (count - 1, count, count + 1):
        if n:
            assert follows(name, text, {"num_sentences": n, "relation": "at least"}) == (count >= n)
            assert follows(name, text, {"num_sentences": n, "relation": "less than"}) == (count < n)


def test_words_in_capitals() -> None:
    name, text = "change_case:capital_word_frequency", TEXTS[20]
    for n in (3, 4, 5):
        settings = {"capital_frequency": n, "capital_relation": "at least"}
        assert follows(name, text, settings) == (n <= 3)


def test_what_cannot_be_judged_is_not() -> None:
    row = {"instruction_id_list": ["punctuation:no_comma", "language:response_language"]}
    assert not supported(row)
    assert supported({"instruction_id_list": ["punctuation:no_comma"]})


def test_the_loose_score_tries_eight_forms() -> None:
    assert variants("a\n*b*\nc") == [
        "a\n*b*\nc",
        "a\nb\nc",
        "*b*\nc",
        "b\nc",
        "a\n*b*",
        "a\nb",
        "*b*",
        "b",
    ]
    row = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    found = grades(row, "Sure, here:\nno comma")
    assert found["prompt_level_strict_acc"] == 0 and found["prompt_level_loose_acc"] == 1
