"""The sentence of where a method pays, from gains and their intervals."""

from __future__ import annotations

import math

import pytest

from effbench.evaluators import paying

YES, NO, MAYBE = (1.5, 1.2, 1.8), (0.5, 0.4, 0.6), (1.1, 0.9, 1.3)
UNKNOWN = (2.0, -math.inf, math.inf)


@pytest.mark.parametrize(
    "gains, said",
    [
        ({(1, 512): YES, (1, 2048): YES}, "from 512 at batch 1"),
        ({(1, 512): NO, (1, 2048): YES}, "from 2,048 at batch 1"),
        ({(1, 512): MAYBE, (1, 2048): YES}, "from 2,048 at batch 1"),
        ({(1, 512): NO, (1, 2048): MAYBE}, "never up to 2,048 at batch 1"),
        ({(1, 512): UNKNOWN, (1, 2048): UNKNOWN}, "never up to 2,048 at batch 1"),
        ({(1, 512): YES, (1, 2048): NO}, "at 512 but not at 2,048 at batch 1"),
        (
            {(1, 128): YES, (1, 512): NO, (1, 2048): YES, (1, 4096): NO},
            "at 128 and 2,048 but not at 512 and 4,096 at batch 1",
        ),
        ({(4, 512): YES}, "at 512 at batch 4"),
        ({(4, 512): NO}, "never at 512 at batch 4"),
        (
            {(8, 1): NO, (8, 2): NO, (1, 1): NO, (1, 2): YES, (4, 1): NO, (4, 2): NO},
            "from 2 at batch 1, never up to 2 at batch 4 and 8",
        ),
    ],
)
def test_where_a_quantity_pays(gains: paying.Gains, said: str) -> None:
    sentence = paying.sentence("it", {"decode time": gains})
    assert (
        sentence == f"it against the dense cache, by tokens of context: pays in decode time {said}."
    )


def test_a_gain_of_one_is_none() -> None:
    assert not paying.pays((1.0, 1.0, 1.0))
    assert paying.pays((1.01, 1.001, 1.02))


def test_each_number_of_new_tokens_has_its_sentence() -> None:
    def gains(memory: tuple[float, float, float]) -> dict[str, tuple[float, float, float]]:
        return {name: memory if name == "memory_gain@" else NO for name in paying.QUANTITIES}

    cells = {(1, 512, 8): gains(YES), (1, 512, 64): gains(NO)}
    first, second = paying.sentences("kv_quant", cells)
    rest = "in memory while decoding never at 512 at batch 1; "
    assert first.startswith("kv_quant, 8 new against the dense cache")
    assert f"pays in peak memory at 512 at batch 1; {rest}" in first
    assert f"pays in peak memory never at 512 at batch 1; {rest}" in second
    [alone] = paying.sentences("kv_quant", {(1, 512, 8): gains(YES)})
    assert alone.startswith("kv_quant against the dense cache")
