"""What people call a model or a dataset: the name of its config, or of their own file or folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

OWN = ("folder", "gguf", "hub", "file")
"""Configs for what one has oneself, which is called by another name than theirs."""

SNAPSHOT = re.compile(r"models--(?:.+--)?(?P<name>[^/]+)/snapshots/[0-9a-f]{40}/?$")
"""A model in the cache of the hub, whose folder is called after its commit."""


def called(part: Mapping[str, Any]) -> str:
    """Return what people call a model or a dataset.

    That is the name of its config, but for those of what one has oneself: `my-model` of
    `model=folder model.path=runs/my-model`, `chat.jsonl` of `dataset.files.all=data/chat.jsonl`,
    `a.csv+1` of two files, `NAME` of `model=hub model.id=ORG/NAME`.

    Args:
        part: Plain values of a spec's `model` or `dataset`, or of another part, which has a name.
    """
    name = str(part.get("name", ""))
    return (name in OWN and _own(part)) or name


def _own(part: Mapping[str, Any]) -> str:
    """Return the name of a folder, of files or of a model on the hub; empty where there is none."""
    files = _files(part.get("files"))
    place = str(files[0] if files else part.get("path") or part.get("id") or "")
    cached = SNAPSHOT.search(place)
    name = cached["name"] if cached else PurePath(place).name
    return f"{name}+{len(files) - 1}" if len(files) > 1 else name


def _files(named: Any) -> list[Any]:
    """Return the different files of all splits, those of `train` first."""
    if not isinstance(named, Mapping):
        return []
    splits = sorted(named.items(), key=lambda item: item[0] != "train")
    parts = [part if isinstance(part, list) else [part] for _, part in splits]
    return list(dict.fromkeys(file for part in parts for file in part))
