"""Routes and drivers as values: what they can be decoded with, and what does not go together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from effbench.api.points import UNNAMED, Point
from effbench.api.session import Session
from effbench.methods.base import Method
from effbench.methods.decodes import Forward
from effbench.nn.decode.decoder import (
    ANY_ENGINE,
    CopiedMaps,
    Decoder,
    Drafts,
    Driver,
    Drops,
    Engine,
    Exits,
    Route,
)
from effbench.nn.decode.policy import CachePolicy
from effbench.util.errors import UserError


def rule(exits: int) -> Any:
    raise AssertionError("nobody asks before there is a session")


EXITS = Exits((2, 3), rule)


@pytest.mark.parametrize(
    "decoder, engines, own_logits",
    [
        (Decoder(), ANY_ENGINE, False),
        (Decoder(CopiedMaps()), ANY_ENGINE, False),
        (Decoder(Drops("stand_ins", 3)), {"auto", "static", "eager"}, True),
        (Decoder(Drops("stand_ins", 0)), ANY_ENGINE, True),
        (Decoder(EXITS), {"auto"}, True),
        (Decoder(driver=Drafts(2)), {"auto"}, False),
    ],
)
def test_what_decodes_it_is_known_before_a_model_is_loaded(
    decoder: Decoder, engines: set[str], own_logits: bool
) -> None:
    assert decoder.engines == engines
    assert (decoder.logits is not None) == own_logits


@dataclass(frozen=True)
class Forgets(CachePolicy):
    takes_back: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"driver": Drafts(2)}, "cannot be taken back"),
        ({"route": Drops("stand_ins", 3)}, "leave gaps"),
        ({"route": CopiedMaps()}, "all of their source's keys"),
        ({"route": Exits((2,), rule, propagate=True)}, "come from no query"),
    ],
)
def test_a_cache_goes_with_what_can_ask_it(parts: Any, why: str) -> None:
    assert Decoder(EXITS, cache=Forgets()).engines == {"auto"}
    assert Decoder(cache=Forgets()).logits is not None
    with pytest.raises(UserError, match=why):
        Decoder(**parts, cache=Forgets())


@pytest.mark.parametrize("route", [EXITS, Drops("stand_ins", 3), CopiedMaps()])
def test_drafts_are_verified_by_all_blocks_alone(route: Route) -> None:
    with pytest.raises(UserError, match="verified by all blocks"):
        Decoder(route, Drafts(2))


def test_a_forward_pass_that_is_the_models_own_is_shared_however_it_is_written() -> None:
    class Same(Method):
        def forward(self, point: Point = UNNAMED) -> Forward:
            return super().forward(point)

    class Own(Method):
        def forward(self, point: Point = UNNAMED) -> Forward:
            return Forward(lambda model, batch: model)

    assert Same().forward().shares_prefixes and not Own().forward().shares_prefixes


def test_a_driver_from_anywhere_makes_its_own_session() -> None:
    made: list[tuple[Route, str]] = []

    @dataclass(frozen=True)
    class Tree(Driver):
        def session(self, model: Any, route: Route, cache: CachePolicy, engine: Engine) -> Session:
            made.append((route, engine))
            return model  # type: ignore[no-any-return]

    class Branching(Method):
        def decoder(self, point: Point) -> Decoder:
            return Decoder(EXITS, Tree())

    model: Any = object()
    assert Branching().session(model) is model and made == [(EXITS, "auto")]
    assert Branching().engines() == {"auto"}


def test_nothing_of_it_loads_torch() -> None:
    code = (
        "import sys; from effbench.nn.decode.decoder import *; "
        "Decoder(Drops('a', 2)).engines; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
