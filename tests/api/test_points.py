"""Operating points: values with a name, which is made and never read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from effbench.api.points import UNNAMED, Point, find_point, require_distinct
from effbench.config.compose import compose
from effbench.methods.adapters.lora import Rank
from effbench.methods.depth.depths import Depths
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Depth, Mixed, Window
from effbench.methods.none import Unchanged
from effbench.util.errors import UserError


@pytest.mark.parametrize(
    ("point", "name"),
    [
        (UNNAMED, ""),
        (Rank(8), "r8"),
        (Depth(12), "d12"),
        (Mixed("exit"), "exit"),
        (Window(0), "k0"),
        (Window(3, "reuse"), "k3-reuse"),
    ],
)
def test_a_point_is_called_by_its_fields(point: Point, name: str) -> None:
    assert (point.name, f"{point}") == (name, name)


def test_points_are_the_same_by_value() -> None:
    assert {Rank(4): 1, Window(3, "reuse"): 2}[Window(3, "reuse")] == 2
    assert len({Rank(4), Rank(4), Depth(4), Window(4), UNNAMED, Point()}) == 4
    assert Rank(4) != Depth(4) and Point() == UNNAMED


def test_a_name_means_the_point_that_has_it() -> None:
    points = LoRADrop(window=3, baselines=("reuse",)).points()
    assert [find_point(points, point.name, "lora_drop") for point in points] == list(points)
    assert find_point(Unchanged().points(), "", "none") is UNNAMED
    with pytest.raises(UserError, match="lora_drop has no point 'k4'") as error:
        find_point(points, "k4", "lora_drop")
    assert "k3" in error.value.hint
    with pytest.raises(UserError, match="none has no point 'k4'") as error:
        find_point(Unchanged().points(), "k4", "none")
    assert "no name" in error.value.hint


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([Rank(1), Rank(2), Rank(1)], "the point r1 twice"),
        ([UNNAMED, UNNAMED], "two points without a name"),
        ([], "no operating point"),
    ],
)
def test_points_that_cannot_be_told_apart_are_refused(points: list[Point], said: str) -> None:
    with pytest.raises(UserError, match=said):
        require_distinct(points, "lora")


@pytest.mark.parametrize(
    ("words", "point"),
    [
        (["train", "method=lora_drop", "method.baselines=[reuse,reuse]"], "k1-reuse"),
        (["eval", "method=depths", "method.decoding=[exit,exit]"], "exit"),
    ],
)
def test_settings_that_give_a_point_twice_are_refused(words: Sequence[str], point: str) -> None:
    stage, *rest = words
    with pytest.raises(UserError, match=f"the point {point} twice"):
        compose(stage, [*rest, "model=tiny", "dataset=arithmetic"])


def test_a_point_of_another_class_with_the_same_name_is_one_too_many() -> None:
    @dataclass(frozen=True)
    class Rebuilt(Point):
        number: int

        @property
        def name(self) -> str:
            return f"d{self.number}"

    with pytest.raises(UserError, match="the point d2 twice"):
        require_distinct([*Depths(eval_depths=(2,)).points(), Rebuilt(2)], "rebuilt")
