"""What a composed shape can say: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from effbench.api.cost import cache_bytes, cost_of
from effbench.api.footprint import Pass, training_of
from effbench.api.parts import Cache, LayerShape, Linear, Mixer, low_rank, portion
from effbench.api.shape import LINEARS, ModelShape, Shape, experts
from effbench.api.spec import TrainSpec
from effbench.api.weights import find
from effbench.resources.peaks import Peaks

FLAT = Shape(64, 128, 4, 4, 2, 16, 100)
BASE = ModelShape.of(FLAT)
ATTENTION, MLP, NORMS = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128, 2 * 64


def test_a_flat_shape_and_its_composed_one_count_alike() -> None:
    assert BASE.params == FLAT.params == 4 * (ATTENTION + MLP + NORMS) + 64 + 2 * 100 * 64
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        assert getattr(BASE, name) == getattr(FLAT, name)
    assert cost_of(FLAT, "bfloat16") == cost_of(BASE, "bfloat16")
    assert ModelShape.of(BASE) is BASE


def test_experts_are_all_in_memory_and_few_are_read() -> None:
    moe = experts(64, 32, count=8, active=2, shared=16)
    model = BASE.map(lambda i, x: replace(x, mlp=moe) if i else x)
    router, one, shared = 64 * 8, 3 * 64 * 32, 3 * 64 * 16
    cost, dense = cost_of(model, "bfloat16"), cost_of(BASE, "bfloat16")
    assert cost.params - dense.params == 3 * (router + 8 * one + shared - MLP)
    read = 3 * (router + 2 * one + shared - MLP)
    assert cost.bytes_per_token - dense.bytes_per_token == 2 * read
    assert cost.flops_per_token - dense.flops_per_token == 2 * read
    assert model.layer(1).intermediate_size == 2 * 32 + 16
    assert model.flops_per_token() == cost.flops_per_token
    assert not model.uniform


def test_adapters_of_experts_beside_one_frozen_weight() -> None:
    """As MixLoRA has them: base products once for gate and up, per expert for down."""

    def expert(linear: Linear) -> Linear:
        adapter = replace(low_rank(linear.d_in, linear.d_out, 4), copies=8, active=2)
        return replace(linear, adapter=adapter, active=2 if linear.name == "down_proj" else 1)

    model = BASE.map_linears(lambda _, x: expert(x), LINEARS[4:])
    cost, dense = cost_of(model, "float32"), cost_of(BASE, "float32")
    each = 4 * (64 + 128)
    assert cost.trainable == cost.params - dense.params == 4 * 8 * 3 * each
    assert cost.flops_per_token - dense.flops_per_token == 2 * 4 * (2 * 3 * each + 64 * 128)


def test_a_layer_that_runs_on_a_share_of_the_tokens() -> None:
    third = BASE.map(lambda i, x: x.running(portion(1, 3)) if i == 2 else x)
    cost, dense = cost_of(third, "float32"), cost_of(BASE, "float32")
    assert cost.params == dense.params
    layer = ATTENTION + MLP
    assert dense.flops_per_token - cost.flops_per_token == pytest.approx(2 * layer * 2 / 3)
    assert dense.bytes_per_token - cost.bytes_per_token == pytest.approx(
        4 * (layer + NORMS) * 2 / 3
    )


def test_layers_without_attention_or_mlp() -> None:
    bare = BASE.map(lambda i, x: LayerShape(x.mixer if i % 2 else None, None, x.norms))
    assert bare.linear_params == 2 * ATTENTION
    assert bare.kv_bytes_per_token(2) == 2 * 2 * 32 * 2
    assert training_of(bare.trained(), "float32").forward == 2 * 2 * ATTENTION


def test_caches_with_a_state_a_window_and_elements_of_their_own() -> None:
    def cached(index: int, layer: LayerShape) -> LayerShape:
        mixer = layer.mixer
        assert mixer
        caches = (
            Cache(constant=1000),
            Cache(2, 2, 16, window=10),
            Cache(2, 2, 16, element=0.5),
            mixer.cache,
        )
        return replace(layer, mixer=replace(mixer, cache=caches[index]))

    model = BASE.map(cached)
    assert model.kv_bytes_per_token(2) == 2 * 64 + 64 / 2 + 2 * 64
    short, long = (cache_bytes(model, "bfloat16", n, 3) for n in (5, 100))
    assert short == 3 * (2000 + 5 * 128 + 5 * 32 + 5 * 128)
    assert long == 3 * (2000 + 10 * 128 + 100 * 32 + 100 * 128)


def test_a_mixer_with_a_state_attends_to_nothing() -> None:
    state = Cache(constant=4 * 16 * 16)

    def recurrent(index: int, layer: LayerShape) -> LayerShape:
        assert layer.mixer
        return replace(layer, mixer=Mixer(layer.mixer.linears, 0, 0, 16, state)) if index else layer

    model = BASE.map(recurrent)
    assert model.flops_per_token(10) - model.flops_per_token(0) == 4 * 64 * 10
    assert cache_bytes(model, "float32", 7) == 7 * 64 * 4 + 3 * 1024 * 4


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"window": 96}, ["at most 96 tokens"]),
        ({"prompt": 1024}, ["at most 1,024 of a prompt"]),
        ({"window": 96, "prompt": 50}, ["at most 50 of a prompt", "at most 96 tokens"]),
    ],
)
def test_a_cache_that_stops_growing_is_a_saving(bounds: dict[str, int], said: list[str]) -> None:
    def bounded(_: int, layer: LayerShape) -> LayerShape:
        assert layer.mixer
        cache = replace(layer.mixer.cache, **bounds)  # type: ignore[arg-type]
        return replace(layer, mixer=replace(layer.mixer, cache=cache))

    narrow = BASE.map(bounded)
    cost = cost_of(narrow, "float32", BASE)
    assert (cost.saving, cost.kept) == ("physical", said)
    assert cost_of(narrow, "float32", narrow).saving == "none"
    assert cost_of(BASE, "float32", BASE).kept == []


@pytest.mark.parametrize("name", ["nf4", "grouped"])
def test_weights_of_each_linear_in_a_format_of_its_own(name: str) -> None:
    packed = find(name)()
    model = BASE.map_linears(lambda i, x: replace(x, format=packed) if i == 1 else x, ["up_proj"])
    cost, dense = cost_of(model, "bfloat16", BASE), cost_of(BASE, "bfloat16")
    saved = 2 * 64 * 128 - packed.bytes(64, 128, 2)
    assert dense.resident_bytes - cost.resident_bytes == saved
    assert dense.bytes_per_token - cost.bytes_per_token == saved
    assert cost.params == dense.params
    assert cost.saving == "physical"
    assert replace(model, simulated=True).formats == {packed}
    assert cost_of(replace(model, simulated=True), "bfloat16", BASE).saving == "simulated"


def test_gradients_pass_from_the_lowest_layer_that_trains_on() -> None:
    top = BASE.map(lambda i, x: x.map(lambda y: replace(y, trains=i == 3)))
    found, all_of_it = training_of(top, "float32"), training_of(BASE.trained(), "float32")
    assert found.gradient == 2 * (2 * (ATTENTION + MLP) - 64 * (64 + 32 + 32))
    assert all_of_it.gradient == 4 * 4 * (ATTENTION + MLP)
    assert found.attention_gradient == all_of_it.attention_gradient / 4
    assert 0 < found.layers < all_of_it.layers / 4
    assert training_of(BASE, "float32").layers == 0


def test_a_step_without_a_backward_pass_keeps_nothing_but_one_tensor_of_noise() -> None:
    model = replace(BASE.trained(find("nf4")()), forwards=2)
    training = training_of(model, "bfloat16")
    assert (training.layers, training.gradient, training.head_gradients) == (0, 0, 0)
    assert training.noise == 64 * 128
    peaks, one = Peaks(BASE, 2, exact=True), Pass("train", 1, 8, 7)
    cost, settings = cost_of(model, "bfloat16"), TrainSpec()
    found = peaks.step(settings, cost, training, one)
    assert "gradients" not in found
    assert "optimiser" not in found
    usual = training_of(BASE.trained(), "bfloat16")
    assert sum(found.values()) < sum(peaks.step(settings, cost, usual, one).values())
