"""One-shot structured pruning: what it ranks by, and what it leaves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, logits, tiny_model

from effbench.api.batch import Batch
from effbench.methods.compresses import compress_whole
from effbench.methods.pruning.structured import Structured
from effbench.nn.pruning.scores import BlockScores, input_squares
from effbench.nn.pruning.slicing import kept_blocks, layout_of, shape_left, slice_model
from effbench.testing.bench import Bench
from effbench.util.errors import UserError


def compressed(method: Structured, model: Any) -> Any:
    compress_whole(method, model, [batch_of()], context())
    return model


def scored(method: Structured, model: Any, *batches: Batch) -> torch.Tensor:
    layout = layout_of(model)
    scores = torch.zeros(layout.size)
    for part in method.rank(BlockScores(model, layout, scores), batches, 0):
        part.put(part.make())
    return scores.double()


def squares(*parts: torch.Tensor) -> torch.Tensor:
    return torch.stack([p.double().square().sum() for p in parts]).sum()


def test_magnitude_sums_the_squares_of_a_block() -> None:
    model = tiny_model()
    layout = layout_of(model)
    scores = scored(Structured(), model)
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    view = list(layout.views(scores))[1]
    neuron = squares(mlp.gate_proj.weight[7], mlp.up_proj.weight[7], mlp.down_proj.weight[:, 7])
    torch.testing.assert_close(view.neurons[7], neuron, rtol=1e-5, atol=0)
    group = squares(
        attention.q_proj.weight[32:64],  # query heads 2 and 3 read group 1
        attention.k_proj.weight[16:32],
        attention.v_proj.weight[16:32],
        attention.o_proj.weight[:, 32:64],
    )
    torch.testing.assert_close(view.groups[1], group, rtol=1e-5, atol=0)
    dim = squares(
        *(
            part
            for x in model.model.layers
            for part in (
                x.self_attn.q_proj.weight[:, 5],
                x.self_attn.k_proj.weight[:, 5],
                x.self_attn.v_proj.weight[:, 5],
                x.self_attn.o_proj.weight[5],
                x.mlp.gate_proj.weight[:, 5],
                x.mlp.up_proj.weight[:, 5],
                x.mlp.down_proj.weight[5],
            )
        )
    )
    torch.testing.assert_close(layout.dims(scores)[5], dim, rtol=1e-5, atol=0)
    assert scores.sum().item() == pytest.approx(  # units and dims count every weight once each
        2 * sum(squares(p).item() for n, p in model.named_parameters() if "_proj" in n), rel=1e-5
    )


def test_wanda_weighs_by_the_norm_of_what_is_read() -> None:
    model = tiny_model()
    layout = layout_of(model)
    batch = batch_of()
    kept: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    hooks = [
        linear.register_forward_pre_hook(lambda _, x, n=n: kept.update({n: x[0].detach()}))
        for n, linear in (("down", layer.mlp.down_proj), ("o", layer.self_attn.o_proj))
    ]
    logits(model, batch)
    for hook in hooks:
        hook.remove()
    real = batch.attention_mask.bool()
    norms = {n: x[real].double().square().sum(0).sqrt() for n, x in kept.items()}
    found = input_squares(model, batch)["model.layers.0.mlp.down_proj"].sqrt()
    torch.testing.assert_close(found.double(), norms["down"], rtol=1e-5, atol=1e-8)

    scores = scored(Structured(criterion="wanda"), model, batch)
    view = next(layout.views(scores))
    weight = layer.mlp.down_proj.weight.detach().double()
    torch.testing.assert_close(view.neurons, weight.abs().sum(0) * norms["down"], rtol=1e-5, atol=0)
    twice = next(layout.views(scored(Structured(criterion="wanda"), model, batch, batch)))
    torch.testing.assert_close(twice.neurons, view.neurons * 2**0.5, rtol=1e-5, atol=0)
    weight = layer.self_attn.o_proj.weight.detach().double()
    groups = (weight.abs().sum(0) * norms["o"]).view(2, 32).sum(1)
    torch.testing.assert_close(view.groups, groups, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "random"])
def test_the_budget(criterion: Any, scope: Any) -> None:
    model = tiny_model()
    compressed(Structured(keep=0.5, criterion=criterion, scope=scope), model)
    left = shape_left(model, SHAPE)
    assert left.linear_params <= 0.5 * SHAPE.linear_params
    assert left.linear_params > 0.4 * SHAPE.linear_params
    assert left.hidden_size == SHAPE.hidden_size
    assert (not left.uniform) == (scope == "global")


def test_a_block_without_weights_goes_first() -> None:
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.down_proj.weight[:, 40] = 0
    before = logits(model)
    method = Structured(keep=0.999, scope="global", criterion="wanda", blocks=("neurons",))
    compressed(method, model)
    assert shape_left(model, SHAPE).layer(0).intermediate_size == 127
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_everything_kept_is_the_base() -> None:
    model = compressed(Structured(keep=1.0), tiny_model())
    assert logits(model).equal(logits(tiny_model()))


def test_then_lora(bench: Bench) -> None:
    small = ["hardware.dtype=float32", "evaluator=[perplexity]", "train.max_steps=2"]
    first = bench.run("compress", "method=structured", *small)
    second = bench.run("train", f"from={first.key}", "method=lora", *small)
    params = [next(m.value for m in r.metrics if m.name == "params") for r in (first, second)]
    assert params[1] == params[0] + next(
        m.value for m in second.metrics if m.name == "trainable_params"
    )


def test_a_budget_that_cannot_be_met_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        Structured(keep=0.2, blocks=("groups",)).resolve(SHAPE)
    with pytest.raises(UserError, match="cannot be reached"):
        Structured(keep=0.2, blocks=("neurons",)).resolve(SHAPE)
    Structured(keep=0.05, blocks=("groups", "neurons")).resolve(SHAPE)
    Structured(keep=0.05, blocks=("dims",)).resolve(SHAPE)


def test_a_tied_table_is_let_go_of_when_it_is_cut() -> None:
    model = tiny_model(shape=replace(SHAPE, tied=True))
    tied: list[bool] = []

    def look(*_: Any) -> None:  # told of each parameter that has been cut
        tied.append(model.lm_head.weight is model.model.embed_tokens.weight)

    kept = kept_blocks(layout_of(model), torch.arange(layout_of(model).size) % 2 == 0)
    slice_model(model, kept, look)
    assert len(tied) > 10 and all(tied[1:])


def test_norms_are_of_what_the_decoder_reads_without_its_head() -> None:
    model = tiny_model()
    called: list[torch.nn.Module] = []
    model.lm_head.register_forward_hook(lambda *a: called.append(a[0]))
    assert input_squares(model, batch_of())
    assert not called
