"""The words of a command line: which names they use, and whether those exist."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin, get_type_hints

from effbench.api.schema import WRITE_UTF8
from effbench.api.stages import base as stages
from effbench.config.code import refuse_code_in_word
from effbench.config.files import groups, keys_of, options, unknown
from effbench.util.errors import UserError, did_you_mean, require_unicode

if TYPE_CHECKING:
    from effbench.api.spec import Stage

TOP_LEVEL = {"seed", "from", "train", "run", "hydra"}
JUDGED_BY_US = {"model", "dataset", "method", "hardware", "train", "run"}
"""Parts of a config whose keys a dataclass judges, so that a file need not name every key."""
SEVERAL = {"evaluator"}
"""Groups of which a config takes any number of members."""


def is_sweep(overrides: Iterable[str]) -> bool:
    """Whether the overrides name a grid, or another launcher than this machine."""
    return any(re.match(r"launcher=(?!local$)|sweep=", o) for o in overrides)


@dataclass(frozen=True)
class CheckedOverrides:
    """Checked overrides."""

    words: list[str]
    """As Hydra takes them."""
    chosen: set[str]
    """The groups and keys that they set."""
    swept: str = ""
    """The first one that asks for several runs."""

    def with_defaults(self, stage: Stage | None) -> list[str]:
        """Return the words, with those that the stage takes when they name none.

        Args:
            stage: The command; None stands for the first stage.
        """
        taken = stages.find(stage or stages.names()[0])
        words = list(self.words)
        if not self.chosen & {"method", "experiment"}:
            words.append(f"method={taken.method}")
        if taken.evaluators and not self.chosen & {"evaluator", "experiment"}:
            words.append(f"evaluator=[{','.join(taken.evaluators)}]")
        return words


def _as_override(text: str) -> str:
    """Return how to write a word that is no override."""
    key, _, value = text.partition("=")
    kept = ",".join(filter(None, value.split(",")))
    if key and kept and kept != value and re.fullmatch(r"[\w./@+~,=-]+", text):
        return f"A value is missing beside a comma: {key}={kept}"
    return (
        "Write key=value, for example method=qdylora or train.max_steps=100; "
        "quote values with spaces, commas or braces: 'dataset.prompt=\"{question}\"'."
    )


def check_overrides(overrides: Sequence[str], extra: Sequence[Path] = ()) -> CheckedOverrides:
    """Check the names in overrides.

    Raises:
        UserError: For a word that is no override, an unknown group, key or config name.
    """
    from hydra.errors import HydraException

    known = groups(extra)
    words, chosen, swept = [], set(), ""
    for text in overrides:
        require_unicode(text, ascii(text.partition("=")[0])[1:-1], WRITE_UTF8)
        try:
            override = parse(text)
        except HydraException:
            raise UserError(f"{text!r} is not an override.", _as_override(text)) from None
        key = override.key_or_group
        refuse_code_in_word(f"{key}{'@' if override.package else ''}", text)
        text = _kept_as_text(key, text, overrides)
        top = key.split(".")[0].split("/")[0].split("@")[0]
        if top == "sweep":
            raise UserError(f"{text} is of a grid.", "Add -m to train, compress or eval.")
        if top not in TOP_LEVEL and top not in known:
            raise UserError(
                f"There is no config group or key {top!r}.",
                did_you_mean(top, [*known, *TOP_LEVEL]),
            )
        if key in known:
            text = _check_group(override, text, extra)
        elif top in JUDGED_BY_US and "." in key and not override.is_delete():
            text = "++" + text.lstrip("+")
        elif top in SEVERAL and key.count(".") > 2:  # a key inside a setting, such as `files`
            _check_member(key, text, overrides)
            text = "++" + text.lstrip("+")
        words.append(text)
        chosen.add(key)
        swept = swept or (text.lstrip("+") if override.is_sweep_override() else "")
    return CheckedOverrides(words, chosen, swept)


@lru_cache(maxsize=8192)
def parse(text: str) -> Any:
    """Return a word as Hydra reads it.

    Raises:
        HydraException: When it is no override.
        UserError: When it holds a number with thousands of digits.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        return OverridesParser.create().parse_override(text)
    except ValueError:  # Python reads no integer of more than 4,300 digits
        key = text.partition("=")[0]
        raise UserError(f"{key} has a number that is too long.", "Write it as 1e6.") from None


# -- text that looks like a number -------------------------------------------------------------


QUOTED = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")""")
ITEM = re.compile(r"(?:(?<=^)|(?<=[\[({,:]))(\s*)([\w.+-]+)(\s*)(?=$|[\])},])")
"""A value or an item of a list, of a mapping or of a sweep."""
FUNCTION = re.compile(r"(?!choice\()\w+\(")


def _kept_as_text(key: str, text: str, overrides: Sequence[str]) -> str:
    """Return an override in whose value nothing is read as a number where text is wanted.

    Keys of runs, revisions and names may look like numbers: Hydra would read 0e09 as 0.0.
    """
    name, equals, value = text.partition("=")
    if FUNCTION.match(value) or not any(_is_number(m[2]) for m in ITEM.finditer(value)):
        return text
    if not any(_is_text(hint) for hint in _hints(key, overrides)):
        return text
    parts = QUOTED.split(value)
    parts[::2] = [ITEM.sub(_quoted, part) for part in parts[::2]]
    return f"{name}{equals}{''.join(parts)}"


def _quoted(item: re.Match[str]) -> str:
    before, word, after = item.groups()
    return f"{before}'{word}'{after}" if _is_number(word) else item[0]


def _is_number(word: str) -> bool:
    """Whether Hydra reads a word as a number or a truth value."""
    try:
        float(word)
    except ValueError:
        return word.lower() in ("true", "false")
    return True


def _hints(key: str, overrides: Sequence[str]) -> list[Any]:
    """Return the annotations of what a key sets, as far as they can be known before composing."""
    from effbench.api import registry, spec

    top, *path = key.split(".")
    if top == "from":
        return [str]
    parts: dict[str, list[Any]] = {
        "model": [spec.ModelSpec],
        "dataset": [spec.DatasetSpec],
        "train": [spec.TrainSpec],
        "hardware": [spec.HardwareSpec, spec.Machine, spec.Parallelism],
        "run": [spec.Runtime],
    }
    if top == "evaluator" and path and path[0] in registry.names("evaluators"):
        parts[top] = [registry.find("evaluators", path.pop(0))]
    elif top == "method":
        words = [w.partition("=")[2] for w in overrides if w.startswith("method=")]
        chosen = {n for w in words for n in w.split(",")}
        chosen = chosen or {stages.find(stage).method for stage in stages.names()}
        known = chosen.intersection(registry.names("methods"))
        parts[top] = [registry.find("methods", name) for name in known]
    return [hint for part in parts.get(top, ()) for hint in _inside(part, path)]


@lru_cache(maxsize=256)
def _hints_of(kind: Any) -> dict[str, Any]:
    """Return the annotations of a class, evaluated once."""
    return get_type_hints(kind)


def _inside(hint: Any, path: Sequence[str]) -> list[Any]:
    """Return the annotations at a path of names in an annotation."""
    if not path:
        return [hint]
    found = []
    for kind in (hint, *get_args(hint)):
        if is_dataclass(kind) and path[0] in (hints := _hints_of(cast(Any, kind))):
            found += _inside(hints[path[0]], path[1:])
        elif get_origin(kind) is dict:
            found += _inside(get_args(kind)[1], path[1:])
    return found


def _is_text(hint: Any) -> bool:
    """Whether an annotation takes text, or a list or mapping of it, and no number."""
    if get_origin(hint) is dict:
        return _is_text(get_args(hint)[1])
    if get_origin(hint) is Literal:
        return all(isinstance(value, str) for value in get_args(hint))
    kinds = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)]
    return all(map(_is_text, kinds)) if kinds else hint is str


# -- groups and members ------------------------------------------------------------------------


def _check_member(key: str, text: str, overrides: Sequence[str]) -> None:
    """Refuse a key inside a setting of what is not chosen, or of no setting that there is."""
    group, name, setting, *_ = key.split(".")
    words = [w for w in overrides if w.partition("=")[0] in (group, "experiment")]
    known = options(group)
    there = name in known and setting in keys_of(group, name, known[name])
    if not there or not any(name in w for w in words):
        raise _explain_member(group, name, f"{group}.{name}.{setting}={text.partition('=')[2]}")


def _check_group(override: Any, text: str, extra: Sequence[Path]) -> str:
    """Return the override of a whole group as Hydra takes it."""
    group, value = override.key_or_group, override._value
    for name in _names_in(override):
        _check_option(group, name, extra)
    empty = override.is_delete() or value is None
    if empty and group in SEVERAL:
        return f"{group}=[]"
    if (empty and group != "experiment") or (isinstance(value, list) and group not in SEVERAL):
        raise UserError(f"A run has exactly one {group}.", did_you_mean("", options(group, extra)))
    return text


def _names_in(override: Any) -> list[str]:
    """Return the options that an override names.

    Raises:
        UserError: When a list holds what is no name, which Hydra would not bear.
    """
    from hydra.core.override_parser.types import QuotedString, Sweep

    value = override._value
    values = (getattr(value, "list", None) or []) if isinstance(value, Sweep) else [value]
    names: list[str] = []
    for choice in values:
        for item in choice if isinstance(choice, list) else [choice]:
            several = isinstance(choice, list) and (group := override.key_or_group) in SEVERAL
            if several and (item is None or isinstance(item, list | dict)):
                raise UserError(
                    f"{override.input_line}: a list for {group} holds names.",
                    f"For none: {group}=[]",
                )
            if item is not None:
                names.append(item.text if isinstance(item, QuotedString) else str(item))
    return names


def _check_option(group: str, name: str, extra: Sequence[Path]) -> None:
    if name not in options(group, extra):
        raise unknown(group, name, options(group, extra))


def explain(
    error: Exception, overrides: Sequence[str], composes: Callable[[Sequence[str]], bool]
) -> UserError:
    """Return what Hydra's error about these overrides means for the user.

    Args:
        error: What Hydra raised.
        overrides: The words that it could not compose.
        composes: Whether it can compose some of them.
    """
    reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
    launcher = re.search(r"hydra/launcher/(\w+)", str(error))
    if launcher:
        name = launcher[1].removeprefix("effbench_")
        return UserError(
            f"What launcher={name} needs is not installed.",
            f"pip install 'effbench[{name}]'",
        )
    text = _culprit(overrides, composes)
    if text is None:
        return UserError(f"The config cannot be composed: {reason}.")
    group, _, rest = text.split("=")[0].lstrip("+~").partition(".")
    name = rest.split(".")[0]
    if group in SEVERAL and name:
        return _explain_member(group, name, text)
    return UserError(
        f"{text} cannot be composed: {reason}.", "Write group=name or group.key=value."
    )


def _culprit(overrides: Sequence[str], composes: Callable[[Sequence[str]], bool]) -> str | None:
    """Return the word without which the others compose, or else the first that does not after them.

    Words that choose files come first, as the others need them.
    """
    for place, text in enumerate(overrides):
        if composes([*overrides[:place], *overrides[place + 1 :]]):
            return text
    words = sorted(overrides, key=lambda text: "." in text.partition("=")[0])
    counts = range(1, len(words) + 1)
    return next((words[n - 1] for n in counts if not composes(words[:n])), None)


def _explain_member(group: str, name: str, text: str) -> UserError:
    known = options(group)
    if name not in known:
        return unknown(group, name, known)
    key = text.split("=")[0].rpartition(".")[2]
    keys = keys_of(group, name, known[name])
    if key in keys:
        return UserError(
            f"{text} is set, but {name} is not chosen.",
            f"Choose it too, for example {group}=[perplexity,{name}].",
        )
    return UserError(f"Unknown key {text.split('=')[0]!r}.", did_you_mean(key, keys))
