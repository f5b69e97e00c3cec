"""Linears that are asked for: each is there, or the method refuses and names those that are."""

from __future__ import annotations

import pytest

from effbench.api import registry
from effbench.api.plugins import make_method
from effbench.api.shape import Shape
from effbench.api.spec import Plugin
from effbench.util.errors import UserError

TINY = Shape(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    tied=True,
)
ADAPTING = [
    name
    for name in registry.names("methods")
    if "targets" in registry.find("methods", name).__dataclass_fields__
]


def test_methods_with_targets_are_found() -> None:
    assert {"lora", "apt", "sorted_lora"} <= {*ADAPTING}


@pytest.mark.parametrize("name", ADAPTING)
def test_one_right_target_does_not_stand_for_a_wrong_one(name: str) -> None:
    settings = {"targets": ["q_proj", "nope"]}
    with pytest.raises(UserError) as refused:
        make_method(Plugin(name, settings)).resolve(TINY)
    assert "'nope'" in refused.value.message
    assert "q_proj" in f"{refused.value.hint}"
