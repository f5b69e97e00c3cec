"""DFloat11: the model's bits, bytes as they are, resume and artefact; the code itself."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, context, generator, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from effbench.api.shape import ModelShape
from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.dfloat11 import DFloat11
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.stack import decoder_layers
from effbench.nn.quant import dfloat11, huffman, packing
from effbench.nn.quant.dfloat11 import DFloat11Linear, Unit
from effbench.nn.quant.linears import expanded_once, storage_bytes
from effbench.resources.peaks import Peaks
from effbench.util import cpp
from effbench.util.errors import UserError

BF16 = torch.bfloat16
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(params=["torch", "C++"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Decode in torch, or by the C++ kernel."""
    if request.param == "torch":
        monkeypatch.setenv("EFFBENCH_NATIVE", "0")
    elif isinstance(found := cpp.library(dfloat11.SOURCE), str):
        pytest.skip(found)
    return str(request.param)


def normal(count: int, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(count, generator=generator(seed))).to(BF16)


def decoded(encoded: dfloat11.Encoded) -> torch.Tensor:
    out = torch.full((len(encoded.rest),), torch.nan, dtype=BF16)
    dfloat11.decode(encoded, out)
    return out


def bits(weights: torch.Tensor) -> torch.Tensor:
    return weights.view(torch.int16)


def made(dtype: torch.dtype = BF16) -> Any:
    model = tiny_model(dtype=dtype).eval()
    compress_whole(DFloat11(), model.requires_grad_(False), [], context())
    return model


# -- the code ----------------------------------------------------------------------------------

ODD = torch.tensor([0x0000, 0x8000, 0x0001, 0x807F, 0x3F80, 0xBF80, 0x77FF, 0xF7FF])
"""Both zeros, denormals, both ones, and the largest that there is a code for."""
CASES = {
    "normal": normal(100_000),
    "odd": (ODD.repeat(40) - (ODD.repeat(40) >> 15 << 16)).to(torch.int16).view(BF16),
    "constant": torch.full((5000,), 0.5, dtype=BF16),
    "one": torch.tensor([-3.0], dtype=BF16),
    "two": torch.tensor([1.0, 2.0], dtype=BF16),
    "every exponent": (torch.arange(240).repeat(300) << 7).to(torch.int16).view(BF16),
    "steep": torch.cat([torch.full((2**k,), 2.0**-k, dtype=BF16) for k in range(17)]),
}


@pytest.mark.parametrize("case", CASES)
def test_decoded_weights_are_the_weights(case: str, decoder: str) -> None:
    weights = CASES[case][torch.randperm(len(CASES[case]), generator=generator(1))]
    encoded = dfloat11.encode({"w": weights})
    assert bits(decoded(encoded)).equal(bits(weights))
    assert encoded.low.numel() == 0


def test_pieces_of_the_encoder_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dfloat11.encode({"w": CASES["normal"]})
    monkeypatch.setattr(huffman, "PIECE", 777)
    assert all(
        a.equal(b) for a, b in zip(whole, dfloat11.encode({"w": CASES["normal"]}), strict=True)
    )


@pytest.mark.parametrize("case", ["normal", "every exponent", "steep"])
def test_code_is_complete_and_within_a_bit_of_the_entropy(case: str) -> None:
    exponents = bits(CASES[case]).int() >> 7 & 0xFF
    counts = torch.bincount(exponents, minlength=256).double()
    lengths = huffman.code_lengths(counts.long().tolist())
    assert sum(2.0**-n for n in lengths if n) == 1
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    mean = float((counts * torch.tensor(lengths)).sum() / counts.sum())
    assert entropy <= mean < entropy + 1


def test_codes_are_no_longer_than_a_chunk_can_look_ahead() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 50:
        fibonacci.append(sum(fibonacci[-2:]))
    assert max(huffman._huffman(fibonacci)) == 49
    lengths = huffman.code_lengths(fibonacci)
    assert max(lengths) <= huffman.LONGEST
    assert sum(2.0**-n for n in lengths) == 1


def test_tables_are_no_more_than_pointers_can_name() -> None:
    counts = [2**20, *[512] * 200, *[1] * 39, *[0] * 16]
    lengths = huffman.code_lengths(counts)
    assert len(huffman._prefixes(huffman._huffman(counts))) > 16 >= len(huffman._prefixes(lengths))
    assert sum(2.0**-n for n in lengths if n) == 1
    symbols = torch.arange(240, dtype=torch.uint8).repeat_interleave(torch.tensor(counts[:240]))
    assert huffman.decode(huffman.encode(symbols)).equal(symbols)


def test_published_code_has_as_many_bits() -> None:
    """LeanModels/DFloat11 with dahuffman: 51,955, one of which is for a symbol of the end."""
    torch.manual_seed(0)
    encoded = dfloat11.encode({"w": (torch.randn(20000) * 0.02).bfloat16()})
    lengths = encoded.tables[-1].long()
    last = (len(encoded.codes) - huffman.PADDING) * 8
    assert int((lengths > 0).sum()) == 16
    assert encoded.positions.tolist() == [0, 12583, 20000]
    counts = torch.bincount(huffman.decode(encoded.stream), minlength=256)
    assert int((counts * lengths).sum()) == 51_954
    assert last == 64 * math.ceil(51_954 / 64)


def test_blocks_of_chunks_decode_alone() -> None:
    exponents = (bits(CASES["normal"]).int() >> 7 & 0xFF).to(torch.uint8)
    stream = huffman.encode(exponents)
    blocks = len(stream.positions) - 1
    assert blocks > 5
    for first, last in ((0, 1), (2, 5), (blocks - 1, blocks)):
        start, end = stream.positions[[first, last]].tolist()
        assert huffman.decode(stream, first, last).equal(exponents[start:end])


def test_gaps_say_where_the_first_code_of_a_chunk_begins() -> None:
    exponents = (bits(CASES["steep"]).int() >> 7 & 0xFF).to(torch.uint8)
    exponents = exponents[torch.randperm(len(exponents), generator=generator(1))]
    stream = huffman.encode(exponents)
    sizes = stream.tables[-1].long()[exponents.long()]
    starts = (sizes.cumsum(0) - sizes).tolist()
    chunks = (len(stream.codes) - huffman.PADDING) // 8
    first: dict[int, int] = {}
    for start in starts:
        first.setdefault(start // 64, start % 64)
    found = packing.unpack(stream.gaps, huffman.GAP, chunks)
    assert found[sorted(first)].tolist() == [first[c] for c in sorted(first)]


# -- what is damaged ---------------------------------------------------------------------------


def damaged(encoded: dfloat11.Encoded, field: str, seed: int) -> dfloat11.Encoded:
    """Return a unit some bytes of which are others, each array in memory of exactly its size."""
    tensor = getattr(encoded, field).clone()
    flat = tensor.view(torch.uint8).flatten()
    places = torch.randint(len(flat), (8,), generator=generator(seed))
    flat[places] = torch.randint(256, (8,), generator=generator(seed + 1)).to(torch.uint8)
    return encoded._replace(**{field: tensor})


@pytest.mark.parametrize("field", ["codes", "gaps", "positions", "tables"])
def test_what_is_damaged_is_reported_or_stays_within_its_memory(field: str, decoder: str) -> None:
    encoded = dfloat11.encode({"w": normal(30_000)})
    few = field == "tables" or (field == "gaps" and decoder == "C++")  # which reads few of them
    reported = 0
    for seed in range(20):
        buffer = torch.zeros(30_000 + 512, dtype=BF16)
        try:
            dfloat11.decode(damaged(encoded, field, seed), buffer[256:-256])
        except UserError as error:
            assert "damaged" in error.message
            reported += 1
        assert not buffer[:256].any() and not buffer[-256:].any()
    assert reported > (0 if few else 15)


def test_arrays_that_do_not_fit_each_other_are_refused(decoder: str) -> None:
    encoded = dfloat11.encode({"w": normal(30_000)})
    for change in (
        {"codes": encoded.codes[:-8]},
        {"gaps": encoded.gaps[:-1]},
        {"positions": encoded.positions[:-1]},
        {"positions": encoded.positions + 1},
        {"rest": encoded.rest[:-1]},
        {"tables": encoded.tables[-1:]},
    ):
        with pytest.raises(UserError, match="damaged"):
            decoded(encoded._replace(**change))


# -- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2.0**113, torch.inf, torch.nan])
def test_a_weight_without_a_code_is_refused_by_name(value: float) -> None:
    model = tiny_model(dtype=BF16).requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj has a weight"):
        compress_whole(DFloat11(), model, [], context())


def test_float16_is_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="q_proj is float16") as error:
        made(torch.float16)
    assert "hardware.dtype=bfloat16" in error.value.hint


# -- the model ---------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_greedy_tokens_are_those_of_the_model() -> None:
    dense, packed = tiny_model(dtype=BF16).eval(), made()
    assert packed(IDS).logits.equal(dense(IDS).logits)
    assert packed(IDS[:1]).logits.equal(dense(IDS[:1]).logits)
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    told = [m.generate(IDS, attention_mask=mask, **settings) for m in (dense, packed)]
    assert told[0].equal(told[1])


@torch.no_grad()
def test_engine_decodes_the_same_bits_block_by_block() -> None:
    sessions = [StaticSession(tiny_model(dtype=BF16).eval(), False), StaticSession(made())]
    assert sessions[1].engine == "walk"
    first = [s.prefill(IDS[:, :8]) for s in sessions]
    assert first[0].equal(first[1])
    for at in range(8, 14):
        one, other = (s.step(IDS[:, at : at + 1]) for s in sessions)
        assert one.equal(other)


def test_biases_are_added_within_the_product() -> None:
    linear = torch.nn.Linear(64, 48, dtype=BF16).requires_grad_(False)
    packed = dfloat11.pack(
        {"a": linear}, dfloat11.encode({"a": linear.weight}), dfloat11.Scratch(), ""
    )["a"]
    x = normal(640, 1).view(10, 64)
    with torch.no_grad():
        assert packed(x).equal(linear(x))


def test_float32_is_as_exact() -> None:
    dense, packed = tiny_model().eval(), made(torch.float32)
    with torch.no_grad():
        assert packed(IDS).logits.equal(dense(IDS).logits)


def test_gradients_pass_through_blocks_in_any_order() -> None:
    grads = []
    for model in (tiny_model().eval().requires_grad_(False), made(torch.float32)):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeds).logits.square().sum().backward()
        grads.append(embeds.grad)
    torch.testing.assert_close(*grads)


def test_each_block_is_decoded_once_a_pass_into_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    calls: list[dfloat11.Encoded] = []
    decode = dfloat11.decode

    def watched(encoded: dfloat11.Encoded, out: torch.Tensor, trusted: bool) -> None:
        assert trusted == any(encoded.codes is codes for codes, *_ in calls)
        calls.append(encoded)
        decode(encoded, out, trusted)

    monkeypatch.setattr(dfloat11, "decode", watched)
    units = [m for m in model.modules() if isinstance(m, Unit)]
    with torch.no_grad():
        model(IDS)
        assert len(calls) == len(units) == len(decoder_layers(model))
        with expanded_once(model):
            expected = model(IDS).logits
            before = len(calls)
            assert model(IDS).logits.equal(expected)
            assert len(calls) == before
    (scratch,) = {unit.scratch for unit in units}
    assert scratch.buffer.nbytes == max(2 * len(unit.encoded.rest) for unit in units)


def test_a_copy_and_a_loaded_state_do_not_see_old_weights() -> None:
    model, other = made(), tiny_model(seed=1, dtype=BF16).eval()
    compress_whole(DFloat11(), other.requires_grad_(False), [], context())
    with torch.no_grad():
        expected = other(IDS).logits
        model(IDS)
        twin = copy.deepcopy(model)
        twin.load_state_dict(other.state_dict())
        assert twin(IDS).logits.equal(expected)
        assert model(IDS).logits.equal(tiny_model(dtype=BF16).eval()(IDS).logits)


# -- counts and the artefact -------------------------------------------------------------------


def test_counted_bytes_are_those_in_memory_and_the_estimate_is_near(tmp_path: Path) -> None:
    model = made()
    DFloat11().save(model, tmp_path)
    base = ModelShape.of(SHAPE)
    before, after = (
        chain_cost([DFloat11()], base, "bfloat16", folders=f) for f in ([], [tmp_path])
    )
    assert after.resident_bytes == storage_bytes(model)
    assert before.resident_bytes == pytest.approx(after.resident_bytes, 0.02)
    assert after.saving == "physical"


def test_normal_weights_take_less_than_seven_tenths() -> None:
    weights = normal(200_000)
    assert dfloat11.encode({"w": weights}).nbytes < 0.7 * weights.nbytes


def test_resumed_after_any_part_it_ends_the_same() -> None:
    whole = made().state_dict()
    method, model = DFloat11(), tiny_model(dtype=BF16).requires_grad_(False)
    parts = itertools.islice(method.compress(model, [], context()), 1)
    finished = {part.name: part.make() for part in parts}
    assert method.num_parts(model, []) == 4
    for part in method.compress(model, [], context()):
        part.put(finished.get(part.name) or part.make())
    state = model.state_dict()
    assert state.keys() == whole.keys()
    assert all(state[name].equal(whole[name]) for name in whole)


def test_artefact_gives_the_same_bits_and_fits_one_model_alone(tmp_path: Path) -> None:
    model = made()
    DFloat11().save(model, tmp_path)
    loaded = DFloat11().load(tiny_model(dtype=BF16).eval(), tmp_path, context())
    with torch.no_grad():
        assert loaded(IDS).logits.equal(model(IDS).logits)
    shallow = tiny_model(dtype=BF16)
    del shallow.model.layers[1]
    with pytest.raises(UserError, match="other blocks"):
        DFloat11().load(shallow, tmp_path, context())


def test_it_needs_dense_layers() -> None:
    with pytest.raises(UserError, match="DFloat11Linear"):
        compress_whole(DFloat11(), made(), [], context())
    linear = made().model.layers[0].self_attn.q_proj
    assert isinstance(linear, DFloat11Linear) and linear.layout() is None


def units_of(count: int) -> list[Unit]:
    """Return units of one linear each that share a buffer."""
    scratch = dfloat11.Scratch()
    sizes = [(20, 30)]
    codes = [dfloat11.encode({"w": normal(600, seed=seed)}) for seed in range(count)]
    return [Unit(encoded, sizes, scratch) for encoded in codes]


def test_a_buffer_is_of_no_use_once_the_codes_are_others() -> None:
    one, other = units_of(2)
    before = one.weight(0, BF16).clone()
    one.load_state_dict(other.state_dict())
    assert one.weight(0, BF16).equal(normal(600, seed=1).view(20, 30))
    one.load_state_dict(units_of(1)[0].state_dict())
    assert one.weight(0, BF16).equal(before)
    one._apply(lambda t: t.clone())
    assert one.scratch.holds is None and not one.sound


def test_a_unit_that_cannot_be_decoded_leaves_the_others_whole() -> None:
    one, other = units_of(2)
    before = one.weight(0, BF16).clone()
    other.get_buffer("codes").fill_(255)
    other.get_buffer("tables").zero_()
    with pytest.raises(UserError, match="damaged"):
        other.weight(0, BF16)
    one.scratch.buffer.zero_()  # what a decoder may have written before it noticed
    assert one.weight(0, BF16).equal(before)


# -- what encoding takes -------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that are made and not yet gone, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made._is_view():
            size = made.untyped_storage().nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(made, self._gone, size)
        return made

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_plan_has_room_for_the_encoder(dtype: torch.dtype) -> None:
    shape = replace(SHAPE, hidden_size=256, intermediate_size=1024)
    linears = shape.linear_sizes(0).values()
    draws = generator(0)
    weights = {
        str(n): 0.02 * torch.randn(i, o, generator=draws).to(dtype)
        for n, (i, o) in enumerate(linears)
    }
    with Living() as living:
        dfloat11.encode(weights)
    planned = DFloat11().held(ModelShape.of(shape), 0, dtype.itemsize)
    planned += Peaks(ModelShape.of(shape), dtype.itemsize).expanded
    assert 0.5 * planned < living.most <= planned
