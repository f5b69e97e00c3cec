"""What is counted of a training step, against the tensors that autograd really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import SHAPE as TINY
from helpers import adamw, full_batch, kept_bytes, tiny_model

from effbench.api.footprint import Pass, logit_bytes, step_flops, training_of
from effbench.methods.adapters.adalora import AdaLoRA
from effbench.methods.adapters.deep_lora import DeepLoRA
from effbench.methods.adapters.dora import DoRA
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import LoRA
from effbench.methods.adapters.qlora import QLoRA
from effbench.methods.base import Method
from effbench.methods.chain import shape_of
from effbench.methods.depth.exit_heads import ExitHeads
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.sorted_full import SortedFull
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.methods.distill.kd import Distillation
from effbench.methods.full import Full
from effbench.methods.pruning.apt import APT
from effbench.methods.sharing.echo_llama import EchoLLaMA
from effbench.methods.sharing.echoatt import EchoAtt
from effbench.resources.peaks import OPTIMIZER_BYTES

SHAPE = replace(TINY, vocab_size=500)
ROWS, LENGTH = 4, 64
METHODS = [
    Full(),
    LoRA(rank=4),
    LoRA(rank=4, targets=("q_proj", "down_proj")),
    QLoRA(rank=4),
    DyLoRA(rank=4),
    Distillation(teacher="t"),
    DeepLoRA(rank=4),
    DeepLoRA(rank=4, form="narrow", targets=("q_proj", "down_proj")),
    DeepLoRA(form="full"),
    APT(rank=4),
    DoRA(rank=4),
    DoRA(rank=4, targets=("q_proj", "down_proj")),
    AdaLoRA(rank=4),
    SortedLoRA(rank=4, depths=(2,)),
    SortedLoRA(rank=4, depths=(1, 2), objective="soft"),
    SortedLoRA(rank=4, depths=(1, 2), objective="soft", layout="skip_middle"),
    SortedFull(depths=(2,), objective="sampled"),
    SortedFull(depths=(1, 2)),
    SortedLoRA(rank=4, depths=(1, 2), objective="layerskip"),
    SortedFull(depths=(1, 2), objective="layerskip"),
    ExitHeads(depths=(1, 2)),
    ExitHeads(depths=(1, 2), trunk="trained"),
    EchoAtt(layers=(1,), refine=1.0),
    EchoLLaMA(share=0.5),
    EchoLLaMA(share=0.5, blend=False),
    EchoLLaMA(share=0.5, trains="lora", rank=4, blend=False),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_activations_are_what_autograd_keeps(method: Method, dtype: str) -> None:
    training = training_of(shape_of(method, SHAPE, phase="train"), dtype)
    counted = training.layers * ROWS * LENGTH + training.fixed
    assert counted == pytest.approx(kept_bytes(method, dtype, SHAPE, ROWS, LENGTH), rel=0.06)


def test_stand_ins_keep_what_is_above_the_first_one() -> None:
    method = LoRADrop(rank=4, layers=(1,))
    training = training_of(shape_of(method, SHAPE, phase="train"), "float32")
    kept = kept_bytes(method, "float32", SHAPE, ROWS, LENGTH)
    counted = training.layers * ROWS * LENGTH + training.quadratic * ROWS * LENGTH**2
    assert (
        counted
        < 0.6
        * training_of(shape_of(LoRA(rank=4), SHAPE, phase="train"), "float32").layers
        * ROWS
        * LENGTH
    )
    assert counted == pytest.approx(kept, rel=0.5)


def test_logits_of_a_pass_without_gradients() -> None:
    one = Pass("score", 2, 10, 7)
    assert logit_bytes(one, 100, 4, every=False) == 7 * 100 * 8
    assert logit_bytes(one, 100, 2, every=False) == 7 * 100 * 10
    assert logit_bytes(one, 100, 2, every=True) == 7 * 100 * 10 + 20 * 100 * 2
    assert logit_bytes(Pass("decode", 2, 10, 2), 100, 2, every=True) == 2 * 100 * 2


def test_half_of_the_square_is_seen_by_causal_attention() -> None:
    training, one = (
        training_of(shape_of(Full(), SHAPE, phase="train"), "float32"),
        Pass("train", 1, 32, 31),
    )
    half, whole = (step_flops(training, one, square=s) for s in (False, True))
    attention = 4 * SHAPE.num_heads * SHAPE.head_dim * 32 * 32 * SHAPE.num_layers
    assert whole - half == pytest.approx(3 * attention / 2)
    again = step_flops(training, one, recompute=True, square=True)
    assert again - whole == pytest.approx(2 * SHAPE.linear_params * 32 + attention)


def test_products_of_weights_do_not_depend_on_the_tokens() -> None:
    training = training_of(shape_of(DoRA(rank=4), SHAPE, phase="train"), "float32")
    assert training.forward_constant == 2 * 4 * SHAPE.linear_params
    short, long = (Pass("train", 1, t, t - 1) for t in (8, 16))
    plain = training_of(shape_of(LoRA(rank=4), SHAPE, phase="train"), "float32")
    for one in (short, long):
        more = step_flops(training, one) - step_flops(plain, one)
        assert more == training.forward_constant
        again = step_flops(training, one, recompute=True)
        assert again - step_flops(plain, one, recompute=True) == 2 * more
    distance = training_of(shape_of(AdaLoRA(rank=4), SHAPE, phase="train"), "float32")
    none = training_of(shape_of(AdaLoRA(rank=4, orthogonality=0), SHAPE, phase="train"), "float32")
    for recompute in (False, True):
        flops = [step_flops(t, short, recompute) for t in (distance, none)]
        sizes = sum(i + o for _, _, i, o in SHAPE.linears())
        assert flops[0] - flops[1] == 6 * 6**2 * sizes


def test_optimiser_state_is_what_the_plan_counts() -> None:
    model = tiny_model(shape=SHAPE)
    optimizer = adamw(model)
    model(input_ids=full_batch(SHAPE, ROWS, LENGTH).input_ids).logits.sum().backward()
    optimizer.step()
    states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    held = sum(t.numel() * t.element_size() for t in states if t.ndim)
    assert held == OPTIMIZER_BYTES["adamw"] * SHAPE.params
