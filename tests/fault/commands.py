"""Command lines as people mistype them: each is refused by name, or does just what it says.

A command restates settings as they are; one of its words is then mutated. What is accepted may
differ from the command before only in what the two words name, and has to hold what the new word
says. What is refused has to name the word in a few lines. None of them is run; extreme values are,
as some of them are wrong only then.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from crashes import Tally, ended, in_a_fork
from scenes import HERE, command

from effbench.api import registry
from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.api.stages import base as stages
from effbench.config.compose import compose
from effbench.config.files import groups
from effbench.util.errors import printable

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHORT = ["model=tiny", "dataset=arithmetic", "run.progress=false", *HERE, "dataset.limit.test=8"]
SIZES = ["train.max_steps=2", "train.batch_size=2"]
SMALL = {
    "fidelity": ["evaluator.fidelity.against=base"],
    "memory": ["evaluator.memory.prompt_tokens=16", "evaluator.memory.new_tokens=8"],
    "speed": ["evaluator.speed.prompt_tokens=16", "evaluator.speed.new_tokens=8"],
}
"""What an evaluator is given so that it fits the tiny model and takes no time."""

Draw = random.Random
Values = dict[str, Any]


@dataclass(frozen=True)
class Typed:
    """A command, one word of which was mutated."""

    kind: str
    words: tuple[str, ...]
    before: str
    """The word as it was; empty when the mutated one was added."""
    after: str
    right: str = ""
    """For a single typo in a name: what a suggestion should say."""
    base: tuple[str, ...] = ()


# -- commands --------------------------------------------------------------------------------------


@cache
def _all_commands() -> tuple[tuple[str, ...], ...]:
    """Return a command for every method and evaluator there is; some are refused as they stand."""
    found = []
    for name in registry.names("methods"):
        stage = registry.find("methods", name).stage
        found.append((stage, *SHORT, f"method={name}", *SIZES[: 2 * (stage == "train")]))
    for name in registry.names("evaluators"):
        stage = "eval" if registry.find("evaluators", name).needs_model else "simulate"
        found.append((stage, *SHORT, f"evaluator={name}", *SMALL.get(name, ())))
    return tuple(found)


@cache
def _job(words: tuple[str, ...]) -> Job | str:
    """Return the job of a command, or why there is none."""
    from effbench.util.errors import UserError

    try:
        return compose(words[0], words[1:])
    except UserError as error:
        return str(error)


def said_by(job: Job) -> Values:
    """Return the settings of a job by the words that set them, lists and mappings whole."""
    spec, runtime = plain(job.spec), plain(job.runtime)
    machine = {**runtime.pop("machine"), **runtime.pop("parallelism")}
    parts = {
        **{name: spec[name] for name in ("model", "dataset", "train")},
        "method": spec["method"]["settings"],
        "hardware": {**spec["hardware"], **machine},
        "run": runtime,
        **{f"evaluator.{e['name']}": e["settings"] for e in spec["evaluators"]},
    }
    found = {f"{part}.{key}": value for part, keys in parts.items() for key, value in keys.items()}
    found |= {"seed": spec["seed"], "from": spec["parent"], "stage": spec["stage"]}
    found |= {
        "method": spec["method"]["name"],
        "evaluator": [e["name"] for e in spec["evaluators"]],
    }
    return dict(_leaves(found))


def _leaves(values: Values) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves({f"{key}.{inner}": v for inner, v in value.items()})
        else:
            yield key, value


def _written(value: Any) -> str:
    """Return a value as somebody types it."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./-]+", value) else json.dumps(value)
    return json.dumps(value)


FILLED_IN = re.compile(r"\w+\.(name|fingerprint|known_by|known_as|labels|version|results)\b")


def _base(draw: Draw, every: int) -> tuple[str, ...]:
    """Draw one of every n-th command, with up to four settings restated as they are."""
    words = draw.choice(_all_commands()[::every])
    job = _job(words)
    if not isinstance(job, Job):
        return _base(draw, every)
    own = {w.partition("=")[0] for w in words[1:]}
    values = {k: v for k, v in said_by(job).items() if "." in k and k not in own}
    keys = sorted(k for k, v in values.items() if v not in ({}, None) and not FILLED_IN.match(k))
    more = draw.sample(keys, k=min(4, len(keys)))
    return (*words, *(f"{key}={_written(values[key])}" for key in more))


# -- mutations -------------------------------------------------------------------------------------


def _typo(draw: Draw, name: str) -> str:
    """Return a name with one slip: a letter left out, put in, exchanged, or two swapped."""
    place, letter = draw.randrange(len(name)), draw.choice(LETTERS)
    swapped = name[:place] + name[place + 1 : place + 2] + name[place] + name[place + 2 :]
    return draw.choice(
        (
            name[:place] + name[place + 1 :],
            name[:place] + letter + name[place:],
            name[:place] + letter + name[place + 1 :],
            swapped,
        )
    )


def _names_in(word: str) -> list[tuple[int, str]]:
    """Return what of a word is a name with more than two letters, with its place."""
    return [(m.start(), m[0]) for m in re.finditer(r"[a-z_][\w-]*", word) if len(m[0]) > 2]


def _mistyped(draw: Draw, base: tuple[str, ...]) -> Typed:
    words = [w for w in base if _is_name_word(w)]
    word = draw.choice(words)
    key, _, value = word.partition("=")
    names = _names_in(key if "." in key or value in ("true", "false") else word)
    start, name = draw.choice(names or _names_in(word))
    after = word[:start] + _typo(draw, name) + word[start + len(name) :]
    return _with(base, "single typos in names", word, after, name)


def _is_name_word(word: str) -> bool:
    return "." in word.partition("=")[0] or word.partition("=")[0] in (*groups(), *stages.names())


def _with(base: tuple[str, ...], kind: str, before: str, after: str, right: str = "") -> Typed:
    words = tuple(after if w == before else w for w in base)
    return Typed(kind, words, before, after, right, base)


def _setting(draw: Draw, base: tuple[str, ...]) -> tuple[str, str, str]:
    word = draw.choice([w for w in base[1:] if "=" in w])
    key, _, value = word.partition("=")
    return word, key, value


def _form(draw: Draw, base: tuple[str, ...]) -> Typed:
    """Miss, double or move the equals sign, or write the word in another odd form."""
    word, key, value = _setting(draw, base)
    after = draw.choice(
        (
            f"{key}{value}", f"{key} {value}", f"{key}=={value}", f"{key}={value}=",
            f"={key}={value}", f"{key}=", f"{key}", f"{key}= {value}", f"{key} = {value}",
            f"{key}:{value}", f"--{key}={value}", f"-{key}", f"~{key}", f"+{key}={value}",
            f"++{key}={value}", f"~{key}={value}", f".{key}={value}", f"{key}.={value}",
            f"{key.replace('.', '..')}={value}", f"{key.replace('.', '/')}={value}",
            f"{key.replace('.', '-')}={value}", f"{key}@x={value}", f"{key}.x={value}",
            f"{key}[0]={value}", f"{key}.0={value}", f"{key.upper()}={value}",
            f"{key}={value},", f"{key},={value}", f"{key}=({value})", f"{value}={key}", "",
            f"{key}={value};", f"{key}=${{{key}}}", f"{key}=${{nope}}", f"{key}=???",
        )
    )  # fmt: skip
    return _with(base, "odd forms of a word", word, after)


def _quoting(draw: Draw, base: tuple[str, ...]) -> Typed:
    word, key, value = _setting(draw, base)
    after = draw.choice(
        (
            f"{key}='{value}", f'{key}="{value}', f"{key}={value}'", f"'{key}={value}'",
            f"{key}='{value}'", f'{key}="{value}"', f"{key}=''", f'{key}=""', f"{key}=\\{value}",
            f"{key}={value}\\", f"{key}=''{value}''", f"{key}=[{value}", f"{key}={value}]",
            f"{key}={{{value}", f"{key}=({value}", f"{key}=`{value}`", f"{key}={value}#x",
            f"{key}={value} # x", f"{key}='{value}' x", f"{key}={value}\n", f"\t{key}={value}",
            f"{key}=$({value})", f"{key}=%{value}%", f"{key}={value}!", f"{key}=&{value}",
        )
    )  # fmt: skip
    return _with(base, "odd quoting", word, after)


def _type(draw: Draw, base: tuple[str, ...]) -> Typed:
    word, key, _ = _setting(draw, base)
    value = draw.choice(
        (
            "abc", "true", "null", "None", "[]", "{}", "[1,2]", "[aa,bb]", "{a:1}", "{a:{b:[1]}}",
            "1.5", "1", "'1'", "yes", "on", "[[1]]", "[null]", "[true]", "a.b", "/", "~", "1,2",
            "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "int(3)", "str(3)", "float(1)",
            "sort(3,1)", "shuffle(1,2)", "json_str({a:1})", "extend_list(1)", "tag(a,1)", "nope(1)",
        )
    )  # fmt: skip
    return _with(base, "wrong types", word, f"{key}={value}")


def _number(draw: Draw, base: tuple[str, ...]) -> Typed:
    numbers = [w for w in base[1:] if re.search(r"=-?\d", w)] or list(base[1:])
    word = draw.choice(numbers)
    value = draw.choice(
        (
            "-1", "0", "-0", "1e308", "1e400", "-1e-400", "1e-300", "nan", "-nan", "inf", "-inf",
            "NaN", "Infinity", str(2**31), str(2**63 - 1), str(2**63), str(-(2**63)), "9" * 400,
            "9" * 5000, "1_000", "0x10", "010", "1e1", "1.0", "+3", "0.1e", "1e40", "1,000", "1/2",
            "1e-45", "0.30000000000000004", "1.0000000000000000001", "3 ", "1e3", "-1e30",
        )
    )  # fmt: skip
    return _with(base, "odd numbers", word, f"{word.partition('=')[0]}={value}")


def _unicode(draw: Draw, base: tuple[str, ...]) -> Typed:
    word = draw.choice(base)
    place = draw.randrange(len(word) + 1)
    more = draw.choice(
        ("\u200b", "\u00a0", "\u202e", "\ufeff", "é", "e\u0301", "١", "３", "𝟛", "🦜", "ß", "漢",
         "\x1b[31m", "\udc80", "\ufffd", "\u2028", "\x07", "–", "“", "’", "＝", "\u0430", "\x85")
    )  # fmt: skip
    return _with(base, "unicode", word, word[:place] + more + word[place:])


def _twice(draw: Draw, base: tuple[str, ...]) -> Typed:
    word = draw.choice(base[1:])
    key, _, value = word.partition("=")
    after = draw.choice((word, f"{key}={_other(value)}", base[0], "", "--", "-m", key, f"+{word}"))
    words = list(base)
    words.insert(draw.randrange(1, len(words) + 1), after)
    return Typed("words twice, words more", tuple(words), word, after, base=base)


def _other(value: str) -> str:
    return str(int(value) + 1) if value.isdigit() else value


MUTATIONS: tuple[Callable[[Draw, tuple[str, ...]], Typed], ...] = (
    _mistyped, _mistyped, _form, _quoting, _type, _number, _unicode, _twice,
)  # fmt: skip


# -- what becomes of them --------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a mutated command ended."""

    wrong: str = ""
    refused: bool = False
    suggested: str | None = None
    """The first suggestion; None when the typo was another right name."""
    job: Job | None = None


def given(words: Sequence[str], root: Path) -> tuple[Any, list[Job]]:
    """Give a command whose runs are taken down in place of being run."""
    jobs: list[Job] = []

    def execute(job: Job, *_: object) -> Any:
        jobs.append(job)
        raise SystemExit(0)

    with (
        mock.patch("effbench.runner.local.execute", execute),
        mock.patch("effbench.runner.grid.work.execute", execute),
    ):
        try:
            return command(words, root), jobs
        except BaseException:
            return traceback.format_exc(), jobs


def judged(typed: Typed, root: Path) -> Outcome:
    """Give a mutated command and say what is wrong with what came of it."""
    said, jobs = given(typed.words, root)
    if isinstance(said, str):
        return Outcome(f"traceback: {said.strip().splitlines()[-1]}")
    if said.status:
        return Outcome(_ill_said(typed, said), True, _suggestion(said.err))
    if not jobs:
        return Outcome(
            "" if typed.words[0] != typed.base[0] else "nothing ran, and nothing was said"
        )
    return Outcome(_silent(typed, jobs[-1]), job=jobs[-1])


def _ill_said(typed: Typed, said: Any) -> str:
    text = " ".join(said.err.split())
    if said.status != 2 or "Traceback" in text:
        return f"status {said.status}: {text[-200:]}"
    message = said.err[said.err.find("Error:") :].strip()
    if len(message.splitlines()) > 6 or len(message) > 1200:
        return f"many words: {message[:200]}"
    if not any(" ".join(p.split()) in text for p in _parts(typed)):
        return f"{typed.after!r} is not named: {message[:300]}"
    return ""


def _parts(typed: Typed) -> list[str]:
    """Return what of a word may stand for it in a message."""
    found = [typed.after, typed.after.lstrip("+-~").partition("=")[0]]
    found += [p for p in re.split(r"[=.]", typed.after) if len(p) > 1]
    if typed.kind.startswith("words"):
        found += [typed.before.partition("=")[0]]
    shown = [printable(p) for p in found] + [repr(p)[1:-1] for p in found]
    return [p for p in shown if p.strip()] + ["''"] * (not typed.after.strip())


def _suggestion(text: str) -> str:
    after = re.search(r"Did you mean(?: one of)?:? (.*)", " ".join(text.split()))
    quoted = re.search(r"'([^']*)'", after[1]) if after else None
    return quoted[1] if quoted else ""


def _silent(typed: Typed, job: Job) -> str:
    """Say what an accepted word changed that it does not name, or did not change that it does."""
    base = _job(typed.base)
    assert isinstance(base, Job), (typed.base, base)
    before, after = said_by(base), said_by(job)
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    changed = {k for k in changed if not FILLED_IN.match(k)}
    strange = [
        k for k in sorted(changed) if not any(_under(k, w) for w in (typed.before, typed.after))
    ]
    if strange:
        key = strange[0]
        return f"{typed.after!r} changed {key} from {before.get(key)!r} to {after.get(key)!r}"
    last = [w for w in typed.words if _key(w) == _key(typed.after)][-1:]
    key, equals, value = "".join(last).lstrip("+").partition("=")
    if not equals or key in groups() or key.split(".")[0] in ("launcher", "hydra"):
        return ""
    now = {k: v for k, v in after.items() if k == key or k.startswith(f"{key}.")}
    if not now and not key.startswith("~"):
        return f"{typed.after!r} set nothing"
    return "" if key not in now or _says(value, now[key]) else f"{typed.after!r} gave {now[key]!r}"


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


DERIVED = {
    "method": ("method", "train.learning_rate"),
    "train.epochs": ("train.epochs", "train.max_steps"),
    "train.max_steps": ("train.epochs", "train.max_steps"),
}


def _under(key: str, word: str) -> bool:
    """Whether a setting is one that a word names."""
    named = _key(word)
    if named in stages.names() or named == "experiment":
        return True
    return any(key == n or key.startswith(f"{n}.") for n in DERIVED.get(named, (named,)))


def _says(text: str, value: Any) -> bool:
    """Whether a value is what a text says, as far as that is beyond doubt."""
    text = text.strip()
    if isinstance(value, bool):
        return text.lower() in (("false", "no", "off"), ("true", "yes", "on"))[value]
    if isinstance(value, int | float):
        try:
            plain_text = text.replace("_", "")
            return plain_text == str(value) or float(plain_text) == value
        except ValueError:
            return text == "null" or "(" in text or "$" in text
    if isinstance(value, str) and not re.search(r"[\\$'\"(\[{]", text):
        return value == text or text == "null"
    return True


def mutated(count: int, every: int = 1, seed: int = 0) -> Iterator[Typed]:
    """Draw mutations of every n-th command."""
    draw = Draw(seed)
    for number in range(count):
        yield MUTATIONS[number % len(MUTATIONS)](draw, _base(draw, every))


# -- extreme values, to the end --------------------------------------------------------------------

EXTREMES = ("0", "1", "1048576", str(2**31), str(2**53 - 1), "1e-300", "1e-30", "1e40", "1e300")
LONGEST = 8
"""Seconds after which an accepted command is held to run."""
MEMORY = 12 << 30
"""Bytes that it may map."""


def extremes(every: int = 1) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield every n-th command with a word more that gives a numeric setting an extreme value."""
    seen = set()
    for words in _all_commands()[every // 2 :: every]:
        job = _job(words)
        if isinstance(job, Job):
            for key, value in said_by(job).items():
                numeric = value is None or isinstance(value, int | float)
                own = (key, job.spec.method.name if key.startswith("method") else "")
                if numeric and not isinstance(value, bool) and own not in seen:
                    seen.add(own)
                    yield from ((words, f"{key}={extreme}") for extreme in EXTREMES)


def try_extremes(root: Path, chosen: Callable[[int], bool], every: int = 1) -> Tally:
    """Run what is accepted of extreme values, of every n-th command: it ends well, or in words."""
    tally = Tally("extreme values")
    for number, (words, word) in enumerate(extremes(every)):
        tally.points += 1
        if chosen(number):
            tally.tried += 1
            if wrong := _run_through((*words, word), root / str(number)):
                tally.wrong.append(f"{' '.join(words)} {word}: {wrong}")
    return tally


def _run_through(words: Sequence[str], root: Path) -> str:
    """Give a command in a fork, with its run in it; return what is wrong with how it ended."""
    answer = root / "answer"

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(LONGEST)
        said = command(words, root / "results")
        if said.status not in (0, 2) or (said.status and "Error:" not in said.err):
            raise RuntimeError(f"status {said.status}: {said.err[-300:]}")

    def told() -> None:
        try:
            run()
        except BaseException:
            answer.write_text(traceback.format_exc()[-500:])
            raise

    root.mkdir(parents=True)
    status = ended(in_a_fork(told))
    found = answer.read_text() if answer.exists() else ""
    shutil.rmtree(root)
    return found or ("" if status in (0, -signal.SIGALRM) else f"it died: {status}")


# -- all of them -----------------------------------------------------------------------------------


def try_commands(root: Path, count: int, every: int = 1) -> Iterator[Tally]:
    """Give mutated commands; yield a tally of each kind, and one of the first suggestions."""
    tallies: dict[str, Tally] = {}
    first = Tally("first suggestions for single typos")
    missed = []
    for typed in mutated(count, every):
        tally = tallies.setdefault(typed.kind, Tally(f"commands: {typed.kind}"))
        outcome = judged(typed, root)
        tally.points += 1
        tally.tried += 1
        if outcome.wrong:
            tally.wrong.append(f"{' '.join(map(repr, typed.words))}: {outcome.wrong}")
        if typed.right and outcome.refused:
            first.points += 1
            first.tried += 1
            if outcome.suggested.rpartition(".")[2] != typed.right:
                missed.append(f"{typed.after} ({typed.right}): {outcome.suggested or 'none'}")
    yield from tallies.values()
    if len(missed) > 0.02 * first.tried:
        first.wrong = missed
    first.name = f"{first.name}, {1 - len(missed) / max(1, first.tried):.1%} right"
    yield first
