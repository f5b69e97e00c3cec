"""Sorted fine-tuning of every weight; what depths have in common is in `test_sorted_lora.py`."""

from dataclasses import replace

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    batch_of,
    begun,
    context,
    counted,
    stated,
    tiny_model,
    train,
    window,
)
from transformers import AutoModelForCausalLM

from effbench.methods.base import Method
from effbench.methods.depth.points import Depth
from effbench.methods.depth.sorted_full import SortedFull
from effbench.methods.full import Full
from effbench.methods.quant.rtn import RTN
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=5)


def ready(**settings):
    method = SortedFull(**{"depths": (2, 3, 5), **settings}).resolve(DEEP)
    ctx = context()
    return method, begun(method, tiny_model(shape=DEEP), ctx), ctx


def test_the_default_set_is_the_papers_at_its_size():
    shape = replace(SHAPE, num_layers=40)
    assert SortedFull().resolve(shape).depths == (12, 16, 20, 24, 28, 32, 36, 40)
    assert SortedFull().objective == "soft" and SortedFull().weights == "float32"


def test_the_full_depth_alone_is_full_fine_tuning():
    runs = []
    for method in (SortedFull(depths=(5,), objective="sampled"), Full()):
        ctx = context()
        model = begun(method, tiny_model(shape=DEEP), ctx)
        runs.append((train(method, model, ctx, 4), dict(model.named_parameters())))
    (losses, ours), (expected, theirs) = runs
    assert losses == expected
    assert all(p.equal(theirs[n]) for n, p in ours.items())


def test_the_gradient_of_the_soft_loss_is_the_mean_in_head_and_embedding_too():
    method, model, ctx = ready()
    loss = method.loss(model, batch_of(), ctx)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    singles = []
    for n in (2, 3, 5):
        with method.at(model, Depth(n)):
            single = Full().loss(model, batch_of(), ctx)
        (single / 3).backward()
        singles.append(single.item())
    assert loss.item() == pytest.approx(sum(singles) / 3, abs=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-5)


def test_a_sampled_step_leaves_deeper_layers_alone():
    method, model, ctx = ready(objective="sampled")
    optimizer = adamw(model, weight_decay=0.1)
    train(method, model, ctx, 3, optimizer)
    ctx.evolution.left = [2, 2]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    method.update(model, optimizer, window(9), ctx)
    for name, p in model.named_parameters():
        skipped = name.startswith(("model.layers.2", "model.layers.3", "model.layers.4"))
        assert p.equal(before[name]) == skipped, name


@pytest.mark.parametrize("depths", [(2, 3, 5), (3,)])
def test_cost_is_what_is_counted(depths):
    method, model, _ = ready(depths=depths)
    for point in (*method.points(), Depth(5)):
        with method.at(model, point):
            assert stated(method, point, DEEP) == counted(model)


def test_transformers_loads_an_exported_depth(tmp_path):
    method, model, ctx = ready()
    train(method, model, ctx, 2)
    method.export(model.eval(), Depth(2), tmp_path)
    assert not (tmp_path / "adapter").exists()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = batch_of()
    with torch.no_grad(), method.at(model, Depth(2)):
        assert Method().logits(stock, batch).equal(method.logits(model, batch))


def test_it_starts_on_dense_layers_alone():
    with pytest.raises(UserError, match="cannot go on"):
        SortedFull().check_start([RTN()])
    SortedFull().check_start([Full()])
