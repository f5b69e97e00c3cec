"""What entries of a cache are worth: our scores beside those of kvpress."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from kvpress_scores import PRESSES, drawn

from effbench.nn.decode import importance

THEIRS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "golden" / "kvpress.json").read_text()
)
"""Printed by kvpress 0.5.5 with torch 2.13 and transformers 5.2; see `kvpress_scores`."""


def ours(kind: str, settings: dict[str, Any], rotary: Any) -> Callable[..., torch.Tensor]:
    if kind == "SnapKVPress":
        names = {"window_size": "window", "kernel_size": "kernel"}
        given = {names[key]: value for key, value in settings.items()}
        return partial(importance.window_attention, **given)
    if kind == "ExpectedAttentionPress":
        return partial(
            importance.expected_attention,
            rotary=rotary,
            sinks=settings["n_sink"],
            future=settings["n_future_positions"],
            covariance=settings["use_covariance"],
            epsilon=settings["epsilon"],
        )
    return importance.key_norms if kind == "KnormPress" else importance.last_attention


@pytest.mark.parametrize("name", PRESSES)
def test_scores_are_those_of_kvpress(name: str) -> None:
    """What is pinned has there one more than the largest score; TOVA's last query is pinned too."""
    of, (kind, settings) = drawn(), PRESSES[name]
    found = ours(kind, settings, of.attention.rotary_emb)(of.query, of.keys, of.values, None)
    theirs = torch.tensor(THEIRS[name], dtype=torch.float64)
    found, pinned = found.expand_as(theirs), torch.zeros(theirs.shape[-1], dtype=torch.bool)
    if kind == "SnapKVPress":
        pinned[-settings["window_size"] :] = True
    if kind == "ExpectedAttentionPress":
        pinned[: settings["n_sink"]] = True
    assert found[..., pinned].isposinf().all() and found[..., ~pinned].isfinite().all()
    pinned[-1] |= kind == "TOVAPress"
    assert (theirs[..., pinned] > theirs[..., ~pinned].max()).all()
    torch.testing.assert_close(found[..., ~pinned], theirs[..., ~pinned], atol=1e-7, rtol=1e-6)
