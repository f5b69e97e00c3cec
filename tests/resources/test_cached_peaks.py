"""Predicted peaks of passes without gradients, against the tensors that are alive in them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effbench.api.batch import make_batch
from effbench.api.footprint import Kind, Pass, logit_bytes
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.shape import ModelShape, Shape
from effbench.api.spec import Plugin
from effbench.methods.base import Method
from effbench.methods.chain import inference_cost
from effbench.methods.linear_attention.dijiang import DiJiang
from effbench.models.random import random_model
from effbench.nn.losses.divergence import CHUNK, row_sums
from effbench.resources.peaks import WORKSPACE, Caching, Peaks

WIDE = Shape(
    hidden_size=192,
    intermediate_size=512,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=4096,
    tied=True,
)
ROWS, TOKENS, COUNTED = 3, 320, 16
BOUND = 0.10
CASES: dict[str, dict[str, Any]] = {
    "none": {},
    "streaming": {"window": 60},
    "snapkv": {"budget": [60], "window": 16},
    "expected_attention": {"budget": [60]},
    "tova": {"budget": [60]},
    "knorm": {"budget": [60]},
    "kv_quant": {"window": 16},
}


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that were made in it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and _place(tensor) not in given | {*self.sizes}:
                storage = tensor.untyped_storage()
                self.sizes[_place(tensor)] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, _place(tensor), None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return made


def _place(tensor: torch.Tensor) -> int:
    place: int = tensor.untyped_storage()._cdata
    return place


LINEAR = replace(WIDE, head_dim=64, intermediate_size=256)
"""Where what linear attention has in float32 is more than what the MLP needs."""


def counted(work: Callable[[], object]) -> int:
    with torch.no_grad(), Alive() as alive:
        work()
    return alive.peak


def planned(
    method: Method, kind: Kind, counted_tokens: int, rows: int = ROWS, tokens: int = TOKENS
) -> float:
    """Return the predicted bytes of tensors beside the weights."""
    [point], shape = method.points(), ModelShape.of(WIDE)
    cost = inference_cost([method], WIDE, "float32", point)
    caching = Caching.of(method.shape(shape, point, "use", None), method.decoder(point))
    every = not method.forward(point).shares_prefixes
    found = Peaks(shape, 4, exact=True).inference(
        cost, Pass(kind, rows, tokens, counted_tokens), every=every, caching=[caching]
    )
    return sum(size for name, size in found.items() if name != "weights") - WORKSPACE


@pytest.mark.parametrize("name", CASES)
def test_peaks_under_a_policy_are_those_of_its_tensors(name: str) -> None:
    """Within a tenth of all tensors, weights among them."""
    method = make_method(Plugin(name, CASES[name])).resolve(WIDE)
    [point], model = method.points(), random_model(WIDE, 0, "cpu", torch.float32).eval()
    model.requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) * 7 % WIDE.vocab_size
    prompt = [-100] * (TOKENS - COUNTED)
    batch = make_batch([(row.tolist(), prompt + row[-COUNTED:].tolist()) for row in ids], 0)
    session = method.session(model, point)
    scored = counted(lambda: method.token_nll(model, batch, point))
    read = counted(lambda: session.prefill(ids))
    for found, expected in (
        (scored, planned(method, "score", ROWS * COUNTED)),
        (read, planned(method, "prefill", ROWS)),
    ):
        assert (weights + expected) / (weights + found) == pytest.approx(1, abs=BOUND)


def test_what_each_query_of_a_long_prompt_sees_is_in_the_peak() -> None:
    """Codes and tokens as they came; within a tenth of the tensors beside the weights."""
    method, ids = make_method(Plugin("kv_quant", {})).resolve(WIDE), torch.zeros(1, 2000).long()
    session = method.session(random_model(WIDE, 0, "cpu", torch.float32), method.points()[0])
    prefill: Any = type(session).prefill
    # Inference mode would hide what attention makes of a mask.
    read = counted(lambda: prefill.__wrapped__(session, ids))
    assert planned(method, "prefill", 1, 1, 2000) / read == pytest.approx(1, abs=BOUND)


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ("softmax", torch.float32),
        ("softmax", torch.bfloat16),
        ("exp", torch.bfloat16),
        ("prf", torch.float32),
    ],
)
def test_float32_features_of_linear_attention_are_in_the_peak(
    features: Any, dtype: torch.dtype
) -> None:
    """Within three in a hundred of the tensors beside the weights."""
    method = DiJiang(features=features).resolve(LINEAR)
    model, [point] = random_model(LINEAR, 0, "cpu", dtype), method.points()
    context = Context(0, torch.device("cpu"), dtype, torch.Generator(), lambda name: model)
    model = method.prepare(model, context).eval()
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS) * 7 % LINEAR.vocab_size
    session = method.session(model, point)
    read = counted(lambda: session.prefill(ids))
    used = method.shape(ModelShape.of(LINEAR), point, "use", None)
    cost = inference_cost([method], LINEAR, str(dtype).removeprefix("torch."), point)
    one = Pass("prefill", ROWS, TOKENS, ROWS)
    found = Peaks(used, dtype.itemsize, exact=True).inference(cost, one)
    planned = sum(size for name, size in found.items() if name != "weights") - WORKSPACE
    assert planned / read == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_comparison_holds_both_logits_and_some_distributions(dtype: torch.dtype) -> None:
    rows, tokens, vocabulary = 2, 160, 4096
    labels = torch.ones(rows, tokens, dtype=torch.long)
    with torch.inference_mode(), Alive() as alive:
        reference, model = (torch.randn(rows, tokens, vocabulary).to(dtype) for _ in range(2))
        alive.peak = 0  # they are made in float32
        row_sums(reference, model, labels)
    one = Pass("score", rows, tokens, rows * (tokens - 1), compared=CHUNK)
    found = logit_bytes(one, vocabulary, dtype.itemsize, every=True)
    assert found == pytest.approx(alive.peak, rel=0.05)
