"""Layers taken out: which, and what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, logits, tiny_model

from effbench.api.cost import cost_of
from effbench.api.parts import LayerSize
from effbench.api.shape import Shape
from effbench.api.slices import sliced_shape
from effbench.methods.chain import shape_of
from effbench.methods.compresses import compress_whole
from effbench.methods.depth.layer_drop import LayerDrop
from effbench.nn.depth.influence import influence
from effbench.nn.llama.stack import at_layers
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

DEEP = Shape(**{**vars(SHAPE), "num_layers": 6})


def cut(method: LayerDrop, model: Any) -> list[int]:
    """Compress the model and return the layers that stay."""
    compress_whole(method, model.eval(), [batch_of()], context())
    kept: list[int] = model.config.kept_layers
    return kept


def test_influence_is_one_minus_the_cosine_of_input_and_output() -> None:
    model, batch = tiny_model(shape=DEEP).eval(), batch_of()
    with torch.no_grad():
        states = model(
            batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states[:6]  # the last one has been normed
    real = batch.attention_mask.bool()
    read = LayerDrop()._passed(model, batch)
    found = influence(2 * read["cosines"], 2 * int(read["tokens"]))
    for index in range(5):
        a, b = (states[index + i][real].double() for i in range(2))
        cosine = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        assert found[index] == pytest.approx(1 - cosine.mean().item(), rel=1e-5)
    assert found.min() > 0.01


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers": (4, 1)}, [0, 2, 3, 5]),
        ({"remove": 2, "criterion": "last"}, [0, 1, 2, 3]),
        ({"remove": 2, "criterion": "even"}, [0, 2, 3, 5]),
        ({"remove": 0}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_what_is_left_is_the_model_of_these_layers(
    settings: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    method, model = LayerDrop(**settings), tiny_model(shape=DEEP)
    assert cut(method, model) == expected
    whole = tiny_model(shape=DEEP).eval()
    with at_layers(whole, expected):
        wanted = logits(whole)
    assert logits(model).equal(wanted)
    method.save(model, tmp_path)
    assert json.loads((tmp_path / "layers.json").read_text()) == {"kept": expected}
    again = method.load(tiny_model(shape=DEEP).eval(), tmp_path, context())
    assert logits(again).equal(wanted)
    left = shape_of(method, DEEP, folder=tmp_path)
    assert left.num_layers == len(expected) == shape_of(method, DEEP).num_layers
    cost = cost_of(left, "float32", DEEP)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.saving == ("physical" if len(expected) < 6 else "none")


def test_the_least_influence_goes_first() -> None:
    model = tiny_model(shape=DEEP)
    with torch.no_grad():
        for index in (1, 3):  # these change nothing
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    before = logits(model.eval())
    assert cut(LayerDrop(remove=2), model) == [0, 2, 4, 5]
    torch.testing.assert_close(logits(model), before)


def test_random_layers_go_by_seed() -> None:
    method = LayerDrop(remove=2, criterion="random")
    seen = {tuple(sorted(method.gone(torch.zeros(30), seed))) for seed in (0, 0, 1, 2)}
    assert len(seen) == 3 and all(len(gone) == 2 for gone in seen)
    assert LayerDrop().count(30) == 8 and LayerDrop().count(4) == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LayerDrop(layers=(6,)), "not different layers of 6"),
        (LayerDrop(layers=(2, 2)), "not different layers of 6"),
        (LayerDrop(remove=6), "No layer of 6 would be left"),
    ],
)
def test_impossible_settings_are_refused(method: LayerDrop, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.resolve(DEEP)
    with pytest.raises(UserError, match="differ in size"):
        LayerDrop().resolve(sliced_shape(DEEP, 64, [LayerSize(4, 2, n) for n in range(100, 106)]))


def test_then_lora_then_exported(bench: Bench, tmp_path: Path) -> None:
    small = ["hardware.dtype=float32", "evaluator=[perplexity]", "train.max_steps=2"]
    first = bench.run("compress", "method=layer_drop", "method.layers=[1,2]", *small)
    second = bench.run("train", f"from={first.key}", "method=lora", *small)
    params, trained = (
        {m.name: m.value for m in record.metrics if not m.split} for record in (first, second)
    )
    assert trained["params"] == params["params"] + trained["trainable_params"]
