"""Rows of matrices are read by pieces: no head, matrix or batch may end where a piece does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import decoded, generator, tiny_model

from effbench.api.shape import Shape
from effbench.nn.decode import native, prompts
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.surgery import replace_linears
from effbench.nn.quant.linears import PackedLinear
from effbench.nn.quant.nested_linear import NestedLinear

HEADS = (20, 128, 192, 256)
"""Head widths: halves are less than a piece of 64 rows, one, one and a half, and two."""
ROWS = ((1, 1), (5, 1), (16, 1), (17, 1), (64, 1), (1, 17), (3, 21))
"""Prompts and positions of each."""
NEAR = {"dense": 2e-5, "4 bits": 3e-3, "nested": 3e-3}
"""Largest difference of a logit."""


def nested(linear: Any) -> NestedLinear:
    layer, draws = NestedLinear.empty(linear, 3, 3), generator(linear.out_features)
    layer.planes.random_(generator=draws)
    layer.table.copy_(0.1 * torch.randn(layer.table.shape, generator=draws))
    return layer


def four_bits(linear: Any) -> PackedLinear:
    return PackedLinear.quantise(linear, 4, 32)


PACKED: dict[str, Callable[[Any], torch.nn.Linear]] = {"nested": nested, "4 bits": four_bits}


def model_of(kind: str, head_dim: int) -> Any:
    """One layer, whose matrices have columns that packed rows may have."""
    shape = Shape(
        hidden_size=96,
        intermediate_size=160,
        num_layers=1,
        num_heads=8 if head_dim == 20 else 2,
        num_kv_heads=1,
        head_dim=head_dim,
        vocab_size=131,
    )
    model = tiny_model(shape=shape).eval().requires_grad_(False)
    if kind != "dense":
        make = PACKED[kind]
        replace_linears(model, lambda _, linear: make(linear))
        model.lm_head = make(model.lm_head)
    return model


@pytest.mark.parametrize("kind", NEAR)
def test_any_number_of_rows_meets_any_width_of_heads(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    monkeypatch.setattr(native, "LARGEST_BATCH", 64)
    monkeypatch.setattr(prompts, "takes", lambda *_: True)
    for head_dim in HEADS:
        model = model_of(kind, head_dim)
        for rows, length in ROWS:
            ids = torch.randint(3, 131, (rows, length + 2), generator=generator(rows))
            found, expected = (StaticSession(model, use_native=way) for way in (True, False))
            assert found.engine == "native"
            ours, theirs = (decoded(s, ids, length) for s in (found, expected))
            where = f"{head_dim=}, {rows=}, {length=}, {(ours - theirs).abs().max()=}"
            torch.testing.assert_close(ours, theirs, atol=NEAR[kind], rtol=0, msg=where)
