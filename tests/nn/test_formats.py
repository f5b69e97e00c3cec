"""What every packed weight format promises; a new file in `nn/quant/formats` is held to it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import generator, tiny_model

from effbench.api import weights
from effbench.api.weights import COMPUTE, MASTERS, Packed
from effbench.nn.quant.linears import QuantisedLinear, pack_linears, storage_bytes
from effbench.util.errors import UserError

every = pytest.mark.parametrize("name", weights.names())
SIZES = ((64, 48), (130, 7), (1, 3))


def linear(d_in: int = 64, d_out: int = 48) -> torch.nn.Linear:
    made = torch.nn.Linear(d_in, d_out, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.randn(d_out, d_in, generator=generator(1)))
    return made.requires_grad_(False)


@every
@pytest.mark.parametrize("sizes", SIZES)
def test_the_stated_bytes_are_those_in_memory(name: str, sizes: tuple[int, int]) -> None:
    packed = weights.find(name)()
    for made in (packed.quantise(linear(*sizes)), packed.empty(linear(*sizes))):
        assert storage_bytes(made) == packed.measured(made).bytes(*sizes, element=2)


@every
def test_a_product_is_that_of_the_expanded_weight_and_passes_gradients(name: str) -> None:
    made: Any = weights.find(name)().quantise(linear(), torch.float32)
    x = torch.randn(5, 64, generator=generator(2)).requires_grad_()
    dense = made.dense_weight(torch.float32)
    out = made(x)
    torch.testing.assert_close(out, x @ dense.T)
    out.backward(torch.ones_like(out))
    torch.testing.assert_close(x.grad, torch.ones_like(out) @ dense)
    assert (dense - linear().weight).norm() < 0.2 * linear().weight.norm()


@every
def test_codes_go_into_an_empty_layer(name: str) -> None:
    packed = weights.find(name)()
    made, again = packed.quantise(linear()), packed.empty(linear())
    again.load_state_dict(made.state_dict())
    x = torch.randn(3, 64, generator=generator(3))
    assert again(x).equal(made(x))


@every
def test_a_base_is_packed_in_its_linears_alone(name: str) -> None:
    model = tiny_model()
    before = model.get_input_embeddings().weight.clone()
    names = pack_linears(model, weights.find(name)(), torch.float32)
    packed = [n for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]
    assert packed == names
    assert len(names) == 7 * len(model.model.layers)
    assert model.get_input_embeddings().weight.equal(before)


def test_a_format_is_found_by_its_file_and_refused_by_its_name() -> None:
    assert {"nf4", "grouped"} <= set(weights.names())
    assert weights.find("nf4").name == "nf4"
    assert issubclass(weights.find("grouped"), Packed)
    assert weights.held("compute") is COMPUTE
    assert weights.held("float32") is MASTERS
    assert weights.held("nf4") == weights.find("nf4")()
    with pytest.raises(UserError, match="nf5") as error:
        weights.find("nf5")
    assert "nf4" in error.value.hint


def test_every_packed_format_is_packed_and_nothing_else_is() -> None:
    assert weights.kinds("nf4") == {"nf4", "packed"}
    assert weights.kinds("dense") == {"dense"}
    assert weights.kinds("adapted") == {"adapted"}


def test_masters_are_cast_after_training_and_others_stay() -> None:
    assert MASTERS.bytes(3, 5, element=2) == 60
    assert MASTERS.used() is COMPUTE
    assert weights.FLOAT32.used() is weights.FLOAT32
    assert COMPUTE.bytes(3, 5, element=2) == 30


def test_counting_a_format_needs_no_torch() -> None:
    code = (
        "import sys; from effbench.api import weights\n"
        "[weights.find(n)().bytes(64, 64, 2) for n in weights.names()]\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
