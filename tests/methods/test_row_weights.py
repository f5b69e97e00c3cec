"""Weights of rows (`dataset.columns.weight`) reach every term of every loss over tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, begun, context, generator, tiny_model

from effbench.api.batch import Batch
from effbench.methods.adapters.adalora import AdaLoRA
from effbench.methods.depth.exit_heads import ExitHeads
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.sorted_full import SortedFull
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.methods.distill.kd import Distillation
from effbench.methods.distill.ptloss import PTLoss
from effbench.methods.experts.mixlora import MixLoRA
from effbench.methods.full import Full
from effbench.methods.pruning.apt import APT
from effbench.methods.sharing.echo_llama import EchoLLaMA
from effbench.methods.sharing.echoatt import EchoAtt
from effbench.methods.trains import Trains
from effbench.nn.adapters.lowrank import copy_adapters

DEEP = replace(SHAPE, num_layers=5)
SMALL: dict[str, Any] = {"rank": 4, "depths": (2, 5)}
METHODS = [
    Full(),
    Distillation(teacher="big"),
    PTLoss(teacher="big", eps=((0.5, -0.2),)),
    EchoLLaMA(kl=0.5, blend=False),
    EchoAtt(layers=(2, 4), refine=0.0),
    LoRADrop(rank=4, layers=(3,), prefix=0.0, random_phase=False),
    SortedFull(depths=(2, 5)),
    SortedLoRA(objective="layerskip", **SMALL),
    SortedLoRA(objective="soft", layout="skip_middle", **SMALL),
    ExitHeads(depths=(2, 3)),
    APT(distill=True, end=1.0),
    MixLoRA(),
    AdaLoRA(orthogonality=10.0),
]


def weighted(batch: Batch, *weights: float) -> Batch:
    """Return a batch as a whole window whose rows have weights."""
    found = replace(batch, columns={"weight": torch.tensor(weights)})
    return replace(found, window_tokens=found.weighted_tokens)


def learnt(method: Trains, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a window, and its gradients, of a model that has left its start."""
    ctx = context(load_model=lambda name: tiny_model(seed=7, shape=DEEP))
    ctx.total_steps = 9
    model = begun(method, tiny_model(shape=DEEP), ctx)
    if isinstance(method, APT):
        ctx.evolution.teacher = copy_adapters(model)  # type: ignore[attr-defined]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    draws = generator(3)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=draws))
    ctx.step, ctx.generator = 4, generator(5)
    loss = method.loss(model, batch, ctx)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trained.items() if p.grad is not None}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_weights_count_in_all_of_a_loss(method: Trains) -> None:
    """A row of weight 0 is as if it were not there, and a weight that all share is none."""
    batch = batch_of()
    alone = replace(batch, rows=[0], input_ids=batch.input_ids[:1], labels=batch.labels[:1])
    alone = replace(alone, attention_mask=batch.attention_mask[:1])
    expected, _ = learnt(method, replace(alone, window_tokens=alone.loss_tokens))
    assert learnt(method, weighted(batch, 2.0, 0.0))[0] == pytest.approx(expected, rel=1e-4)
    plain, gradients = learnt(method, batch)
    loss, found = learnt(method, weighted(batch, 2.0, 2.0))
    assert loss == pytest.approx(plain, rel=1e-4)
    assert gradients.keys() == found.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
