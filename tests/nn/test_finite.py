"""NaN in a model is found at the layer where it begins."""

from __future__ import annotations

import pytest
import torch
from helpers import batch_of, tiny_model

from effbench.nn.scoring.finite import first_not_finite, require_finite
from effbench.util.errors import UserError


def test_the_first_layer_is_named() -> None:
    model = tiny_model().eval()
    batch = batch_of()

    def run() -> torch.Tensor:
        return model(input_ids=batch.input_ids).logits

    assert first_not_finite(model, run) == ""
    require_finite(model, run(), run)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    assert first_not_finite(model, run) == "model.layers.1.mlp.up_proj"
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj"):
        require_finite(model, run(), run)


def test_hooks_are_gone_afterwards() -> None:
    model = tiny_model()
    first_not_finite(model, lambda: None)
    assert all(not module._forward_hooks for module in model.modules())
