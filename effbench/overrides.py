"""The words of a command line: which names they use, and whether those exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.conf_files import groups, keys_of, options
from effbench.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from effbench.spec import Stage

DEFAULT_METHOD = {"train": "lora", "compress": "rtn", "eval": "none"}
"""What a stage takes when no `method=` is given."""
TOP_LEVEL = {"seed", "from", "train", "run", "hydra"}
JUDGED_BY_US = {"model", "dataset", "method", "hardware", "train", "run"}
"""Parts of a config whose keys a dataclass judges, so that a file need not name every key."""
SEVERAL = {"evaluator"}
"""Groups of which a config takes any number of members."""


def is_sweep(overrides: Iterable[str]) -> bool:
    """Whether the overrides ask for several runs or for another launcher than this machine."""
    return any(re.match(r"launcher=(?!local$)", o) for o in overrides)


def existing(folder: Path) -> Path:
    """Return the absolute path of a folder with somebody's own configs.

    Raises:
        UserError: When there is none.
    """
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder} is not a folder.", "Create it or correct the path.")
    return folder.resolve()


@dataclass(frozen=True)
class Words:
    """Checked overrides."""

    words: list[str]
    """As Hydra takes them."""
    chosen: set[str]
    """The groups and keys that they set."""
    swept: str = ""
    """The first one that asks for several runs."""

    def with_method(self, stage: Stage | None) -> list[str]:
        """Return the words, with a method for the stage when they name none."""
        if self.chosen & {"method", "experiment"}:
            return self.words
        return [*self.words, f"method={DEFAULT_METHOD[stage or 'train']}"]


def check_overrides(overrides: Sequence[str], extra: Sequence[Path] = ()) -> Words:
    """Check the names in overrides.

    Raises:
        UserError: For a word that is no override, an unknown group, key or config name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    known = groups(extra)
    words, chosen, swept = [], set(), ""
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise UserError(
                f"{text!r} is not an override.",
                "Write key=value, for example method=qdylora or train.max_steps=100; "
                "quote values with spaces or commas.",
            ) from None
        key = override.key_or_group
        top = key.split(".")[0].split("/")[0].split("@")[0]
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
    return Words(words, chosen, swept)


def _check_member(key: str, text: str, overrides: Sequence[str]) -> None:
    """Refuse a key inside a setting of what is not chosen, or of no setting that there is."""
    group, name, setting, *_ = key.split(".")
    path = options(group).get(name)
    words = [w for w in overrides if w.partition("=")[0] in (group, "experiment")]
    if not (path and setting in keys_of(path)) or not any(name in w for w in words):
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
    from hydra.core.override_parser.types import QuotedString, Sweep

    value = override._value
    if isinstance(value, Sweep):
        value = getattr(value, "list", None) or []
    names: list[str] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, QuotedString):
            names.append(item.text)
        elif isinstance(item, list):
            names += [str(i) for i in item]
        elif item is not None:
            names.append(str(item))
    return names


def _check_option(group: str, name: str, extra: Sequence[Path]) -> None:
    if name not in options(group, extra):
        raise UserError(
            f"There is no {group} called {name!r}.", did_you_mean(name, options(group, extra))
        )


def explain(error: Exception, overrides: Sequence[str]) -> UserError:
    """Return what Hydra's error about these overrides means for the user."""
    reason = str(error.__cause__ or error).splitlines()[0]
    launcher = re.search(r"hydra/launcher/(\w+)", str(error))
    if launcher:
        name = launcher[1].removeprefix("submitit_")
        return UserError(
            f"The launcher plug-in {launcher[1]!r} is not installed.",
            f"pip install 'effbench[{name}]'",
        )
    for text in overrides:
        group, _, rest = text.split("=")[0].partition(".")
        name = rest.split(".")[0]
        if group in SEVERAL and name:
            return _explain_member(group, name, text)
    return UserError(f"The config cannot be composed: {reason.rstrip('.')}.")


def _explain_member(group: str, name: str, text: str) -> UserError:
    known = options(group)
    if name not in known:
        return UserError(f"There is no {group} called {name!r}.", did_you_mean(name, known))
    path = known[name]
    key = text.split("=")[0].rpartition(".")[2]
    keys = keys_of(path) if path else []
    if key in keys:
        return UserError(
            f"{text} is set, but {name} is not chosen.",
            f"Choose it too, for example {group}=[perplexity,{name}].",
        )
    return UserError(f"Unknown key {text.split('=')[0]!r}.", did_you_mean(key, keys))
