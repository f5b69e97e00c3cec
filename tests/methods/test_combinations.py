"""What caches go with: the documented table is what they say, and what it promises decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evictions import SMALL
from helpers import SHAPE, batch_of, context, some_ids, tiny_model

from effbench.api import registry
from effbench.api.shape import ModelShape
from effbench.api.sharing import listed_map, shared_shape
from effbench.methods.cache.lorc import LoRC
from effbench.methods.chain import resolved
from effbench.methods.codes import HoldsCodes
from effbench.methods.compresses import compress_whole
from effbench.methods.driven import Driven, Drives
from effbench.nn.decode.decoder import CopiedMaps, Decoder, Drops, Exits
from effbench.nn.decode.session import greedy
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=3)
CODES = {"bits": 4, "group_size": 4, "recent": 4}
OWN: dict[str, dict[str, Any]] = {
    "kv_quant": {"bits": 4, "group_size": 4, "window": 4},
    "lorc": {"kept_keys": (0.75,), "kept_values": (0.75,)},
}


def caching() -> Iterator[str]:
    """Yield the name of every method with a cache of its own."""
    for name in registry.names("methods"):
        if issubclass(registry.find("methods", name), Drives):
            yield name


def small(name: str, **settings: Any) -> Any:
    """Return a method with settings under which a few tokens make a difference."""
    cls = registry.find("methods", name)
    own = OWN.get(name) or {k: v for k, v in SMALL.items() if hasattr(cls, k)}
    more = {"budget": (8,)} if hasattr(cls, "budget") else {}
    return cls(**own, **more, **settings)


def cells(name: str) -> Iterator[str]:
    """Yield what a method says of codes, coordinates and ways of decoding."""
    method = small(name)
    cache_of = method.cache_at(method.cache_points()[-1])
    yield "yes: `bits`" if hasattr(method, "bits") else "no"
    yield "yes: `bits`" if name == "lorc" else _asked(lambda: method.check_start([LoRC()]), "no")
    for way in ("exit", "speculative"):
        yield _asked(lambda way=way: replace(method, decoding=(way,)).resolve(DEEP))
    for route in (Exits((2,), method.rule, propagate=True), Drops("stand_ins", 3), CopiedMaps()):
        yield _asked(lambda route=route: Decoder(route, cache=cache_of), "no")


def _asked(ask: Any, short: str = "") -> str:
    try:
        ask()
    except UserError as error:
        assert len(error.message) < 160 and error.hint
        return short or "no: " + error.message.partition(": ")[2].rstrip(".")
    return "yes"


def matrix() -> list[str]:
    """Return the rows of the documented table."""
    titles = "in codes | on lorc's artefact | exits | drafts | propagated exits"
    head = [f"| method | {titles} | dropped tokens | shared maps |", "|---" * 8 + "|"]
    return head + [f"| `{name}` | {' | '.join(cells(name))} |" for name in caching()]


def test_the_table_of_caches_is_what_they_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "caches.md").read_text()
    assert "\n".join(matrix()) in text, "\n".join(matrix())


def model_for(name: str) -> Any:
    model = tiny_model(dtype=torch.float64, shape=DEEP).eval().requires_grad_(False)
    if name == "lorc":
        compress_whole(small(name), model, [batch_of()], context())
    return model


@pytest.mark.parametrize("name", list(caching()))
def test_ways_of_decoding_give_the_tokens_of_the_cache(name: str) -> None:
    """Exits that nobody takes, and drafts; in codes where it can be."""
    coded = issubclass(registry.find("methods", name), HoldsCodes)
    takes_back = small(name).cache_at(small(name).cache_points()[-1]).takes_back
    ways = ("exit", "speculative") if takes_back else ("exit",)
    settings = {"decoding": ways, "exit_depths": (1, 3), "thresholds": (2.0,)}
    method = small(name, **settings, **(CODES if coded else {})).resolve(DEEP)
    model, ids = model_for(name), some_ids(1, 12)
    *driven, alone = method.points()
    expected = greedy(method.session(model, alone), ids, 6)
    assert [p.name.rpartition("-")[2] for p in driven] == [*ways]
    for point in driven:
        assert isinstance(point, Driven)
        session = method.session(model, point)
        held = bytes_when_taken_back(session)
        assert greedy(session, ids, 6).equal(expected)
        assert bool(held) == (point.decoding == "speculative")
        layers = method.shape(ModelShape.of(DEEP), point, "use", None).layers
        for length, found in held:
            assert found == sum(x.mixer.cache.bytes(length, 8, 12) for x in layers if x.mixer)
            assert length - session.length <= method.decoder(point).driver.ahead


def bytes_when_taken_back(session: Any) -> list[tuple[int, int]]:
    """Return a list to which each round of drafts adds the most tokens and bytes that it held."""
    staged, found = session.staged, []
    crop = staged.crop

    def noted(length: int) -> None:
        found.append((staged.length, session.kv_bytes()))
        crop(length)

    staged.crop = noted
    return found


@pytest.mark.parametrize("name", list(caching()))
def test_models_that_slide_or_share_are_refused_before_loading(name: str) -> None:
    sliding = replace(ModelShape.of(SHAPE), anatomy="other", family="mistral")
    with pytest.raises(UserError, match="where tokens see all before them"):
        resolved(small(name), sliding)
    deep = replace(SHAPE, num_layers=4)
    with pytest.raises(UserError, match="take states from others"):
        resolved(small(name), shared_shape(deep, listed_map(4, [2], "kv")))


def test_exits_that_cannot_be_are_refused_before_loading() -> None:
    ways: Any = {"decoding": ("speculative",)}
    for settings, why in (
        ({"exit_depths": (3,)}, "needs an exit below layer 3, the last one"),
        ({"exit_depths": (4,)}, "lists depth 4, but the model has 3 layers"),
        ({"exit_depths": (2, 1)}, "does not rise"),
        ({"exit_depths": (1,), "thresholds": (0.5, 0.5)}, r"2 values for the exits \[1\]"),
    ):
        with pytest.raises(UserError, match=why):
            small("snapkv", **ways, **settings).resolve(DEEP)
    with pytest.raises(UserError, match="cannot be taken back") as error:
        small("tova", **ways).resolve(DEEP)
    assert error.value.hint == "Leave that way of decoding out."
