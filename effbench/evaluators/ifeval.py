"""Whether a text follows instructions that can be verified by rule.

The instructions are those of Zhou et al., "Instruction-Following Evaluation for Large Language
Models", 2023, arXiv 2311.07911, and each is judged as lm-eval's task `ifeval` judges it. That task
itself needs a language detector and a download of NLTK's sentence splitter; here instead

    - the language of a response is not judged at all: such questions are left out and counted;
    - text in all capitals or in lower case is not also tested for being English;
    - sentences end at `.`, `!` or `?` before white space, so "e.g. this" counts as two;
    - words in capitals are runs of letters, digits, hyphens and apostrophes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]
Rule = Callable[[str, Settings], bool]


def follows(name: str, text: str, settings: Settings) -> bool:
    """Return whether a text that is not empty follows an instruction.

    Args:
        name: A key of `RULES`.
        text: The whole response.
        settings: What the row gives for this instruction.
    """
    return bool(text.strip()) and RULES[name](text, settings)


def variants(text: str) -> list[str]:
    """Return the forms of a response that the loose score tries.

    As it is, without its first line, its last line or both, and each of them without asterisks.
    """
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return [form for t in (text, *cut) for form in (t, t.replace("*", ""))]


def grades(row: Mapping[str, Any], text: str) -> dict[str, float | list[float]]:
    """Return lm-eval's four metrics of one response.

    Args:
        row: With `instruction_id_list` and `kwargs`, one for each instruction.
        text: The response.
    """
    pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    strict = [float(follows(name, text, settings)) for name, settings in pairs]
    forms = variants(text)
    loose = [
        float(any(follows(name, form, settings) for form in forms)) for name, settings in pairs
    ]
    return {
        "prompt_level_strict_acc": float(all(strict)),
        "inst_level_strict_acc": strict,
        "prompt_level_loose_acc": float(all(loose)),
        "inst_level_loose_acc": loose,
    }


def supported(row: Mapping[str, Any]) -> bool:
    """Return whether every instruction of a row can be judged here."""
    return all(name in RULES for name in row["instruction_id_list"])


# -- the rules -----------------------------------------------------------------------------------


def _compared(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _keywords(text: str, s: Settings) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in s["keywords"])


def _frequency(text: str, s: Settings) -> bool:
    count = len(re.findall(s["keyword"].strip(), text, re.IGNORECASE))
    return _compared(count, s["relation"], s["frequency"])


def _forbidden(text: str, s: Settings) -> bool:
    words = s["forbidden_words"]
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in words)


def _letters(text: str, s: Settings) -> bool:
    count = text.lower().count(s["letter"].strip().lower())
    return _compared(count, s["let_relation"], s["let_frequency"])


def _sentences(text: str, s: Settings) -> bool:
    count = len(re.findall(r"\S.*?(?:[.!?]+[\"')\]]*(?=\s|$)|$)", text.strip(), re.DOTALL))
    return _compared(count, s["relation"], s["num_sentences"])


def _words(text: str, s: Settings) -> bool:
    return _compared(len(re.findall(r"\w+", text)), s["relation"], s["num_words"])


def _paragraphs(text: str, s: Settings) -> bool:
    """Count what stands between lines of three asterisks; nothing may be empty but the ends."""
    parts = [p.strip() for p in re.split(r"\s?\*\*\*\s?", text)]
    count = sum(map(bool, parts))
    return all(parts[1:-1]) and count == s["num_paragraphs"]


def _first_word(text: str, s: Settings) -> bool:
    parts = text.split("\n\n")
    count, place = sum(bool(p.strip()) for p in parts), s["nth_paragraph"]
    if count != s["num_paragraphs"] or place > count or not parts[place - 1].strip():
        return False
    word = parts[place - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == s["first_word"].lower()


def _placeholders(text: str, s: Settings) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= s["num_placeholders"]


def _postscript(text: str, s: Settings) -> bool:
    marker = s["postscript_marker"].strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), text.lower()))


def _bullets(text: str, s: Settings) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == s["num_bullets"]


def _one_of_three(text: str, s: Settings) -> bool:
    return any(f"My answer is {word}." in text for word in ("yes", "no", "maybe"))


def _highlights(text: str, s: Settings) -> bool:
    single = [h.strip("*") for h in re.findall(r"\*[^\n\*]*\*", text)]
    double = [h[2:-2] for h in re.findall(r"\*\*[^\n\*]*\*\*", text)]
    return sum(bool(h.strip()) for h in (*single, *double)) >= s["num_highlights"]


def _sections(text: str, s: Settings) -> bool:
    mark = s["section_spliter"].strip()
    return len(re.findall(rf"\s?{mark}\s?\d+\s?", text)) >= s["num_sections"]


def _json(text: str, s: Settings) -> bool:
    body = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def _title(text: str, s: Settings) -> bool:
    found = re.findall(r"<<[^\n]+>>", text)
    return any(title.lstrip("<").rstrip(">").strip() for title in found)


def _two_responses(text: str, s: Settings) -> bool:
    parts = [p.strip() for p in text.split("******")]
    answers = [p for p in parts if p]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeats(text: str, s: Settings) -> bool:
    return text.strip().lower().startswith(s["prompt_to_repeat"].strip().lower())


def _end(text: str, s: Settings) -> bool:
    return text.strip().strip('"').lower().endswith(s["end_phrase"].strip().lower())


def _capital_words(text: str, s: Settings) -> bool:
    count = sum(word.isupper() for word in re.findall(r"\w[\w'-]*", text))
    return _compared(count, s["capital_relation"], s["capital_frequency"])


def _quoted(text: str, s: Settings) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == body[-1] == '"'


RULES: dict[str, Rule] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letters,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _one_of_three,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _end,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text, s: text.isupper(),
    "change_case:english_lowercase": lambda text, s: text.islower(),
    "punctuation:no_comma": lambda text, s: "," not in text,
    "startend:quotation": _quoted,
}
"""Every instruction that is judged, by its name in the data."""
