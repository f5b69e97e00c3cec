from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from effbench.api.schema import PositiveInt, build, canonical, digest, field_docs, plain
from effbench.util.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: PositiveInt = 4
    """How wide."""


@dataclass(frozen=True)
class Outer:
    size: PositiveInt
    """How large,
    in all."""
    kind: Literal["a", "b"] = "a"
    pair: tuple[float, float] = (0.5, 1.0)
    inner: Inner | None = None
    parts: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    "values, message, hint",
    [
        ({"sise": 1}, "Unknown key 'at.sise'", "'size'"),
        ({"size": 1, "inner": {"widht": 2}}, "Unknown key 'at.inner.widht'", "'width'"),
        ({}, "at.size is missing", "at.size=VALUE"),
        ({"size": 1, "pair": [0.5]}, "at.pair=[0.5] has too few values", ""),
        (
            {"size": 1, "pair": 0.5},
            "at.pair=0.5 is not possible: it has to be a list",
            "'at.pair=[0.5]'",
        ),
        ({"size": 0}, "at.size=0 is not possible", ""),
        ({"size": True}, "at.size=True is not possible", ""),
        ({"size": "4"}, "at.size='4' is not possible", ""),
        ({"size": None}, "at.size=null is not possible", ""),
        ({"size": 1, "kind": "c"}, "'a' or 'b'", ""),
        ({"size": 1, "pair": [0.5, float("nan")]}, "at.pair=nan is not possible", ""),
        ({"size": 1, "kind": "caf\udce9"}, "at.kind is not UTF-8: '\\udce9' is no", "in UTF-8"),
        ({"size": object()}, "at holds a value that JSON cannot hold", ""),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(values, message, hint):
    with pytest.raises(UserError) as caught:
        build(Outer, values, "at")
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_an_empty_place_adds_no_dot():
    with pytest.raises(UserError, match=r"^size=0"):
        build(Outer, {"size": 0}, "")


def test_whole_numbers_stand_for_floats_and_come_back():
    built = build(Outer, {"size": 3, "pair": [0, 1], "inner": {"width": 2}}, "at")
    assert built == Outer(3, pair=(0.0, 1.0), inner=Inner(2))
    assert build(Outer, plain(built), "at") == built


def test_canonical_json_has_one_form():
    assert canonical({"b": 1.0, "a": (1, 2)}) == '{"a":[1,2],"b":1}'
    assert canonical({"a": 0.1, "b": None}) == '{"a":0.1,"b":null}'
    assert canonical(1e300) == "1e+300"
    assert digest({"a": 1.0}) == digest({"a": 1}) == "015abd7f5cc57a2d"
    assert digest({"a": 1}) != digest({"a": "1"}) != digest({"a": True})


def test_field_docs_are_the_strings_under_the_fields():
    assert field_docs(Outer) == {"size": "How large,\nin all."}
