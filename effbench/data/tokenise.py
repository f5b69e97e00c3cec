"""Texts to examples of tokens, kept in a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from effbench.api.examples import Example, Tokens, Turns
from effbench.api.keys import leave_places_out
from effbench.api.schema import digest, plain
from effbench.api.shape import ModelShape
from effbench.api.spec import DatasetSpec
from effbench.data.kinds.base import find
from effbench.data.render import Text
from effbench.data.tokens import Encoder, prefix_token, tokenizer_hash
from effbench.nn.model_kinds.base import CAUSAL
from effbench.nn.model_kinds.base import find as find_kind
from effbench.util.errors import UserError
from effbench.util.files import sweep_stale, write_atomic
from effbench.util.seals import sealed, unsealed


def tokenise(
    texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any, whole: bool = False
) -> list[Example]:
    """Return texts as examples; done once per content and tokenizer, then read from the cache.

    Args:
        texts: The rows of a split.
        spec: Says what kind of rows they are and how they are cut.
        tokenizer: Makes the tokens.
        whole: Whether texts stay whole documents rather than being packed, where the kind does.
    """
    kind = find(spec.kind)
    whole = whole and kind.packs
    key = digest(
        {
            "texts": [
                [t.id, t.rendered, t.right, *([t.columns] if t.columns else ())] for t in texts
            ],
            "form": [spec.kind, spec.max_length, spec.chat, spec.version, *_later(spec)],
            "tokenizer": [tokenizer_hash(tokenizer), tokenizer.eos_token_id],
            "version": 4,
            **({"documents": [prefix_token(tokenizer)]} if whole else {}),
            **({"code": kind.code, "spec": _read_by_others(spec)} if kind.code else {}),
        },
        32,
    )
    from effbench.data.assets import cache_dir

    path = cache_dir() / "tokens" / f"{key}.json"
    with suppress(ValueError, KeyError, TypeError, OSError):  # a damaged file is made again
        return [_example(e) for e in json.loads(unsealed(path.read_text(), path.name))]
    examples = (kind.documents if whole else kind.examples)(texts, spec, tokenizer)
    with suppress(OSError, UserError):  # where nothing can be kept they are made again
        sweep_stale(path.parent)
        write_atomic(path, sealed(json.dumps([plain(e) for e in examples]), path.name))
    return examples


def as_read(examples: list[Example], model: ModelShape | None, tokenizer: Any) -> list[Example]:
    """Return examples as a model of some kind reads them; see `nn.model_kinds`.

    Args:
        examples: As a causal language model does.
        model: Its shape; None for a causal one.
        tokenizer: Its own.

    Raises:
        UserError: When it cannot answer them.
    """
    kind = find_kind(model.kind) if model else None
    if model is None or kind is None or kind.name == CAUSAL:
        return examples
    closing = Encoder(tokenizer).end
    return [kind.example(example, closing, model.outputs) for example in examples]


def _later(spec: DatasetSpec) -> list[str]:
    """Return what else decides which tokens count, where it is not as it always was."""
    return [] if spec.turns == "all" else [spec.turns]


def _read_by_others(spec: DatasetSpec) -> dict[str, Any]:
    """Return all that a kind of another package may read, but for where files lie."""
    values = plain(spec)
    leave_places_out(values)
    return values


def _example(values: dict[str, Any]) -> Example:
    for name in ("sequences", "choices"):
        values[name] = tuple(map(_tokens, values[name]))
    return Example(**values)


def _tokens(values: dict[str, Any]) -> Tokens:
    values = {**values, "cut": tuple(values["cut"])}
    if "silent" not in values:
        return Tokens(**values)
    return Turns(**{**values, "silent": tuple((a, b) for a, b in values["silent"])})
